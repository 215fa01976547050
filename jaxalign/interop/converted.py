"""A network's weights as a folder of sharded arrays: what `jaxalign.convert` writes and `teachers.load` reads.

    FOLDER/state/            Orbax's arrays, one entry a leaf under its dotted name
    FOLDER/kept.safetensors  upstream's keys that no leaf takes (BatchNorm's counts), as they came; if there are any
    FOLDER/converted.json    whose they are, where they came from, shape and dtype of every leaf
    FOLDER/manifest.json     size and digest of every file (sealed.py), which reading compares

The folder gets its name when everything is in it: one that is there is whole.
"""

import contextlib
import gc
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign.interop import mapping, safetensors_file, sealed
from jaxalign.interop.dtypes import is_floating

NOTE, KEPT = "converted.json", "kept.safetensors"
BATCH = 256 << 20  # bytes of leaves that are under way together
FORMAT = 2  # raised when a reader of another one could not make sense of a folder; 1 had neither digests nor KEPT


def is_converted(path: str | Path) -> bool:
    """Whether `write` made this folder."""
    return (Path(path) / NOTE).is_file()


def note(folder: str | Path) -> dict[str, Any]:
    """{'format', 'name', 'layout', 'settings', 'kept': [name, ...], 'leaves': {dotted name: [dtype, shape]}, ...}.

    Raises ValueError for a note that cannot be read, was changed, or is another version's.
    """
    try:
        found = json.loads((Path(folder) / NOTE).read_text(encoding="utf-8"))
        written = found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its {NOTE} cannot be read ({type(error).__name__}); convert again") from error
    if written != FORMAT:
        raise ValueError(f"{folder}: its format is {written!r}, this version reads {FORMAT}; convert again")
    _refuse_damage(folder, [NOTE])
    return found


def kept(folder: str | Path) -> dict[str, np.ndarray]:
    """What no leaf took when the folder was made (`mapping.kept_arrays`). Raises ValueError for damage."""
    if not note(folder)["kept"]:
        return {}
    _refuse_damage(folder, [KEPT])
    return {name: np.array(array) for name, array in safetensors_file.open_file(Path(folder) / KEPT).items()}


def write(folder: str | Path, module: Any, *, kept: mapping.Arrays | None = None, **about: Any) -> Path:
    """Writes the leaves of `module`; `about` (JSON) goes into the note: name, layout, settings and what else is known.

    `kept` is what upstream's file has beside them (`mapping.kept_arrays`). Raises FileExistsError when the folder holds
    something already; OSError when writing fails, and nothing is left.
    """
    folder = check_free(folder)
    arrays = dict(mapping.named_leaves(module)[0])
    leaves = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in arrays.items()}
    with sealed.whole_folder(folder) as temporary:
        try:
            with quiet_orbax(), _orbax() as checkpointer:  # whole leaves: cut into chunks, they would be copied at once
                checkpointer.save(temporary / "state", args=ocp.args.PyTreeSave(arrays))
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the storage library makes a ValueError of a full disk
            raise _as_os_error(error, folder) from error
        text = json.dumps({"format": FORMAT, **about, "kept": sorted(kept or {}), "leaves": leaves}, indent=1)
        (temporary / NOTE).write_text(text + "\n", encoding="utf-8")
        if kept:
            safetensors_file.write(temporary / KEPT, kept)
        sealed.write_manifest(temporary)
    return folder


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Within it Orbax does not print the traceback of an error that it also raises; ours is one line."""

    def keep(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or record.levelno > logging.ERROR

    logging.getLogger("absl").addFilter(keep)
    try:
        yield
    finally:
        logging.getLogger("absl").removeFilter(keep)


def _as_os_error(error: Exception, folder: Path) -> OSError:
    """What the storage library raised when writing failed, in the system's words where it has them."""
    text = " ".join(str(error).split())
    if found := re.search(r"os_error_code='(\d+)'", text):
        return OSError(int(found[1]), f"cannot be written: {os.strerror(int(found[1]))}", str(folder))
    return OSError(f"{folder}: cannot be written: {type(error).__name__}: {text[:200]}")


def check_free(folder: str | Path) -> Path:
    """The absolute path of a folder that is not there or empty; FileExistsError otherwise."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; give --out another name, or remove it")
    return folder


def read(folder: str | Path, module: Any, *, name: str, dtype: Any = None, sharding: Any = None) -> Any:
    """The abstract `module` with the leaves of a folder; `dtype` and `sharding` as in `mapping.load_state_dict`.

    Each device reads its part, after every file was compared with its digest. Raises ValueError for another network's
    folder, leaves that differ, damage.
    """
    stored = _checked(folder, module, name)
    leaves, treedef = mapping.named_leaves(module)
    place = mapping.placement(sharding, leaves, treedef)
    arguments = {}
    for leaf, spec in leaves:
        target = np.dtype(spec.dtype)
        if is_floating(target) and dtype is not None:
            target = stored[leaf] if isinstance(dtype, str) and dtype == "keep" else np.dtype(dtype)
        where = place(leaf, tuple(spec.shape)) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        arguments[leaf] = ocp.ArrayRestoreArgs(sharding=where, global_shape=tuple(spec.shape), dtype=target)
    restored: dict[str, Any] = {}
    for batch in _batches(arguments):
        restored |= jax.block_until_ready(_restore(folder, batch))
        gc.collect()  # Orbax's buffers hang in reference cycles: as much again as the model
    return jax.tree_util.tree_unflatten(treedef, [restored[leaf] for leaf, _ in leaves])


def read_lazily(folder: str | Path, module: Any, *, name: str) -> Any:
    """The abstract `module` with leaves that NumPy reads from the folder each time it is given one; for export.

    Raises as `read`.
    """
    stored = _checked(folder, module, name)
    leaves, treedef = mapping.named_leaves(module)
    lazy = [_Stored(folder, leaf, tuple(spec.shape), stored[leaf]) for leaf, spec in leaves]
    return jax.tree_util.tree_unflatten(treedef, lazy)


class _Stored:
    """A leaf on the disk."""

    def __init__(self, folder: str | Path, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self.folder, self.name, self.shape, self.dtype = folder, name, shape, dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = _restore(self.folder, {self.name: ocp.RestoreArgs(restore_type=np.ndarray)})[self.name]
        return array if dtype is None else array.astype(dtype)


def _checked(folder: str | Path, module: Any, name: str) -> dict[str, np.dtype]:
    """The dtypes of the leaves on the disk, which are whole and those of `module` by name and shape; or ValueError."""
    found = note(folder)
    if found["name"] != name:
        raise ValueError(f"{folder} holds {found['name']}, not {name}; load it as {found['name']}")
    here = {leaf: tuple(spec.shape) for leaf, spec in mapping.named_leaves(module)[0]}
    there = {leaf: tuple(shape) for leaf, (_, shape) in found["leaves"].items()}
    if differing := [leaf for leaf in {**here, **there} if here.get(leaf) != there.get(leaf)]:
        first = differing[0]
        raise ValueError(
            f"{folder}: {len(differing)} leaves differ from the model's, first {first}: {there.get(first, 'none')} in "
            f"the folder, {here.get(first, 'none')} in the model; it was converted with {found['settings']}"
        )
    _refuse_damage(folder)
    return {leaf: np.dtype(dtype) for leaf, (dtype, _) in found["leaves"].items()}


def _refuse_damage(folder: str | Path, names: list[str] | None = None) -> None:
    if damage := sealed.find_damage(Path(folder), names):
        raise ValueError(f"{folder}: damaged: {damage}; convert again")


def _batches(arguments: Mapping[str, ocp.ArrayRestoreArgs]) -> list[dict[str, ocp.ArrayRestoreArgs]]:
    """Leaves in groups: each call has its price, and what is under way is in memory twice."""
    batches, size = [{}], 0
    for leaf, argument in arguments.items():
        size += math.prod(argument.global_shape) * np.dtype(argument.dtype).itemsize
        if size > BATCH and batches[-1]:
            batches.append({})
            size = 0
        batches[-1][leaf] = argument
    return batches


def _restore(folder: str | Path, arguments: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
    item = dict.fromkeys(arguments, 0)
    wanted = ocp.args.PyTreeRestore(item=item, restore_args=dict(arguments), partial_restore=True)
    try:
        with _orbax() as checkpointer:
            return checkpointer.restore(Path(folder).absolute() / "state", args=wanted)
    except MemoryError:
        raise
    except Exception as error:  # the storage library raises plain ones, pages long
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{folder}: truncated or damaged ({reason} ...); convert again") from error


def _orbax() -> ocp.Checkpointer:
    # Weights hardly compress: plain bytes cost less time and as much space.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
