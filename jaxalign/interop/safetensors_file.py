"""Reads and writes safetensors files: views of the mapped file, shards under one index as one mapping.

The safetensors library checks a file's header (sizes, overlaps, truncation); the views are made here because
the library's NumPy side has no bfloat16 and copies what it reads. Format: an 8-byte little-endian length, a
JSON header {name: {dtype, shape, data_offsets}}, the bytes.
"""

import functools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxalign.interop.arrays import LazyArrays
from jaxalign.interop.dtypes import SAFETENSORS


def open_file(path: str | Path) -> LazyArrays:
    """Mapping name -> read-only view of one safetensors file.

    Raises ValueError (truncated, damaged, a number format that NumPy has no name for).
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening it checks the header against the file's size
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); download it again") from error
    raw = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    (length,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    views = {name: _view(raw[8 + length :], name, entry, path) for name, entry in header.items()}
    return LazyArrays(views, str(path))


def _view(data: np.ndarray, name: str, entry: dict, path: Path) -> Callable[[], np.ndarray]:
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"{path}: tensor {name!r} is {entry['dtype']}, which is not read here")
    start, stop = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), SAFETENSORS[entry["dtype"]]
    return lambda: data[start:stop].view(dtype).reshape(shape)


def open_index(path: str | Path) -> LazyArrays:
    """Mapping name -> read-only view over all shards that a `*.safetensors.index.json` lists.

    Raises ValueError (not such an index, a shard that lacks a tensor), FileNotFoundError (a shard that is not
    there).
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors index (a JSON file with a 'weight_map')") from error
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ValueError(f"{path}: shard {outside[0]!r} does not lie beside the index")
    if missing := [shard for shard in shards if not (path.parent / shard).is_file()]:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(shards)} shards are not there: {', '.join(missing[:3])}; "
            "download them into the same folder"
        )
    opened = {shard: open_file(path.parent / shard) for shard in shards}
    if lost := [name for name, shard in table.items() if name not in opened[shard]]:
        raise ValueError(f"{path}: {table[lost[0]]} has no tensor {lost[0]!r} ({len(lost)} such)")
    views = {name: functools.partial(opened[shard].__getitem__, name) for name, shard in table.items()}
    return LazyArrays(views, str(path))


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name as one safetensors file that torch, diffusers and transformers load."""
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    # transformers and diffusers refuse files that do not say which framework's layout they hold.
    save_file(contiguous, str(path), metadata={"format": "pt"})
