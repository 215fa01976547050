"""Weights that a run starts from: a published folder or file, another run, what convert wrote. Read once, at step 0.

    config.init_from.path     a diffusers folder, its transformer/, a weights file in upstream's names (diffusers for
                              cogvideox, Latte for vdit), a workdir or one checkpoint of it, a folder of convert
    config.init_from.pattern  a regex found in the dotted names of the leaves that are taken; the others stay fresh
    config.init_from.source   ema | raw: which student of a run, or of a training file with both

Every leaf goes from the file into its shards and its own dtype. A resumed run does not come here. With LoRA the path
names the frozen base instead, which every start reads; its `fingerprint` stands in the checkpoints.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxalign.codecs import folder as published
from jaxalign.interop import lora_file, mapping, mismatch, sealed, sniff, torch_file
from jaxalign.interop.arrays import LazyArrays
from jaxalign.interop.rules import Fixed, Rule
from jaxalign.interop.weights import open_weights
from jaxalign.models import cogvideox_folder
from jaxalign.training import published as whole_folder
from jaxalign.training import restore
from jaxalign.training.mesh import named_leaves

PARTS = {"ema": ("ema", "model", "state_dict", "module"), "raw": ("model", "state_dict", "module", "ema")}


class Origin(NamedTuple):
    """Somewhere that weights lie: what it has of each leaf, and how to read some of them."""

    where: str  # the path and what was found there, for people
    problem: Callable[[str, Any], str]  # (leaf's name, leaf or shape) -> why it cannot come from there; '': it can
    whole: Callable[[Any], list[str]]  # a student -> what else is wrong there, if all of it is to be that student
    read: Callable[..., dict[str, Any]]  # ({name: ShapeDtypeStruct}, everything=, keep=) -> {name: array}
    digest: Callable[[], str]


# ---- what the rest of the package asks ----------------------------------------------------------------------------


def check(config: Any, run: Any) -> None:
    """Everything that `begin` would find wrong, before anything is trained or allocated. Raises as it."""
    model = jax.eval_shape(run.init, jax.random.key(0))["model"]
    if config.get("init_from", {}).get("path") and run.task.lora is None:
        _open_checked(config, run, model)
    _adapters(config, run, model)


def begin(config: Any, run: Any, state: Any, *, say: Callable[[str], None] = print) -> Any:
    """The state at step 0 with the weights that config names in it; the average is a copy of the student.

    Raises ValueError and OSError, one line, for weights that are not there or do not fit.
    """
    if line := note(config, run):
        say(line)
    model = state.trainable["model"]
    if (adapters := _adapters(config, run, model)) is not None:
        say(f"adapters start from {config.lora.weights}")
        model = adapters
    elif run.task.lora is None and config.get("init_from", {}).get("path"):
        model = _filled(config, run, model, say)
    else:
        return state
    for old in jax.tree.leaves(state.ema):
        old.delete()
    trainable = {**state.trainable, "model": model}
    return dataclasses.replace(state, trainable=trainable, ema=jax.tree.map(jnp.copy, model))


def note(config: Any, run: Any) -> str:
    """A line where a published folder was trained with another process than this run's (it may be intended), or ''."""
    path = Path(config.get("init_from", {}).get("path") or "")
    folder = path.parent if path.name == "transformer" else path
    if not path.name or not (folder / "scheduler" / "scheduler_config.json").is_file():
        return ""
    try:
        differ = whole_folder.other_process(folder, run.task.process)
    except ValueError as error:
        return f"note: {error}"
    return differ and f"note: by its scheduler/, {folder} was trained with {differ}"


def base(config: Any, student: Any, model_config: Any, place: Callable[[Any], Any] | None = None, dtype: Any = None):
    """The frozen student under a run's adapters, in `dtype` (None: the file's), cut as `place(abstract)` says.

    place: abstract student -> the same tree of shardings. Raises ValueError, also where no path is named, and OSError.
    """
    given = config.get("init_from", {})
    if not given.get("path"):
        raise ValueError(
            "config.lora.rank > 0: adapters need a base; write --config.init_from.path=FOLDER (or a file, a checkpoint)"
        )
    if given.pattern:
        raise ValueError("config.init_from.pattern: with LoRA init_from names the base, which is taken whole")
    if (Path(given.path) / "checkpoints").is_dir():
        newest = restore.find_checkpoint(given.path)
        raise ValueError(
            f"config.init_from.path = {given.path}: a run may get newer checkpoints, and LoRA wants the same base at "
            f"every start; name one: {newest}"
        )
    abstract = jax.eval_shape(lambda: student.model(model_config, rngs=nnx.Rngs(0)))
    origin = _open_fitting(config, student, model_config, abstract, named_leaves(abstract))
    where = named_leaves(place(abstract)) if place is not None else {}
    specs = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=where.get(name))
        for name, leaf in named_leaves(abstract).items()
    }
    found = origin.read(specs, everything=True, keep=dtype is None)
    return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in specs])


def fingerprint(config: Any, run: Any) -> dict[str, str]:
    """{'path', 'digest'} of a run's base.

    The digest is over a checkpoint's own manifest of digests, or else over the names, shapes and number formats of all
    tensors and the first and last 4 KiB of each: another base is noticed, be it a later step of the same training, for
    the price of opening the file. A flipped bit in the middle of a tensor is not.
    """
    origin = _open(config, run.student, run.model_config)
    return {"path": str(Path(config.init_from.path).absolute()), "digest": origin.digest()}


def check_base(stored: Mapping[str, str] | None, now: Mapping[str, str] | None, where: str) -> None:
    """ValueError if the adapters of a checkpoint were trained upon another base than the one that is there now."""
    if stored and now and stored["digest"] != now["digest"]:
        raise ValueError(
            f"{where}: its adapters were trained upon the base {stored['path']} (digest {stored['digest'][:12]}), but "
            f"{now['path']} is another one now (digest {now['digest'][:12]}): put the first one back"
        )


# ---- filling -------------------------------------------------------------------------------------------------------


def _adapters(config, run, model):
    """The adapters of the file config.lora.weights, placed as the fresh ones are; None where none is named."""
    if run.task.lora is None or not config.lora.get("weights"):
        return None
    leaves = named_leaves(model)
    rules = run.student.weight_rules(run.model_config)
    where = lambda name, shape: getattr(leaves[name], "sharding", None)  # noqa: E731
    try:
        return lora_file.load(config.lora.weights, model, rules, alpha=run.task.lora.alpha, sharding=where)
    except (ValueError, OSError) as error:
        raise type(error)(f"config.lora.weights: {error}") from None


def _filled(config, run, model, say):
    """The fresh student with the leaves that config takes from elsewhere; the fresh ones go before those come."""
    origin, taken = _open_checked(config, run, model)
    leaves = named_leaves(model)
    specs = {
        name: jax.ShapeDtypeStruct(leaves[name].shape, leaves[name].dtype, sharding=leaves[name].sharding)
        for name in taken
    }
    for name in taken:
        leaves[name].delete()
    leaves |= origin.read(specs, everything=not config.init_from.pattern)
    numbers = sum(leaves[name].size for name in taken)
    line = f"student from {origin.where}: {len(taken)} of {len(leaves)} leaves, {numbers:,} parameters"
    if fresh := Counter(name.split(".")[0] for name in leaves if name not in taken):
        line += "; fresh: " + ", ".join(f"{count} of {part}" for part, count in fresh.items())
    say(line)
    return jax.tree.unflatten(jax.tree.structure(model), list(leaves.values()))


def _open_checked(config, run, model) -> tuple[Origin, list[str]]:
    """(where the weights lie, the names of the leaves that are taken), everything compared."""
    leaves = named_leaves(model)
    pattern = config.init_from.pattern
    try:
        taken = {name: leaf for name, leaf in leaves.items() if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"config.init_from.pattern = {pattern!r} is no regular expression: {error}") from None
    if not taken:
        raise ValueError(
            f"config.init_from.pattern = {pattern!r} finds none of the {len(leaves)} leaves, e.g. {_few(list(leaves))}"
        )
    return _open_fitting(config, run.student, run.model_config, model, taken), list(taken)


def _open_fitting(config, student, model_config, model, taken: dict[str, Any]) -> Origin:
    """The origin, once every leaf of `taken` was found there in its shape; ValueError says what to do otherwise."""
    origin = _open(config, student, model_config)
    found = {name: origin.problem(name, leaf) for name, leaf in taken.items()}
    unfit = [name for name, problem in found.items() if problem]
    problems = [found[name] for name in unfit]
    problems += [] if config.init_from.pattern else origin.whole(model)
    if not problems:
        return origin
    raise ValueError(
        f"config.init_from.path = {origin.where}: does not fit {config.model.name} {config.model.preset}: "
        f"{'; '.join(problems[:4])}{f'; and {len(problems) - 4} more' if len(problems) > 4 else ''}"
        f"{_remedy(config, origin, student, model_config, unfit, taken)}"
    )


def _remedy(config, origin: Origin, student, model_config, unfit: list[str], taken) -> str:
    """The end of an error: the preset that would fit better, or the regex that leaves out what does not fit."""
    best, most = "", 1 - len(unfit) / len(taken)
    for preset, settings in student.presets.items():
        if (other := _of_preset(student, model_config, settings)) is None:
            continue
        leaves = named_leaves(other)
        fits = sum(not origin.problem(name, leaf) for name, leaf in leaves.items()) / len(leaves)
        fits -= 1e-3 * bool(origin.whole(other))
        if fits > most + 1e-6:
            best, most = preset, fits
    if best and best != config.model.preset and most > 0.5:
        return f"; it looks like model.preset = {best!r} ({most:.0%} of that one's leaves fit)"
    if 0 < len(unfit) <= 6 and len(unfit) < len(taken):
        names = "|".join(re.escape(name) for name in unfit)
        return f"; to leave these fresh write --config.init_from.pattern='^(?!({names})$)'"
    return "" if unfit else "; to take the leaves all the same write --config.init_from.pattern=."


def _of_preset(student, model_config, settings: Mapping[str, Any]) -> Any:
    """The abstract student of another preset at this run's sizes; None where they do not go together."""
    of_presets = {name for preset in student.presets.values() for name in preset}
    own = {f.name: getattr(model_config, f.name) for f in dataclasses.fields(model_config) if f.name not in of_presets}
    own["num_frames"] *= settings.get("patch_size_t") or 1  # a number that it divides; no leaf depends on it
    try:
        config = student.config(**(own | dict(settings)))
        return jax.eval_shape(lambda: student.model(config, rngs=nnx.Rngs(0)))
    except ValueError:
        return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---- the kinds of origin -------------------------------------------------------------------------------------------


def _open(config, student, model_config) -> Origin:
    path, source = Path(config.init_from.path), config.init_from.source
    if not path.exists():
        raise FileNotFoundError(f"config.init_from.path = {path}: there is no such file or folder")
    if (path / "checkpoints").is_dir() or path.name == "checkpoints" or (path / restore.METADATA).is_file():
        return _of_run(path, source)
    arrays = _open_arrays(path, source, config, student, model_config)
    return _of_arrays(str(path), arrays, student.weight_rules(model_config))


def _of_run(path: Path, source: str) -> Origin:
    folder = restore.find_checkpoint(path)
    part = {"ema": "ema", "raw": "trainable.model"}[source]
    stored = restore.read_metadata(folder)["leaves"]
    inside = {name.removeprefix(f"{part}."): leaf for name, leaf in stored.items() if name.startswith(f"{part}.")}
    if any(".lora_A." in name for name in inside):
        raise ValueError(
            f"config.init_from.path = {path}: that run trained adapters and its checkpoints lack the network; write it "
            f"out with `python -m jaxalign.convert --workdir {path} --to torch --out FOLDER` and give that folder"
        )

    def problem(name, leaf):
        if name not in inside:
            return f"{name} is not there"
        there, here = tuple(inside[name][1]), tuple(leaf.shape)
        return "" if there == here else f"{name} is {there} there and {here} here"

    def whole(model):
        here = named_leaves(model)
        extra = [name for name in inside if name not in here]
        return [f"nothing takes {_few(extra)}"] if extra else []

    def read(specs, *, everything, keep=False):
        del everything
        if keep:
            specs = {n: jax.ShapeDtypeStruct(s.shape, inside[n][0], sharding=s.sharding) for n, s in specs.items()}
        return restore.load_params(folder, specs, source=part)[0]

    def digest():
        return hashlib.sha256((folder / sealed.NAME).read_bytes()).hexdigest()

    return Origin(f"{folder} ({source})", problem, whole, read, digest)


def _of_arrays(where: str, arrays: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> Origin:
    tables = mapping.upstream_shapes({}, rules)  # what is computed here: it may lack, or be of another size
    of_leaves = [rule for rule in rules if not isinstance(rule, Fixed)]

    def problem(name, leaf):
        for key, spec in mapping.upstream_shapes({name: leaf}, of_leaves).items():
            if key not in arrays:
                return f"{key} is not there"
            if tuple(arrays[key].shape) != spec.shape:
                return f"{key} is {tuple(arrays[key].shape)} there and {spec.shape} here"
        return ""

    def whole(model):
        extra = mismatch.unknown_keys(arrays, mapping.upstream_shapes(model, rules), rules)
        wrong = [key for key, spec in tables.items() if key in arrays and tuple(arrays[key].shape) != spec.shape]
        wrong = [f"the table {key} is {tuple(arrays[key].shape)} there and {tables[key].shape} here" for key in wrong]
        return [f"nothing takes {_few(extra)}", *wrong] if extra else wrong

    def read(specs, *, everything, keep=False):
        found = arrays if everything else _Some(arrays, list(mapping.upstream_shapes(specs, of_leaves)))
        options = dict(dtype="keep" if keep else None, sharding=lambda name, shape: specs[name].sharding)
        return mapping.load_state_dict(specs, found, rules, **options)

    def digest():
        total = hashlib.sha256()
        for key in sorted(arrays):
            array = arrays[key]
            total.update(json.dumps([key, list(array.shape), str(array.dtype)]).encode())
            flat, few = array.reshape(-1), max(1, 4096 // array.dtype.itemsize)
            for piece in (flat[:few], flat[-few:]):
                total.update(np.ascontiguousarray(piece).tobytes())
        return total.hexdigest()

    return Origin(where, problem, whole, read, digest)


class _Some(Mapping):
    """Some keys of a lazy mapping, as lazy as it."""

    def __init__(self, arrays: Mapping[str, np.ndarray], names: Sequence[str]):
        self._arrays, self._names = arrays, dict.fromkeys(names)
        self.source = getattr(arrays, "source", None)
        self.release = getattr(arrays, "release", lambda: None)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open_arrays(path: Path, source: str, config, student, model_config) -> LazyArrays:
    """Lazy arrays in upstream's names of a folder or a file."""
    name = config.model.name
    names = functools.cache(lambda: _upstream_names(student, model_config))
    if path.is_dir() and (path / f"{name}.safetensors").is_file():  # what convert --to torch wrote
        path = path / f"{name}.safetensors"
    if path.is_dir():
        if name != "cogvideox":
            sniff.kind(path)  # raises: a folder, with what is in it
        upstream, arrays = published.read(path, "transformer", (cogvideox_folder.CLASS,))
        try:
            cogvideox_folder.check(upstream, model_config, student.presets)
        except ValueError as error:
            raise ValueError(f"config.init_from.path = {path}: {error}") from None
        return arrays.fitting(names)
    if sniff.kind(path) in (sniff.TORCH_ZIP, sniff.TORCH_LEGACY):
        return _open_part(path, source, names)
    return open_weights(path).fitting(names)


def _open_part(path: Path, source: str, names: Callable[[], Container[str]]) -> LazyArrays:
    """The part of a training file that `source` means; under a name that nobody knows, the only one that fits."""
    parts = torch_file.parts(path)
    key = next((part for part in PARTS[source] if part in parts), None)
    try:
        return open_weights(path, key=key).fitting(names)
    except ValueError:  # several
        found = [open_weights(path, key=part).fitting(names) for part in parts[:4]]
        found = [arrays for arrays in found if any(name in names() for name in arrays)]
        if len(found) != 1:
            raise
        return found[0]


def _upstream_names(student, model_config) -> Container[str]:
    model = jax.eval_shape(lambda: student.model(model_config, rngs=nnx.Rngs(0)))
    return mapping.upstream_shapes(model, student.weight_rules(model_config))
