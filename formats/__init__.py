"""The forms that SDXL and sliders come in, as files: names, shapes and metadata, and nothing of the method."""
