"""Reading checkpoints: which leaves fit, onto which devices; and the warm start of one run from another.

What is in a checkpoint's folder is described in checkpoint.py.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign.training import checked
from jaxalign.training.mesh import named_leaves

METADATA = "metadata.json"
SCALARS = (bool, int, float)


def signature(leaf: Any) -> tuple[str, list[int]]:
    """(dtype, shape) of an array, an abstract array or a Python number."""
    if isinstance(leaf, SCALARS):
        leaf = np.asarray(leaf)
    return str(leaf.dtype), list(leaf.shape)


def check_leaves(leaves: dict[str, Any]) -> None:
    """TypeError naming a leaf that a checkpoint cannot hold."""
    for name, leaf in leaves.items():
        is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
        if not is_array and not isinstance(leaf, SCALARS):
            raise TypeError(f"{name} is a {type(leaf).__name__}: a checkpoint holds arrays and numbers only")
        if is_array and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is of dtype {leaf.dtype}: store jax.random.key_data(key)")


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, (*SCALARS, np.ndarray, np.generic)):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype)


def read(
    reader: ocp.AsyncCheckpointer | ocp.PyTreeCheckpointHandler, folder: Path, wanted: dict[str, Any]
) -> dict[str, Any]:
    """The leaves of a checked checkpoint by their names on disk, in the types and shardings of `wanted`.

    Of several processes all have to come with a checkpointer, for it ends in a barrier; with a handler each may alone.
    """
    filled = {name: leaf for name, leaf in wanted.items() if 0 not in signature(leaf)[1]}
    args = {name: _restore_args(leaf) for name, leaf in filled.items()}
    item = dict.fromkeys(filled, 0)
    found = {}
    if filled:
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        found = reader.restore(folder / "state", args=arguments)
    for name, leaf in wanted.items():
        if name not in found:  # Orbax refuses arrays without elements; their shape says everything
            found[name] = np.zeros(leaf.shape, leaf.dtype)
            if not isinstance(leaf, (np.ndarray, np.generic)):
                found[name] = jax.device_put(found[name], getattr(leaf, "sharding", None))
        elif isinstance(leaf, SCALARS):
            found[name] = type(leaf)(found[name].item())
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def check_match(folder: Path, stored: dict[str, Any], wanted: dict[str, Any], *, exact: bool, remedy: str) -> None:
    """ValueError naming the leaves when a checkpoint is not the one this state needs."""
    wrong = []
    if missing := [name for name in wanted if name not in stored]:
        wrong.append(f"it lacks {_listed(missing)}")
    if exact and (extra := [name for name in stored if name not in wanted]):
        wrong.append(f"nothing takes {_listed(extra)}")
    for name, leaf in wanted.items():
        dtype, shape = signature(leaf)
        if name in stored and (stored[name][1] != shape or (exact and stored[name][0] != dtype)):
            wrong.append(f"{name} is {stored[name][0]}{stored[name][1]} there and {dtype}{shape} here")
    if wrong:
        raise ValueError(f"checkpoint {folder} does not fit: {'; '.join(wrong[:4])}; {remedy}")


def step_folders(home: Path) -> list[int]:
    """The steps that have a folder, ascending, finished or not."""
    names = [path.name for path in home.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata of one checkpoint folder: {'step', 'leaves': {name: [dtype, shape]}, 'extra'}."""
    return json.loads((Path(folder) / METADATA).read_text(encoding="utf-8"))


def find_checkpoint(path: str | Path, *, say: Callable[[str], None] = print) -> Path:
    """A whole checkpoint's folder; `path`: a workdir or its checkpoints (newest first), or one step's.

    What is damaged is said and passed over. Raises FileNotFoundError when nothing whole is there.
    """
    path = Path(path).absolute()
    if (path / METADATA).is_file():
        if damage := checked.find_damage(path):
            raise FileNotFoundError(f"checkpoint {path} is damaged: {damage}")
        return path
    home = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for step in reversed(step_folders(home)):
        if (damage := checked.find_damage(home / str(step))) is None:
            return home / str(step)
        say(f"skipped the damaged checkpoint {home / str(step)}: {damage}")
    raise FileNotFoundError(f"{path} holds no whole checkpoint: give a workdir or a checkpoint's folder")


def load_params(
    path: str | Path,
    params: Any,
    *,
    pattern: str = "",
    source: str = "ema",
    say: Callable[[str], None] = print,
) -> tuple[Any, list[str]]:
    """Fill the leaves of `params` whose dotted name `pattern` (a regex) finds, from another run's checkpoint.

    `path` is as in `find_checkpoint`; `source` is a part of the saved state: 'ema', 'trainable.model'. Leaves
    are arrays or ShapeDtypeStructs (their dtype and sharding are followed); the others come back as they are.
    Returns the tree and the names that were filled; no process waits for another. Raises FileNotFoundError without a
    whole checkpoint, ValueError when leaves are missing there or differ in shape, or when the regex finds nothing.
    """
    leaves = named_leaves(params)
    wanted = {name: leaf for name, leaf in leaves.items() if re.search(pattern, name)}
    if not wanted:
        some = _listed(list(leaves))
        raise ValueError(f"the regex {pattern!r} finds none of the {len(leaves)} parameters, e.g. {some}")
    folder = find_checkpoint(path, say=say)
    on_disk = {f"{source}.{name}" if source else name: leaf for name, leaf in wanted.items()}
    check_match(folder, read_metadata(folder)["leaves"], on_disk, exact=False, remedy="narrow the regex")
    handler = ocp.PyTreeCheckpointHandler()
    try:
        found = read(handler, folder, on_disk)
    finally:
        handler.close()
    filled = dict(zip(wanted, (found[name] for name in on_disk), strict=True))
    merged = [filled.get(name, leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params), merged), list(wanted)
