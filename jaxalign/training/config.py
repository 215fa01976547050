"""Reading a run's config: command line in, one validated plain tree out, and what makes two runs the same run."""

import difflib
import gc
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_collections
from absl import app, flags, logging

from jaxalign.alignment import methods
from jaxalign.models.attention import IMPLEMENTATIONS

# How the same thing is computed, and what a NaN means: what a run that ran out of memory, or into a NaN, must be able
# to change. The names of workdirs were made with them.
_HOW = {
    "remat": (False, True),
    "attention": ("auto", *IMPLEMENTATIONS),
    "on_nonfinite": ("stop", "skip"),
}
# What may change when a workdir is resumed: how long, how often, on which machines; never what is computed.
NOT_IDENTITY = ("steps", "checkpoint", "log_every", "sample_every", "eval_every", "mesh", "data.workers", *_HOW)

# Fields that older runs lack, and what they were.
_LATER = {"data.split": 1, "data.frame_rate": 25.0, "motion.kernel": 1, "motion.norm": False, "motion.unit": 1.0}

# Of a teacher: texts that may be left out. A command line says so with the word None.
_OPTIONAL_TEXTS = ("motion_head", "resize", "output")

TASKS = ("denoising", "motion_subspace")
METHODS = ("none", *methods.METHODS)
_CHOICES = {
    "precision": ("fp32", "bf16"),
    "codec.precision": ("fp32", "bf16"),
    "data.short": ("skip", "pad"),
    "objective": ("flow", "ddpm", "v"),
    "align.method": METHODS,
    "align.schedule": ("constant", "linear", "cosine", "cutoff", "similarity"),
    "align.grid": ("teacher", "student"),
    "align.fusion": ("concat", "heads"),
    "align.part": ("full", "spatial", "temporal"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "on_nonfinite": _HOW["on_nonfinite"],
}
_POSITIVE = [
    "batch_size",
    "steps",
    "model.patch_size",
    "data.num_frames",
    "data.height",
    "data.width",
    "text.tokens",
    "optimizer.grad_accum",
    "checkpoint.every",
    "checkpoint.keep",
    "log_every",
    "sample_every",
    "eval_every",
    "sample.steps",
    "sample.count",
]


def run_verb(main: Callable[[list[str]], int | None]) -> None:
    """`app.run` whose errors are one line on stderr and exit status 2; --traceback shows where they came from.

    Only what a person can mend is shortened: ValueError, KeyError of a config, OSError. Anything else is a defect
    of this program and keeps its traceback.
    """
    logging.set_verbosity(logging.WARNING)  # JAX and Orbax tell their own story at every step otherwise
    flags.DEFINE_bool("traceback", False, "Show the traceback of an error that is otherwise one line.")

    def guarded(argv):
        remember_compilations()
        try:
            status = main(argv) or 0
            # The last batches of decode workers lie in shared memory that JAX lets go of when rubbish is collected.
            # What frees it ends before the interpreter does; after that Python speaks of leaks.
            gc.collect()
            sys.exit(status)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            if flags.FLAGS.traceback:
                raise
            sys.exit(_fail(error))

    app.run(guarded, flags_parser=parse_flags)


def remember_compilations() -> None:
    """Keep compiled programs in the user's cache folder, so that a command compiles once a machine.

    JAX_COMPILATION_CACHE_DIR, if set, says where else.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxalign" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _fail(error: BaseException | str) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """What is left of argv once the flags are read; a mistake in them is one line and exit status 2."""
    try:
        left = values(argv)
        if "config" in values and values.config is not None:
            dict(values.config)  # a config file that cannot be read shows itself only when it is touched
        return left
    except (KeyError, AttributeError) as error:  # ml_collections, of a field that the config lacks
        sys.exit(_fail(_unknown_field(argv, str(error))))
    except (ImportError, OSError) as error:
        sys.exit(_fail(f"--config: cannot read the file: {error}"))
    except (flags.Error, ValueError, TypeError) as error:
        # ml_collections wraps an error of a config file in the text of its traceback
        inner = re.search(r"^flag --config=(.*?): Error whilst parsing config file:.*\n\w+: (.*)", str(error), re.S)
        text = f"{inner[1]}: {inner[2]}" if inner else re.sub(r"^flag --(config\.[\w.]+)=", r"\1 = ", str(error))
        sys.exit(_fail(text))


def _unknown_field(argv: list[str], text: str) -> str:
    name = re.search(r"'(\w+)'", text.replace("\\", ""))
    near = re.search(r'Did you mean "(\w+)"', text)
    given = next(
        (a[2:].split("=")[0] for a in argv if name and re.search(rf"\b{name[1]}\b", a.split("=")[0])), "config"
    )
    meant = given.replace(name[1], near[1]) if name and near else None
    return f"{given}: no such field" + (f"; did you mean {meant}?" if meant else "; --print_config lists them all")


def resolve(config: ml_collections.ConfigDict, *, without_source: bool = False) -> ml_collections.ConfigDict:
    """A validated, frozen-in-meaning copy: no alignment is one thing, however it was said.

    `align.method = 'none'` and `align.weight = 0` are the same run, so both become method none with weight 0 and
    nothing of the alignment reaches the compiled program. `without_source`: data.source may be empty still.

    Raises:
      ValueError: a field holds something that no run can have; the message names the field and the choices.
    """
    config = ml_collections.ConfigDict(_without_none(config.to_dict()))
    flat = flatten(config.to_dict())
    if missing := [field for field in (*_CHOICES, *_POSITIVE) if field not in flat]:
        raise ValueError(f"config.{missing[0]} is missing: another version of jaxalign made this config")
    # The sections in align.beside name some of the fields of align; which fields there are, alignments.py checks.
    beside = {k: _CHOICES.get(f"align.{k.split('.')[-1]}") for k in flat if k.startswith("align.beside.")}
    for field, choices in (_CHOICES | beside).items():
        if choices and flat[field] not in choices:
            near = difflib.get_close_matches(str(flat[field]), choices, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config.{field} = {flat[field]!r}: write one of {', '.join(choices)}{hint}")
    for field in _POSITIVE:
        if flat[field] < 1:
            raise ValueError(f"config.{field} = {flat[field]}: must be at least 1")
    if flat.get("task", TASKS[0]) not in TASKS:
        raise ValueError(f"config.task = {config.task!r}: write one of {', '.join(TASKS)}")
    if config.data.stride < 0:
        raise ValueError(f"config.data.stride = {config.data.stride}: write 0 (a clip spans its video) or more")
    if not 0 <= config.text.dropout < 1:
        raise ValueError(f"config.text.dropout = {config.text.dropout}: must lie in [0, 1)")
    if flat.get("init_from.source", "ema") not in ("ema", "raw"):
        raise ValueError(f"config.init_from.source = {config.init_from.source!r}: write one of ema, raw")
    if flat.get("lora.rank", 0) < 0:
        raise ValueError(f"config.lora.rank = {config.lora.rank}: write 0 (no adapters) or more")
    if config.align.weight < 0:
        raise ValueError(f"config.align.weight = {config.align.weight}: must not be negative (the loss is minimised)")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"config.ema_decay = {config.ema_decay}: must lie in [0, 1)")
    if config.batch_size % config.optimizer.grad_accum:
        raise ValueError(
            f"config.batch_size = {config.batch_size} does not divide by optimizer.grad_accum = "
            f"{config.optimizer.grad_accum}"
        )
    if not config.data.source and not without_source:
        raise ValueError("config.data.source is empty: write --config.data.source=FOLDER, a folder of videos")
    if config.align.method == "none" or config.align.weight == 0:
        config.align.update(method="none", weight=0.0)
        config.align.beside = ml_collections.ConfigDict()  # weight 0 switches off all there is to align
    return config


def _without_none(tree: Mapping) -> dict:
    """The tree with None in place of the word where a text is optional: a command line can only say the word."""
    said = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            value = _without_none(value)
        elif name in _OPTIONAL_TEXTS and value in ("None", "none"):
            value = None
        said[name] = value
    return said


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """Nested mapping -> {'a.b': leaf}."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, path + ".") if isinstance(value, Mapping) else {path: value})
    return flat


def identity(config: ml_collections.ConfigDict | Mapping) -> dict:
    """The flat fields that make a run what it is; JSON types only, so that a stored one compares equal."""
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    flat = flatten(tree)
    # Without an alignment its settings and its teacher's are read by nothing; likewise LoRA's and a start's.
    unread = ("align", "teacher") if flat["align.method"] == "none" else ()
    unread += () if flat.get("lora.rank") else ("lora",)
    unread += () if flat.get("init_from.path") else ("init_from",)
    if flat.get("task", TASKS[0]) == TASKS[0]:
        unread += ("task", "motion")
    else:
        unread = tuple(name for name in unread if name != "teacher")
    kept = {k: v for k, v in flat.items() if not any(k == n or k.startswith(n + ".") for n in NOT_IDENTITY + unread)}
    # A run of before there were motion heads, or a choice of lists and rates, names none.
    kept = {k: v for k, v in kept.items() if not (v is None and k.endswith("teacher.motion_head"))}
    kept = {k: v for k, v in kept.items() if v != _LATER.get(k, ...)}
    return json.loads(json.dumps(kept))


def default_workdir(config: ml_collections.ConfigDict, name: str) -> Path:
    """runs/<config>-<scale>-<hash>: the same command finds its own workdir again.

    So does one that computes the same thing in another way: where its own name is free and that run is there.
    """
    same, flat = identity(config), flatten(config.to_dict())

    def named(how: Mapping) -> Path:
        digest = hashlib.sha256(json.dumps(same | how, sort_keys=True).encode()).hexdigest()[:8]
        return Path("runs") / f"{name}-{config.scale}-{digest}"

    own = named({field: flat[field] for field in _HOW})
    others = (named(dict(zip(_HOW, values, strict=True))) for values in itertools.product(*_HOW.values()))
    return next((path for path in (own, *others) if (path / "config.json").is_file()), own)


def compare(stored: Mapping, config: ml_collections.ConfigDict) -> list[str]:
    """What changed since `stored` was written and is allowed to, as printable lines.

    Raises:
      ValueError: the workdir belongs to another run (the differing fields are listed), or `steps` changed under a
        schedule that spans the run, which would give a third run that is neither of the two.
    """
    old, new = identity(stored), identity(config)
    differing = sorted(k for k in old.keys() | new.keys() if old.get(k, "(absent)") != new.get(k, "(absent)"))
    if differing:
        shown = "; ".join(
            f"{k}: {old.get(k, '(absent)')!r} there, {new.get(k, '(absent)')!r} here" for k in differing[:8]
        )
        more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise ValueError(
            f"the workdir belongs to another config ({shown}{more}): give another --workdir, or none to get one"
        )
    old_steps = stored["steps"]
    if old_steps != config.steps and spans_the_run(config):
        raise ValueError(
            f"config.steps was {old_steps} here and is now {config.steps}, but a schedule of this run spans all its "
            "steps: keep the number, or give another --workdir for a run of its own"
        )
    flat_old, flat_new = flatten(stored), flatten(config.to_dict())
    return [
        f"config.{k}: {flat_old.get(k)!r} -> {flat_new.get(k)!r}"
        for k in sorted(flat_new)
        if json.dumps(flat_old.get(k)) != json.dumps(flat_new.get(k))
    ]


def spans_the_run(config: ml_collections.ConfigDict) -> bool:
    """Whether a learning-rate or alignment schedule is stretched over config.steps."""
    align = config.align
    every = [align, *({**align, **changes} for changes in align.beside.values())]
    stretched = any(a["schedule"] in ("linear", "cosine", "cutoff") and not a["schedule_steps"] for a in every)
    return config.optimizer.schedule != "constant" or (align.method != "none" and stretched)
