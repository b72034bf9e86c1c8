"""slider.py for the miniature, where what is seen can be measured: the same options, and under each
picture of an --html page what the measuring stick reads of it.

    python -m miniature.draw --prompt "a portrait of a person" --slider age.safetensors \\
        --html age.html
"""

import slider
from miniature.effect import captions
from support import cli

if __name__ == "__main__":
    cli.run(lambda: slider.main(captions))
