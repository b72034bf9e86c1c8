"""The forms that SDXL and sliders come in, as files: names, shapes and metadata, and nothing of the method."""

import os
from pathlib import Path


def written(path: Path, write):
    """write(temporary path), then rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
