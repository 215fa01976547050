"""One door for weight files of any kind: the content decides which reader opens them, not the name."""

from pathlib import Path

from jaxalign.interop import npz_file, safetensors_file, sniff, torch_file
from jaxalign.interop.arrays import LazyArrays


def open_weights(path: str | Path, *, key: str | None = None, prefix: str = "") -> LazyArrays:
    """Lazy mapping name -> array of a .pth/.pt/.bin, .safetensors, .safetensors.index.json or .npz file.

    Arrays are read-only views of the memory-mapped file. `key` chooses a part of a PyTorch file, as in
    `torch_file.read`; `prefix` keeps the names that start with it and cuts it off ('module.', 'encoder.').
    Raises ValueError, FileNotFoundError or IsADirectoryError, each saying what the file is instead.
    """
    kind = sniff.kind(path)
    if kind in sniff.TORCH:
        arrays = torch_file.read(path, key=key, lazy=True)
    elif key is not None:
        raise ValueError(f"{path}: key={key!r} was given, but a {kind} file has no parts; leave key out")
    elif kind == sniff.SAFETENSORS_INDEX:
        arrays = safetensors_file.open_index(path)
    elif kind == sniff.NPZ:
        arrays = npz_file.open_file(path)
    else:
        arrays = safetensors_file.open_file(path)
    return arrays.below(prefix) if prefix else arrays
