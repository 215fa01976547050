"""Pretrained networks by name: a plain dict of what each needs, and how weights of any kind get into one.

    module = presets.load(Presets("teacher", TEACHERS), "dinov2_b", "dinov2_vitb14_pretrain.pth", size=224)

Weights are upstream's own file, or a folder that `python -m jaxalign.convert` made of it. `jaxalign.teachers` and
`jaxalign.metrics.networks` each hold one such dict.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxalign.interop import converted, manifests, mapping, mismatch, sniff, torch_file
from jaxalign.interop import weights as weight_files
from jaxalign.interop.arrays import LazyArrays
from jaxalign.interop.rules import Rule

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What `load` must know of a network; what its files are called stands in third_party/*.toml."""

    module: Callable[..., nnx.Module]  # module(config, rngs=rngs)
    config: type  # frozen dataclass of its settings
    layouts: Mapping[str, Sequence[Rule]]  # upstream's names of its leaves: one table for each way it is published
    settings: Mapping[str, Any]  # the preset's

    @property
    def known_settings(self) -> list[str]:
        """Names that `load` takes."""
        return [field.name for field in dataclasses.fields(self.config)]


def family(presets: Mapping[str, Mapping], module, config, rules) -> dict[str, Entry]:
    """Entries of several presets of one module; `rules` are one table, or several by the layout's name."""
    layouts = rules if isinstance(rules, Mapping) else {"": rules}
    return {name: Entry(module, config, layouts, settings) for name, settings in presets.items()}


@dataclasses.dataclass(frozen=True)
class Presets:
    """Entries by name, and the words with which errors speak of them."""

    kind: str  # 'teacher'
    entries: Mapping[str, Entry]
    how: str = "weights=FILE"  # where a person gives a file's path


def load(
    presets: Presets,
    name: str,
    weights: str | Path | Arrays | None = None,
    *,
    dtype: Any = None,
    sharding: Any = None,
    **settings: Any,
) -> nnx.Module:
    """A network with its pretrained weights.

    `weights`: upstream's file, a folder that jaxalign.convert made, or a mapping of arrays by upstream's names; None
    takes the file of an installed data package. `dtype` (also 'keep': the file's) and `sharding` as
    `mapping.load_state_dict`; `settings` are the fields of the network's config. Raises ValueError (unknown name or
    setting; a file that does not fit, with the first keys that differ and the preset that it would fit) and
    FileNotFoundError (says which file, where it is found, and what to do with it).
    """
    module = abstract(presets, name, **settings)
    if not isinstance(weights, Mapping):
        weights = find_file(presets, name, weights)
        if converted.is_converted(weights):
            module = abstract(presets, name, weights, **settings)
            return converted.read(weights, module, name=name, dtype=dtype, sharding=sharding)
    return load_upstream(presets, name, module, weights, dtype=dtype, sharding=sharding).module


class Loaded(NamedTuple):
    """What `load_upstream` found in a file."""

    module: nnx.Module
    layout: str  # key of Entry.layouts
    left_out: list[str]  # keys that the table says are no part of the network
    kept: Arrays  # what no leaf takes and the way back to PyTorch needs: `mapping.kept_arrays`


def load_upstream(
    presets: Presets, name: str, module: nnx.Module, weights: str | Path | Arrays, **options: Any
) -> Loaded:
    """The abstract `module` of network `name` with the weights of upstream's file; see `load`.

    `options` go to `mapping.load_state_dict`.
    """
    parts = [weights] if isinstance(weights, Mapping) else _parts(weights, files(name))
    _, _, arrays, layout = _match(presets.entries[name], module, parts)
    rules = presets.entries[name].layouts[layout]
    try:
        loaded = mapping.load_state_dict(module, arrays, rules, **options)
    except ValueError as error:
        hint = _lacking(name, weights) or _nearest(presets, weights, asked=name)
        raise ValueError(f"{presets.kind} {name}: {error}{hint}") from None
    known = mapping.upstream_shapes(module, rules)
    left_out = [key for key in arrays if key not in known]
    return Loaded(loaded, layout, left_out, mapping.kept_arrays(module, arrays, rules))


def abstract(presets: Presets, name: str, weights: str | Path | None = None, **settings: Any) -> nnx.Module:
    """The network with shapes for leaves, without memory. Raises as `load`.

    Of `weights` nothing is read but the settings that a converted folder notes; others need not be there.
    """
    if name not in presets.entries:
        near = difflib.get_close_matches(name, presets.entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(presets.entries)}"
        raise ValueError(f"{presets.kind} {name!r} is not known; {hint}")
    entry = presets.entries[name]
    if weights and converted.is_converted(weights):
        settings = converted.note(weights)["settings"] | settings
    if unknown := [setting for setting in settings if setting not in entry.known_settings]:
        has = ", ".join(entry.known_settings) or "none"
        raise ValueError(f"{presets.kind} {name}: no setting {unknown[0]!r}; it has {has}")
    config = entry.config(**(dict(entry.settings) | settings))
    return jax.eval_shape(lambda: entry.module(config, rngs=nnx.Rngs(0)))


def files(name: str) -> list[manifests.File]:
    """What third_party/ says of a network's files; the first is the one that is asked for."""
    return [file for file in manifests.files() if file.preset == name]


# ---- files in detail -----------------------------------------------------------------------------------------------


def find_file(presets: Presets, name: str, given: str | Path | None) -> Path:
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
        f"{presets.kind} {name}: {lacks}; it wants {file.name} of {file.project} ({file.license}), found at "
        f"{file.where}; then give its path ({presets.how}), or that of the folder which "
        f"`python -m jaxalign.convert {name} --weights FILE --out FOLDER` makes of it"
    )


class _Match(NamedTuple):
    fits: float  # how much of what the module wants is there in the right shape
    known: float  # how much of what is there the module wants, or its table says to leave out
    arrays: Arrays
    layout: str


def _match(entry: Entry, module: nnx.Module, parts: Sequence[Arrays]) -> _Match:
    """The part of a file and the table of names that agree best; of equals the first part."""
    found = []
    tables = {layout: mapping.upstream_shapes(module, rules) for layout, rules in entry.layouts.items()}
    for part in parts:
        for layout, wanted in tables.items():
            rules = entry.layouts[layout]
            fits = sum(key in part and tuple(part[key].shape) == spec.shape for key, spec in wanted.items())
            unknown = mismatch.unknown_keys(part, wanted, rules)
            found.append(_Match(fits / len(wanted), 1 - len(unknown) / max(1, len(part)), part, layout))
    return max(found, key=lambda match: match[:2])


def _parts(path: str | Path, known: Sequence[manifests.File]) -> list[Arrays]:
    """The parts of a weights file that may be meant: those under known keys, the whole, those with the most tensors;
    last come those whose names all begin with one word, without it.

    Somebody may have saved the part alone, or under another name, and safetensors have no parts. Raises as
    `weights.open_weights`.
    """
    if sniff.kind(path) not in sniff.TORCH:
        whole = weight_files.open_weights(path)
        beside = [Path(path).with_name(file.beside) for file in known if file.beside]
        second = next((other for other in beside if other.is_file() and other.name != Path(path).name), None)
        found = [whole] if second is None else [_together(whole, weight_files.open_weights(second)), whole]
        return _and_without_shared_words(found)
    found, first_error = [], None
    for key in dict.fromkeys([*(file.key for file in known), "", *torch_file.parts(path)[:4]]):
        try:
            found.append(weight_files.open_weights(path, key=key or None))
        except ValueError as error:
            first_error = first_error or error
    if not found:
        raise first_error
    return _and_without_shared_words(found)


def _and_without_shared_words(parts: list[LazyArrays]) -> list[LazyArrays]:
    return parts + [shorter for part in parts for shorter in part.without_shared_words()[1:]]


def _together(first: LazyArrays, second: LazyArrays) -> LazyArrays:
    views = {name: functools.partial(arrays.__getitem__, name) for arrays in (second, first) for name in arrays}
    return LazyArrays(views, first.source, first.release)


def _lacking(name: str, weights: str | Path | Arrays) -> str:
    """The end of an error message that names the file which should lie beside this one, where one is wanted."""
    if isinstance(weights, Mapping):
        return ""
    wanted = [file.beside for file in files(name) if file.beside and file.name == Path(weights).name]
    missing = [other for other in wanted if not Path(weights).with_name(other).is_file()]
    return f"; put {missing[0]}, which has the rest, into the same folder" if missing else ""


def _nearest(presets: Presets, weights: str | Path | Arrays, asked: str) -> str:
    """Which other preset a file would fit, as the end of an error message; every entry's shapes are looked at."""
    entries = presets.entries
    parts = [weights] if isinstance(weights, Mapping) else _parts(weights, manifests.files())
    best, how_well = "", (0.5, 0.0)  # less than half in common is no likeness
    for name in sorted(entries, key=lambda name: entries[name].config is not entries[asked].config):
        match = _match(entries[name], abstract(presets, name), parts)
        if match[:2] > how_well:
            best, how_well = name, match[:2]
        if how_well == (1, 1):  # most often another size of the same family, and these come first
            break
    if not best:
        return f"; nor is it another {presets.kind}'s: `python -m jaxalign.convert --list` names the file of each"
    if best == asked:
        return ""
    return f"; it looks like a file of {best} ({how_well[0]:.0%} of that one's keys are there in the same shape)"
