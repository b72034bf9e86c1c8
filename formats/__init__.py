"""The forms that SDXL and sliders come in, as files: names, shapes and metadata, and nothing of
the method."""

import os
from pathlib import Path


def write_atomically(path: Path, write):
    """write(temporary path), then rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        umask = os.umask(0)  # to read it is to set it
        os.umask(umask)
        # As any other file: safetensors makes its own readable to their owner alone
        # (findings/safetensors_file_mode.sh).
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())  # else a power cut can leave the name with nothing in it
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def first_line(error: BaseException) -> str:
    """Of an error's message, or the error's kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
