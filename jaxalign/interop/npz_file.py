"""Reads NumPy's .npz archives (Chainer's weights among them) without unpickling; stored members stay in the file.

Format: a zip of .npy files, each a magic, a header with dtype, order and shape, and the bytes (NEP 1).
"""

import functools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxalign.interop.arrays import LazyArrays, map_file


def open_file(path: str | Path) -> LazyArrays:
    """Mapping name -> array; views of the mapped file, or for compressed members arrays read when they are asked for.

    Raises ValueError for a truncated or damaged file and for an array of Python objects, which would be a pickle.
    """
    path = Path(path)
    try:
        raw, release = map_file(path)
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            views = {info.filename.removesuffix(".npy"): _view(archive, info, raw, path) for info in infos}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); download it again") from error
    return LazyArrays(views, str(path), release)


def _view(archive: zipfile.ZipFile, info: zipfile.ZipInfo, raw: np.ndarray, path: Path) -> Callable[[], np.ndarray]:
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            shape, column_major, dtype = read(member)
        except ValueError as error:
            raise ValueError(f"{path}: truncated or damaged ({info.filename}: {error}); download it again") from error
        skip = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{path}: refused: {info.filename} holds Python objects, which only a pickle can read")
    if info.compress_type != zipfile.ZIP_STORED:
        return functools.partial(_unpacked, path, info.filename)
    header = raw[info.header_offset : info.header_offset + 30].tobytes()
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])) + skip
    stop = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if stop > raw.size:
        raise ValueError(f"{path}: truncated or damaged ({info.filename} ends beyond the file); download it again")
    order = "F" if column_major else "C"
    return lambda: raw[start:stop].view(dtype).reshape(shape, order=order)


def _unpacked(path: Path, member: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
