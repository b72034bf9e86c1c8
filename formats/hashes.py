"""The hashes by which A1111, kohya's trainer and model browsers know a file."""

import hashlib

from safetensors.torch import save


def model_hash(path) -> str:
    """kohya's ss_sd_model_hash, A1111's first model hash: 8 digits of the SHA-256 of 64 KiB in the
    file `path`, from 1 MiB on. It costs nothing; the SHA-256 of the whole takes SDXL many
    seconds."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def files_hash(files) -> str:
    """SHA-256 of what is in the files, in their order, and of their names."""
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def tensors_hash(tensors: dict) -> str:
    """kohya's sshs_model_hash: the SHA-256 of all that follows the header in the .safetensors file
    of `tensors`, so that metadata may change."""
    data = memoryview(save(tensors))
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
