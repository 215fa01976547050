"""Reads and writes safetensors files: views of the mapped file, shards under one index as one mapping.

The safetensors library checks a file's header (sizes, overlaps, truncation); the views are made here because
the library's NumPy side has no bfloat16 and copies what it reads. Format: an 8-byte little-endian length, a
JSON header {name: {dtype, shape, data_offsets}}, the bytes.
"""

import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxalign.interop import sealed
from jaxalign.interop.arrays import LazyArrays, map_file
from jaxalign.interop.dtypes import SAFETENSORS

_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}


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
    raw, release = map_file(path)
    (length,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    views = {name: _view(raw[8 + length :], name, entry, path) for name, entry in header.items()}
    return LazyArrays(views, str(path), release)


def _view(data: np.ndarray, name: str, entry: dict, path: Path) -> Callable[[], np.ndarray]:
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"{path}: tensor {name!r} is {entry['dtype']}, which is not read here")
    start, stop = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), SAFETENSORS[entry["dtype"]]
    return lambda: data[start:stop].view(dtype).reshape(shape)


def listed(path: str | Path) -> dict[str, str]:
    """{tensor: name of the shard beside it} of a `*.safetensors.index.json`. Raises ValueError for no such index."""
    path = Path(path)
    try:
        table = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(table.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors index (a JSON file with a 'weight_map')") from error
    if outside:
        raise ValueError(f"{path}: shard {outside[0]!r} does not lie beside the index")
    return table


def open_index(path: str | Path) -> LazyArrays:
    """Mapping name -> read-only view over all shards that a `*.safetensors.index.json` lists.

    Raises ValueError (not such an index, a shard that lacks a tensor), FileNotFoundError (a shard that is not
    there).
    """
    path, table = Path(path), listed(path)
    shards = sorted(set(table.values()))
    if missing := [shard for shard in shards if not (path.parent / shard).is_file()]:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(shards)} shards are not there: {', '.join(missing[:3])}; "
            "download them into the same folder"
        )
    opened = {shard: open_file(path.parent / shard) for shard in shards}
    if lost := [name for name, shard in table.items() if name not in opened[shard]]:
        raise ValueError(f"{path}: {table[lost[0]]} has no tensor {lost[0]!r} ({len(lost)} such)")
    views = {name: functools.partial(opened[shard].__getitem__, name) for name, shard in table.items()}

    def release() -> None:
        for shard in opened.values():
            shard.release()

    return LazyArrays(views, str(path), release)


def write(path: str | Path, tensors: Mapping[str, np.ndarray], *, notes: Mapping[str, str] | None = None) -> None:
    """Writes arrays by name as one safetensors file that torch, diffusers and transformers load.

    `notes` are kept in its header. Raises as `write_stream`.
    """
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}
    write_stream(path, shapes, tensors.items(), notes=notes)


def write_stream(
    path: str | Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    notes: Mapping[str, str] | None = None,
) -> None:
    """`write` for arrays that come one after the other, in any order: only one of them is in memory at a time.

    `shapes` announces all of them. The file gets its name when it is whole: a crash leaves the old one, if any.
    Raises ValueError for a number format that safetensors has no name for, or an array that was not announced so,
    announced and never came, or came twice; OSError when writing fails.
    """
    path = Path(path)
    header, places, position = {}, {}, 0
    # transformers and diffusers refuse files that do not say which framework's layout they hold.
    header["__metadata__"] = {"format": "pt", **(notes or {})}
    # The wider numbers first, as the library writes them: every array then lies at a multiple of its own width.
    for name, spec in sorted(shapes.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
        dtype = np.dtype(spec.dtype)
        if dtype not in _NAMES:
            raise ValueError(f"{path}: {name!r} is {dtype}, for which safetensors has no name; cast it first")
        end = position + math.prod(spec.shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        places[name], position = (position, spec), end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    temporary = sealed.unfinished(path)
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, array in tensors:
                start, spec = places.pop(name, (None, None))
                if start is None or array.shape != spec.shape or array.dtype != spec.dtype:
                    raise ValueError(f"{path}: {name!r} {array.dtype}{array.shape} was not announced, or came twice")
                file.seek(8 + len(text) + start)
                file.write(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
            if places:
                raise ValueError(f"{path}: {next(iter(places))!r} was announced and never came")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
