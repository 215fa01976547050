"""Frozen teachers: networks that turn a video into tokens (or flow), found by name in one plain dict.

    teacher = teachers.load("dinov2_b", "dinov2_vitb14_pretrain.pth", size=224)
    tokens = teacher(video)  # [b, t, h, w, 3] in [-1, 1] -> [b, *teacher.grid((t, h, w)), teacher.width]

Weights are upstream's own file, or a folder that `python -m jaxalign.convert` made of it; `third_party/*.toml` says
where a person finds each file, and `python -m jaxalign.convert --list` prints that.
"""

import dataclasses
import difflib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxalign.interop import converted, manifests, mapping, mismatch, sniff, torch_file
from jaxalign.interop import weights as weight_files
from jaxalign.interop.rules import Rule
from jaxalign.teachers import dinov2, efficientnet, hiera, raft, sea_raft, videomae, vjepa2

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What `load` must know of a teacher; what its files are called stands in third_party/*.toml."""

    module: Callable[..., nnx.Module]  # module(config, rngs=rngs)
    config: type  # frozen dataclass of its settings
    layouts: Mapping[str, Sequence[Rule]]  # upstream's names of its leaves: one table for each way it is published
    settings: Mapping[str, Any]  # the preset's

    @property
    def known_settings(self) -> list[str]:
        """Names that `load` takes."""
        return [field.name for field in dataclasses.fields(self.config)]


def _family(presets: Mapping[str, Mapping], module, config, rules) -> dict[str, Entry]:
    layouts = rules if isinstance(rules, Mapping) else {"": rules}
    return {name: Entry(module, config, layouts, settings) for name, settings in presets.items()}


TEACHERS: dict[str, Entry] = (
    _family(
        {"efficientnet_lite0": {}},
        efficientnet.EfficientNetLite0,
        efficientnet.EfficientNetConfig,
        efficientnet.RULES,
    )
    | _family(dinov2.PRESETS, dinov2.DINOv2, dinov2.DINOv2Config, dinov2.RULES)
    | _family(videomae.PRESETS, videomae.VideoMAE, videomae.VideoMAEConfig, videomae.RULES)
    | _family(vjepa2.PRESETS, vjepa2.VJEPA2, vjepa2.VJEPA2Config, vjepa2.RULES)
    | _family(hiera.PRESETS, hiera.Hiera, hiera.HieraConfig, hiera.RULES)
    # flow networks: tokens are flow [b, t - 1, h, w, 2] in pixels
    | {name: Entry(raft.RAFT, raft.RAFTConfig, raft.RULES[p["variant"]], p) for name, p in raft.PRESETS.items()}
    | _family(sea_raft.PRESETS, sea_raft.SEARAFT, sea_raft.SEARAFTConfig, sea_raft.RULES)
)


def load(
    name: str,
    weights: str | Path | Arrays | None = None,
    *,
    dtype: Any = None,
    sharding: Any = None,
    **settings: Any,
) -> nnx.Module:
    """A teacher with its pretrained weights.

    `weights`: upstream's file, a folder that jaxalign.convert made, or a mapping of arrays by upstream's names; None
    takes the file of an installed data package. `dtype` (also 'keep': the file's) and `sharding` as
    `mapping.load_state_dict`; `settings` are the fields of the teacher's config. Raises ValueError (unknown name or
    setting; a file that does not fit, with the first keys that differ and the preset that it would fit) and
    FileNotFoundError (says which file, where it is found, and what to do with it).
    """
    module = abstract(name, **settings)
    if not isinstance(weights, Mapping):
        weights = find_file(name, weights)
        if converted.is_converted(weights):
            module = abstract(name, **(converted.note(weights)["settings"] | settings))
            return converted.read(weights, module, name=name, dtype=dtype, sharding=sharding)
    return load_upstream(name, module, weights, dtype=dtype, sharding=sharding).module


class Loaded(NamedTuple):
    """What `load_upstream` found in a file."""

    module: nnx.Module
    layout: str  # key of Entry.layouts
    left_out: list[str]  # keys that the table says are no part of the teacher
    kept: Arrays  # what no leaf takes and the way back to PyTorch needs: `mapping.kept_arrays`


def load_upstream(name: str, module: nnx.Module, weights: str | Path | Arrays, **options: Any) -> Loaded:
    """The abstract `module` of teacher `name` with the weights of upstream's file; see `load`.

    `options` go to `mapping.load_state_dict`.
    """
    parts = [weights] if isinstance(weights, Mapping) else _parts(weights, [file.key for file in files(name)])
    _, _, arrays, layout = _match(name, module, parts)
    rules = TEACHERS[name].layouts[layout]
    try:
        loaded = mapping.load_state_dict(module, arrays, rules, **options)
    except ValueError as error:
        raise ValueError(f"teacher {name}: {error}{_nearest(weights, asked=name)}") from None
    known = mapping.upstream_shapes(module, rules)
    left_out = [key for key in arrays if key not in known]
    return Loaded(loaded, layout, left_out, mapping.kept_arrays(module, arrays, rules))


def abstract(name: str, **settings: Any) -> nnx.Module:
    """The teacher with shapes for leaves: its `grid` and `width` without memory. Raises as `load`."""
    if name not in TEACHERS:
        near = difflib.get_close_matches(name, TEACHERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TEACHERS)}"
        raise ValueError(f"teacher {name!r} is not known; {hint}")
    entry = TEACHERS[name]
    if unknown := [setting for setting in settings if setting not in entry.known_settings]:
        raise ValueError(f"teacher {name}: no setting {unknown[0]!r}; it has {', '.join(entry.known_settings)}")
    config = entry.config(**(dict(entry.settings) | settings))
    return jax.eval_shape(lambda: entry.module(config, rngs=nnx.Rngs(0)))


def files(name: str) -> list[manifests.File]:
    """What third_party/ says of a teacher's files; the first is the one that is asked for."""
    return [file for file in manifests.files() if file.preset == name]


# ---- files in detail -----------------------------------------------------------------------------------------------


def find_file(name: str, given: str | Path | None) -> Path:
    """The path that was given, or for None that of the file in an installed data package, which is never imported.

    Raises FileNotFoundError that says which file is wanted, where it is found and what to do with it.
    """
    if given is not None and Path(given).exists():
        return Path(given)
    file = files(name)[0]
    try:
        inside = importlib.metadata.files(file.package) if file.package and given is None else None
    except importlib.metadata.PackageNotFoundError:
        inside = None
    for packaged in inside or ():
        if packaged.name == file.name and (path := Path(packaged.locate())).is_file():
            return path
    lacks = f"there is no file {given}" if given is not None else "it was given no weights"
    raise FileNotFoundError(
        f"teacher {name}: {lacks}; it wants {file.name} of {file.project} ({file.license}), found at {file.where}; "
        f"then give its path (--config.teacher.weights=FILE, or weights=FILE), or that of the folder which "
        f"`python -m jaxalign.convert {name} --weights FILE --out FOLDER` makes of it"
    )


class _Match(NamedTuple):
    fits: float  # how much of what the module wants is there in the right shape
    known: float  # how much of what is there the module wants, or its table says to leave out
    arrays: Arrays
    layout: str


def _match(name: str, module: nnx.Module, parts: Sequence[Arrays]) -> _Match:
    """The part of a file and the table of names that agree best."""
    found = []
    for layout, rules in TEACHERS[name].layouts.items():
        wanted = mapping.upstream_shapes(module, rules)
        for part in parts:
            fits = sum(key in part and tuple(part[key].shape) == spec.shape for key, spec in wanted.items())
            unknown = mismatch.unknown_keys(part, wanted, rules)
            found.append(_Match(fits / len(wanted), 1 - len(unknown) / max(1, len(part)), part, layout))
    return max(found, key=lambda match: match[:2])


def _parts(path: str | Path, keys: Sequence[str]) -> list[Arrays]:
    """The parts of a weights file that may be meant: those under `keys`, the whole, those with the most tensors.

    Somebody may have saved the part alone, or under another name, and safetensors have no parts. Raises as
    `weights.open_weights`.
    """
    if sniff.kind(path) not in (sniff.TORCH_ZIP, sniff.TORCH_LEGACY):
        return [weight_files.open_weights(path)]
    found, first_error = [], None
    for key in dict.fromkeys([*keys, "", *torch_file.parts(path)[:4]]):
        try:
            found.append(weight_files.open_weights(path, key=key or None))
        except ValueError as error:
            first_error = first_error or error
    if not found:
        raise first_error
    return found


def _nearest(weights: str | Path | Arrays, asked: str) -> str:
    """Which other preset a file would fit, as the end of an error message; every teacher's shapes are looked at."""
    keys = [file.key for file in manifests.files()]
    parts = [weights] if isinstance(weights, Mapping) else _parts(weights, keys)
    best, how_well = "", (0.5, 0.0)  # less than half in common is no likeness
    for name in sorted(TEACHERS, key=lambda name: TEACHERS[name].config is not TEACHERS[asked].config):
        match = _match(name, abstract(name), parts)
        if match[:2] > how_well:
            best, how_well = name, match[:2]
        if how_well == (1, 1):  # most often another size of the same family, and these come first
            break
    if not best:
        return "; nor is it another teacher's: `python -m jaxalign.convert --list` names the file of each"
    if best == asked:
        return ""
    return f"; it looks like a file of {best} ({how_well[0]:.0%} of that one's keys are there in the same shape)"
