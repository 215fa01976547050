"""Reads PyTorch's weight files without torch and without running anything that is in them.

Both formats of torch.save are read: the zip archive (PyTorch >= 1.6: `data.pkl` describes the tensors,
`data/KEY` holds each storage's bytes, uncompressed) and the older plain one (pickles one behind the other,
then the storages); of a TorchScript archive (torch.jit.save: the same zip with a program beside it, which nobody
looks at) the tensors among its modules' attributes. The file is memory-mapped: tensors are views of it, and bytes
are read only where somebody looks at them. Layouts: torch/serialization.py `_save`, `_legacy_save`,
torch/csrc/jit/serialization/export_module.cpp. What a pickle may do: `restricted_pickle.py`.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.interop import restricted_pickle, sniff
from jaxalign.interop.arrays import LazyArrays, map_file
from jaxalign.interop.restricted_pickle import Attributes, Damaged, Refused, Storage, StorageType, Tensor, shown

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MOST = 10_000_000  # entries of all containers of a file, each counted wherever it is held
_DEEPEST = 100  # containers in containers


def read(path: str | Path, *, key: str | None = None, lazy: bool = False) -> Mapping[str, np.ndarray]:
    """Tensors of a file that torch.save wrote, by name; numbers as they are (bf16, fp16, ints, bool).

    `key` says which part of a file with several parts is meant ('state_dict', 'model', 'ema', dotted for
    parts of parts); the only one need not be named. Nested dicts inside it get dotted names. `lazy=True` gives
    read-only views of the memory-mapped file instead of arrays of their own. Entries that are no tensors (step
    counts, names) are left out; a TorchScript archive gives its module's state dict. Raises ValueError:
    truncated, a web page, safetensors, a pickle that wants anything but tensors (named), no or several parts
    without `key` (lists them); FileNotFoundError, IsADirectoryError.
    """
    path = Path(path)
    tree, storage_bytes, release = _open(path)
    tensors = _flatten(_select(tree, key, path), path)
    views = {name: _view(tensor, storage_bytes, path) for name, tensor in tensors.items()}
    arrays = LazyArrays(views, str(path), release)
    return arrays if lazy else {name: np.array(array, order="C") for name, array in arrays.items()}


def parts(path: str | Path) -> list[str]:
    """Keys for `read`: a file's containers that directly hold tensors, those with the most first. Raises as it."""
    candidates = _candidates(_open(Path(path))[0])
    return sorted(candidates, key=lambda name: -candidates[name])


def _open(path: Path) -> tuple[Any, "_Bytes", Callable[[], None]]:
    """(the unpickled tree, the bytes of its storages, what gives the file's pages back), or the errors of `read`."""
    kind = sniff.kind(path)
    if kind not in sniff.TORCH:
        raise ValueError(f"{path}: a {kind} file, not a PyTorch one; open it with weights.open_weights")
    try:
        raw, release = map_file(path)
        if kind == sniff.TORCH_LEGACY:
            tree, storage_bytes = _open_legacy(path, raw)
        else:
            tree, storage_bytes = _open_zip(path, raw, script=kind == sniff.TORCHSCRIPT)
        _size_up(tree, {})
    except Refused as error:
        raise ValueError(
            f"{path}: refused: its pickle wants {error}, and only tensors in dicts, lists and tuples are "
            "read here, nothing is run; where the file is trusted, save plain weights with torch: "
            "torch.save(model.state_dict(), 'weights.pth')"
        ) from None
    except Damaged as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); download it again") from error
    return tree, storage_bytes, release


# ---- the two layouts: both give the unpickled tree and a function key -> (bytes, is big-endian) ------------

_Bytes = Callable[[str], tuple[np.ndarray, bool]]


def _open_zip(path: Path, raw: np.ndarray, script: bool) -> tuple[Any, _Bytes]:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickles) != 1:
            raise Damaged(f"{len(pickles)} records named data.pkl")
        prefix = pickles[0][: -len("data.pkl")]
        plain = (n for n in records if not script or n == pickles[0] or n.startswith(prefix + "data/"))
        if compressed := [n for n in plain if records[n].compress_type != zipfile.ZIP_STORED]:
            raise Damaged(f"record {compressed[0]} is compressed, which torch.save never does")
        endian = records.get(prefix + "byteorder")
        try:
            big = endian is not None and archive.read(endian).strip() == b"big"
            program = archive.read(pickles[0])
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error) as error:
            raise Damaged(str(error)) from error

    def storage_bytes(key: str) -> np.ndarray:
        info = records.get(f"{prefix}data/{key}")
        if info is None:
            raise Damaged(f"no record data/{key}")
        # The local header repeats the name and has its own extra field (torch pads there to align the data).
        header = raw[info.header_offset : info.header_offset + 30].tobytes()
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise Damaged(f"no local header for record data/{key}")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > raw.size:
            raise Damaged(f"record data/{key} ends beyond the file")
        return raw[start : start + info.file_size]

    def storage(pid: tuple) -> Storage:
        record = _whole(pid)  # (tensors of a TorchScript archive may read one record as two kinds of numbers)
        if record.length * record.width > storage_bytes(record.key).size:
            raise Damaged(f"record data/{record.key} is shorter than its {record.length} elements")
        return record

    tree = restricted_pickle.load(io.BytesIO(program), storage, script=script)
    if script and not isinstance(tree, Attributes):
        raise Damaged("a TorchScript archive whose data.pkl holds no module")
    return tree, lambda key: (storage_bytes(key), big)


def _open_legacy(path: Path, raw: np.ndarray) -> tuple[Any, _Bytes]:
    roots: dict[str, Storage] = {}

    def storage(pid: tuple) -> Storage:
        root = _whole(pid)
        first = roots.setdefault(root.key, root)  # the bytes come last and are as many as one of them says: all agree
        if root.length != first.length or (root.length and root.dtype != first.dtype):
            raise Damaged(f"storage {root.key} once with {first.length} elements, then {root.length} or others")
        view = pid[5] if len(pid) > 5 else None
        if view is None:
            return root
        _view_key, start, view_length = view
        natural = all(type(v) is int and v >= 0 for v in (start, view_length))
        if not natural or start + view_length > root.length:
            raise Damaged(f"a view {shown(view)} beyond storage {root.key}")
        return Storage(root.key, root.dtype, view_length, start)

    with path.open("rb") as file:
        if restricted_pickle.load(file) != _LEGACY_MAGIC:
            raise ValueError(f"{path}: a pickle, but not one that torch.save made")
        protocol = restricted_pickle.load(file)
        if protocol != _LEGACY_PROTOCOL:
            raise Damaged(f"another protocol than {_LEGACY_PROTOCOL}")
        restricted_pickle.load(file)  # sizes of C types where the file was written; storages do not need them
        tree = restricted_pickle.load(file, storage)
        keys = restricted_pickle.load(file)
        position = file.tell()

    places: dict[str, np.ndarray] = {}
    for key in keys if isinstance(keys, list) else ():
        if type(key) is not str:
            raise Damaged("a storage whose key is no text")
        if key not in roots or key in places:
            raise Damaged(f"storage {shown(key)} belongs to no tensor, or comes twice")
        root = roots[key]
        written = raw[position : position + 8].tobytes()
        if len(written) < 8 or struct.unpack("<q", written)[0] != root.length:
            raise Damaged(f"the file ends, or goes wrong, at storage {key} (byte {position})")
        start, position = position + 8, position + 8 + root.length * root.width
        if position > raw.size:
            raise Damaged(f"the file ends at byte {raw.size}, storage {key} at byte {position}")
        places[key] = raw[start:position]
    if missing := roots.keys() - places.keys():
        raise Damaged(f"no bytes for storage {sorted(missing)[0]}")
    return tree, lambda key: (places[key], False)  # legacy storages are little-endian on every machine


def _whole(pid: tuple) -> Storage:
    _, storage_type, key, _location, length = pid[:5]
    natural = type(length) is int and length >= 0
    if not isinstance(storage_type, StorageType) or type(key) is not str or not natural:
        raise Damaged(f"storage {shown(key)} with length {shown(length)}")
    return Storage(key, storage_type.dtype, length)


# ---- from records to arrays --------------------------------------------------------------------------------


def _view(tensor: Tensor, storage_bytes: _Bytes, path: Path) -> Callable[[], np.ndarray]:
    def build() -> np.ndarray:
        raw, big = storage_bytes(tensor.storage.key)
        width = tensor.dtype.itemsize
        start = tensor.storage.start * tensor.storage.width
        if start + tensor.end > raw.size:  # as_strided looks at no bounds: nothing passes here that was not asked now
            raise ValueError(f"{path}: damaged: a tensor ends beyond its storage {tensor.storage.key}")
        raw = raw[start + tensor.offset * width :]
        elements = raw[: raw.size // width * width].view(tensor.dtype)
        strides = tuple(stride * width for stride in tensor.strides)
        array = np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)
        if big:  # swap the numbers inside (a complex number is two of them)
            number = width // 2 if tensor.dtype.kind == "c" else width
            array = np.ascontiguousarray(array).reshape(-1).view(f"u{number}").byteswap()
            array = array.view(tensor.dtype).reshape(tensor.shape)
        return array

    return build


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        yield from ((str(name), child) for name, child in node.items())
    elif isinstance(node, (list, tuple)):
        yield from ((str(index), child) for index, child in enumerate(node))


def _size_up(node: Any, known: dict[int, tuple[int, int] | None], depth: int = 0) -> tuple[int, int]:
    """(entries below a node, levels), by the id of each container: what walking the tree will take.

    A few bytes can hold one list many times over, many levels deep. Raises Damaged for more than anybody writes.
    """
    if not isinstance(node, (dict, list, tuple)):
        return 0, 0
    if id(node) not in known:
        known[id(node)] = None
        entries, levels = len(node), 1
        for _, child in _children(node) if depth < _DEEPEST else ():
            more, deeper = _size_up(child, known, depth + 1)
            entries, levels = entries + more, max(levels, 1 + deeper)
        if depth == _DEEPEST or levels > _DEEPEST or entries > _MOST:
            raise Damaged(f"containers more than {_DEEPEST} deep, or with more than {_MOST:,} entries")
        known[id(node)] = entries, levels
    if known[id(node)] is None:
        raise Damaged("a container holds itself")
    return known[id(node)]


def _flatten(tree: Any, path: Path) -> dict[str, Tensor]:
    """All tensors below `tree` under dotted names."""
    tensors: dict[str, Tensor] = {}

    def walk(node, prefix):
        for name, child in _children(node):
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(child, Tensor):
                if full in tensors:
                    raise ValueError(f"{path}: two tensors in it are called {full!r}")
                tensors[full] = child
            else:
                walk(child, full)

    if isinstance(tree, Tensor):
        return {"": tree}
    walk(tree, "")
    if not tensors:
        raise ValueError(f"{path}: no tensors in it")
    return tensors


def _candidates(tree: Any, prefix: str = "", depth: int = 3) -> dict[str, int]:
    """Dotted keys of the containers that directly hold tensors, with how many."""
    found: dict[str, int] = {}
    if depth:
        for name, child in _children(tree):
            direct = sum(isinstance(value, Tensor) for _, value in _children(child))
            if direct:
                found[prefix + name] = direct
            else:
                found |= _candidates(child, f"{prefix}{name}.", depth - 1)
    return found


def _select(tree: Any, key: str | None, path: Path) -> Any:
    """The part of the file that `key` names; None is the whole, if it is a module or directly holds tensors, or the
    only part that does.
    """
    if key is None:
        if isinstance(tree, (Tensor, Attributes)) or any(isinstance(child, Tensor) for _, child in _children(tree)):
            return tree
        if not (candidates := list(_candidates(tree))):
            raise ValueError(f"{path}: no tensors in it, nor in the first three levels of its parts")
        if len(candidates) > 1:
            raise ValueError(
                f"{path}: which of its parts is meant? {_listed(tree)}; save that one alone with torch: "
                "torch.save(part, 'weights.pth')"
            )
        key = candidates[0]
    node, rest = tree, key
    while rest:
        children = dict(_children(node))
        # Names may have dots of their own: the longest that fits is taken.
        names = [name for name in children if rest == name or rest.startswith(name + ".")]
        if not names:
            raise ValueError(f"{path}: no part {key!r}; it has {_listed(tree)}")
        name = max(names, key=len)
        node, rest = children[name], rest[len(name) + 1 :]
    return node


def _listed(tree: Any) -> str:
    candidates = sorted(_candidates(tree).items(), key=lambda item: -item[1])
    if not candidates:
        return "no part with tensors"
    parts = [f"{name!r} ({count} tensor{'s'[: count != 1]})" for name, count in candidates[:6]]
    return ", ".join(parts) + (f" and {len(candidates) - 6} more" if len(candidates) > 6 else "")
