"""Weights in and out of PyTorch: teachers and the networks of the scores by name, and the students of runs.

    python -m jaxalign.convert --list                                     which files there are, and where
    python -m jaxalign.convert dinov2_b --weights FILE --out FOLDER       upstream's file -> sharded arrays (Orbax)
    python -m jaxalign.convert dinov2_b --weights FOLDER --out DIR --to torch     -> DIR/dinov2_b.safetensors
    python -m jaxalign.convert --workdir runs/... --out DIR --to torch    a run's student -> DIR/vdit.safetensors
    python -m jaxalign.convert --workdir runs/... --out DIR --to diffusers    -> a folder for CogVideoXPipeline
    python -m jaxalign.convert --workdir runs/... --out DIR --to lora     -> DIR/pytorch_lora_weights.safetensors

FILE is a .pth, .pt, .bin, .safetensors or .safetensors.index.json of upstream. What goes in as FILE comes out with
`--to torch` bit for bit, under upstream's names. The converted folder, which is read only while its digests are right,
is given where a file is: `teachers.load(name, FOLDER)`, `--config.teacher.weights=FOLDER`. Torch is needed for nothing
of this. The model is in memory once, and beyond it about one layer; outputs get their names when whole.
"""

import difflib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from jaxalign import teachers
from jaxalign.interop import converted, diffusers_folder, lora_file, manifests, mapping, safetensors_file
from jaxalign.interop.dtypes import is_floating
from jaxalign.metrics import networks
from jaxalign.models import cogvideox_folder, lora
from jaxalign.training import config as config_lib
from jaxalign.training import contents, init_from, restore, setup, subspaces, trained
from jaxalign.training import published as published_lib
from jaxalign.training.data_settings import classes_of

DTYPES = {"keep": "keep", "fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


def to_orbax(name: str, weights: str | Path | None, out: str | Path, *, dtype: str = "keep") -> Path:
    """Upstream's file of teacher or feature network `name` as a folder of sharded arrays; returns it.

    `dtype`: 'fp32', 'bf16' or 'keep', what the file has. Raises ValueError and OSError, one line, as `teachers.load`
    and `converted.write`.
    """
    folder = converted.check_free(out)
    module, layout, settings, kept = _network(name, weights, dtype)
    source = Path(weights).name if weights else _home(name).files(name)[0].name
    print(f"writing {folder}", flush=True)
    return converted.write(folder, module, kept=kept, name=name, source=source, layout=layout, settings=settings)


def to_torch(name: str, weights: str | Path | None, out: str | Path, *, dtype: str = "keep") -> Path:
    """A converted folder, or a file, of network `name` as OUT/NAME.safetensors in upstream's names; returns the file.

    Raises as `to_orbax`; FileExistsError for a file that is there.
    """
    target = _free_file(Path(out) / f"{name}.safetensors")
    if weights is not None and converted.is_converted(weights):
        note = converted.note(weights)
        module = converted.read_lazily(weights, _home(name).abstract(name, **note["settings"]), name=name)
        layout, kept = note["layout"], converted.kept(weights)
    else:
        module, layout, _, kept = _network(name, weights, dtype)
    rules = {**teachers.TEACHERS, **networks.NETWORKS}[name].layouts[layout]
    return _write_torch(target, module, rules, {"network": name}, dtype, kept)


def student_to_torch(path: str | Path, out: str | Path, *, weights: str = "ema", dtype: str = "keep") -> Path:
    """The student of a run as OUT/MODEL.safetensors in its upstream's names (vdit: Latte's); returns the file.

    `path` is a workdir (its newest whole checkpoint) or the folder of one checkpoint; `weights` is 'ema', the averaged
    student, or 'raw', the last one. Heads of an alignment are no part of the student; adapters are merged into their
    base. Raises FileNotFoundError without a whole checkpoint, ValueError for a run of another task than denoising.
    """
    saved = _open_saved(path, weights)
    target = _free_file(Path(out) / f"{saved.config.model.name}.safetensors")
    return _write_torch(target, _whole(saved, dtype), saved.rules, saved.notes, dtype)


def student_to_lora(path: str | Path, out: str | Path, *, weights: str = "ema", dtype: str = "keep") -> Path:
    """The adapters of a LoRA run as OUT/pytorch_lora_weights.safetensors, which diffusers' `load_lora_weights` takes.

    Raises as `student_to_torch`; ValueError for a run that trained its whole student.
    """
    saved = _open_saved(path, weights)
    if saved.run.task.lora is None:
        raise ValueError(f"{path}: that run trained the whole student (lora.rank = 0); write --to torch or diffusers")
    target = _free_file(Path(out) / lora_file.NAME)
    settings = dict(rank=saved.run.task.lora.rank, alpha=saved.run.task.lora.alpha)
    cast = None if dtype == "keep" else DTYPES[dtype]
    return lora_file.write(target, saved.trained, saved.rules, **settings, dtype=cast)


def student_to_diffusers(
    path: str | Path,
    out: str | Path,
    *,
    weights: str = "ema",
    dtype: str = "keep",
    published: str | Path | None = None,
    link: bool = False,
    shard: int = diffusers_folder.SHARD,
) -> Path:
    """The published folder with the student of a run as its transformer, for `CogVideoXPipeline.from_pretrained`.

    published: where the other parts come from; None: the folder that the run's codec.weights or init_from.path names,
    of both the one that the run was trained with.
    `link`: symbolic links to them. `shard`: bytes of a weights file. Raises as `student_to_torch`, ValueError for a
    student that diffusers has no folder for or whose training the other parts contradict, FileNotFoundError without a
    whole published one.
    """
    saved = _open_saved(path, weights)
    name = saved.config.model.name
    if name != "cogvideox":
        raise ValueError(f"diffusers has no folder for {name}; write --to torch, which has its upstream's names")
    converted.check_free(out)
    folder = _published(saved, published)
    about = folder / "transformer" / "config.json"
    upstream = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else None
    config = cogvideox_folder.upstream_from(saved.run.model_config, upstream)
    module = _whole(saved, dtype)
    cast = None if dtype == "keep" else DTYPES[dtype]
    shapes = mapping.upstream_shapes(module, saved.rules, dtype=cast)
    with Progress(f"writing {out}", sum(int(np.prod(spec.shape)) for spec in shapes.values())) as progress:
        arrays = _counted(mapping.upstream_arrays(module, saved.rules, dtype=cast), progress)
        options = dict(link=link, shard=shard)
        return diffusers_folder.write(out, folder, "transformer", config, shapes, arrays, **options)


class _Saved(NamedTuple):
    """One checkpoint of a run: what was trained of its student, as it was saved."""

    config: Any
    run: setup.Run
    trained: Any  # the student, or its adapters
    rules: Sequence
    notes: dict[str, str]


def _open_saved(path: str | Path, weights: str) -> _Saved:
    if weights not in ("ema", "raw"):
        raise ValueError(f"--weights {weights}: for a run write ema (the averaged student) or raw (the last one)")
    config = trained.read_config(path)
    if subspaces.is_subspace(config):
        raise ValueError(
            f"{path} is a run of task {subspaces.TASK}, which has no student: what it trained lies in "
            f"{trained.workdir_of(path) / 'motion_head'}, for --config.teacher.motion_head"
        )
    folder = restore.find_checkpoint(path)
    source = "ema" if weights == "ema" else "trainable.model"
    config.align.update(method="none", weight=0.0)  # no teacher is needed to write the student
    config = config_lib.resolve(config)
    classes = _num_classes(folder, source)
    if config.get("lora", {}).get("rank") and config.model.num_classes == -1:  # the table is the base's
        classes = len(classes_of(config))
    run = setup.build(config, num_classes=classes, abstract=True)
    metadata = restore.read_metadata(folder)
    if run.task.lora is not None:
        init_from.check_base(metadata["extra"].get("base"), init_from.fingerprint(config, run), str(path))
    abstract = jax.eval_shape(run.init, jax.random.key(0))["model"]
    module, _ = restore.load_params(folder, abstract, source=source)
    notes = {"network": config.model.name, "weights": weights, "step": str(metadata["step"])}
    return _Saved(config, run, module, run.student.weight_rules(run.model_config), notes)


def _whole(saved: _Saved, dtype: str) -> Any:
    """The student: as it was trained, or its adapters merged into their base, read in the dtype that is wanted."""
    run = saved.run
    if run.task.lora is None:
        return saved.trained
    cast = None if dtype == "keep" else DTYPES[dtype]
    base = init_from.base(saved.config, run.student, run.model_config, dtype=cast)
    return lora.merge(base, saved.trained, run.task.lora.scale)


def _published(saved: _Saved, given: str | Path | None) -> Path:
    """The whole published folder that a run names, or that was given, of parts that the run was trained with.

    Raises as `diffusers_folder.check` and `_refuse_others_parts`.
    """
    config = saved.config
    named = [path for path in (config.codec.weights, config.get("init_from", {}).get("path")) if path]
    problems, contradictions = [], []
    for candidate in [given] if given else [place for path in named for place in (path, Path(path).parent)]:
        try:
            folder = diffusers_folder.check(candidate, "transformer", cogvideox_folder.CLASS)
        except (ValueError, OSError) as error:
            problems.append(error)
            continue
        try:
            _refuse_others_parts(saved, folder)
            return folder
        except ValueError as error:
            contradictions.append(error)
    if contradictions or given:
        raise [*contradictions, *problems][0]
    first = str(problems[0]) if problems else "the run names no published folder, and the other parts are its"
    raise FileNotFoundError(f"{first}; or write --published FOLDER")


def _refuse_others_parts(saved: _Saved, folder: Path) -> None:
    """ValueError unless the folder's scheduler/ is the process that a student was trained for and its vae/ the codec:
    the pipeline would draw noise, or other colours, and say nothing."""
    if differ := published_lib.other_process(folder, saved.run.task.process):
        remedy = (
            "write --published FOLDER, a copy of it with the run's numbers in scheduler/scheduler_config.json"
            if saved.config.objective == "v"
            else "no folder of CogVideoXPipeline is of the run's; write --to torch"
        )
        raise ValueError(f"{folder}: its scheduler/ says {differ}: {remedy}")
    if differ := _other_codec(saved, folder):
        raise ValueError(
            f"{folder}: its vae/ {differ}: write --published FOLDER with the vae/ that the run was trained with, or "
            "--to torch"
        )


def _other_codec(saved: _Saved, folder: Path) -> str:
    """How a folder's vae/ and the codec of a run differ, in words with both; '' where they are one."""
    weights = saved.config.codec.weights
    if differ := published_lib.other_codec(folder, saved.run.frozen["codec"]):
        return differ
    if not weights or not Path(weights).is_dir():
        return ""
    there, here = (contents.weights_identity(published_lib.vae_weights(path)) for path in (folder, weights))
    return "" if there == here else f"has other weights ({there}) than the run's codec.weights = {weights} ({here})"


def _num_classes(folder: Path, source: str) -> int:
    """How many classes a saved student has: the rows of its label table but the last, the null label."""
    shapes = {name: shape for name, (_, shape) in restore.read_metadata(folder)["leaves"].items()}
    rows = shapes.get(f"{source}.y_embedder.embedding_table.embedding", [1])[0]
    return rows - 1


def _home(name: str) -> Any:
    """Who knows the network: `jaxalign.teachers` or `jaxalign.metrics.networks`. Raises ValueError if neither does."""
    for home, table in ((teachers, teachers.TEACHERS), (networks, networks.NETWORKS)):
        if name in table:
            return home
    near = difflib.get_close_matches(name, [*teachers.TEACHERS, *networks.NETWORKS], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "--list shows what there is"
    raise ValueError(f"network {name!r} is not known; {hint}")


def _network(name: str, weights: str | Path | None, dtype: str) -> tuple[Any, str, dict[str, Any], mapping.Arrays]:
    """(module, layout, settings, what no leaf takes) of a file or a converted folder, read with a progress bar."""
    home = _home(name)
    if weights is not None and converted.is_converted(weights):
        note = converted.note(weights)
        module = home.load(name, weights, dtype=DTYPES[dtype])
        return module, note["layout"], note["settings"], converted.kept(weights)
    path = home.find_file(name, weights)
    settings = next((dict(file.settings) for file in home.files(name) if file.name == path.name), {})
    module = home.abstract(name, **settings)
    total = sum(leaf.size for leaf in jax.tree.leaves(module))
    with Progress(f"reading {path}", total) as progress:
        found = home.load_upstream(name, module, path, dtype=DTYPES[dtype], progress=progress)
    if found.left_out:
        some = ", ".join(found.left_out[:3]) + (", ..." if len(found.left_out) > 3 else "")
        print(f"left out, no part of the network: {len(found.left_out)} keys ({some})")
    return found.module, found.layout, settings, found.kept


def _free_file(path: Path) -> Path:
    if path.exists():
        raise FileExistsError(f"{path} is there already; give --out another folder, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_torch(
    target: Path,
    module: Any,
    rules: Sequence,
    notes: Mapping[str, str],
    dtype: str,
    kept: mapping.Arrays | None = None,
) -> Path:
    floating = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(module) if is_floating(leaf.dtype)}
    # Tables that the file has and the module computes go out in the weights' own dtype, as they came in.
    own = floating.pop() if len(floating) == 1 else None
    cast = own if dtype == "keep" else DTYPES[dtype]
    shapes = mapping.upstream_shapes(module, rules, dtype=cast, kept=kept)
    total = sum(int(np.prod(spec.shape)) for spec in shapes.values())
    with Progress(f"writing {target}", total) as progress:
        arrays = _counted(mapping.upstream_arrays(module, rules, dtype=cast, kept=kept), progress)
        safetensors_file.write_stream(target, shapes, arrays, notes=notes)
    return target


def _counted(arrays: Iterable[tuple[str, np.ndarray]], progress: Callable[[int], None]):
    for name, array in arrays:
        yield name, array
        progress(array.size)


class Progress:
    """A bar on a terminal, one line every tenth elsewhere; call it with how many numbers were just done."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._bar = None
        if sys.stderr.isatty():
            # Some terminals (in containers) say that they have no columns and no rows, and tqdm believes it.
            sized = shutil.get_terminal_size((0, 0)).columns > 0
            width = {"dynamic_ncols": True} if sized else {"ncols": 100, "nrows": 20}
            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=total, desc=what, bar_format=form, file=sys.stderr, **width)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, count: int) -> None:
        before, self._done = self._done, self._done + count
        if self._bar is not None:
            self._bar.update(count)
        elif (tenths := 10 * self._done // self._total) > 10 * before // self._total:
            print(f"{self._what}: {10 * tenths}%", flush=True)


# ---- the table -----------------------------------------------------------------------------------------------------


def table(files: Sequence[manifests.File]) -> str:
    """NAME, file, licence, parameters and where, one line a file."""
    head = ("NAME", "file", "licence", "parameters", "where")
    rows = [(f.preset, f.name, f.license, f"{f.parameters / 1e6:.1f} M", f.where) for f in files]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(4)]
    lines = []
    for *cells, where in (head, *rows):
        padded = [
            cell.rjust(w) if column == 3 else cell.ljust(w)
            for column, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join((*padded, where)).rstrip())
    return "\n".join(lines)


FLAGS = flags.FLAGS


def _define_flags():
    flags.DEFINE_bool("list", False, "Print the networks that are known, their files, and where to get them.")
    flags.DEFINE_string(
        "weights", None, "Upstream's file, or a converted folder. With --workdir: ema (default) or raw."
    )
    flags.DEFINE_string("workdir", None, "A run (or one checkpoint of it) whose student is converted.")
    flags.DEFINE_string("out", None, "The folder to write.")
    flags.DEFINE_enum(
        "to",
        "orbax",
        ["orbax", "torch", "diffusers", "lora"],
        "orbax: a folder of sharded arrays; torch: safetensors. Of a run also diffusers: a whole folder with its "
        "student, and lora: its adapters as load_lora_weights takes them.",
    )
    flags.DEFINE_string(
        "published", None, "--to diffusers: where the other parts come from; default: the folder that the run names."
    )
    flags.DEFINE_bool("link", False, "--to diffusers: symbolic links to the other parts in place of copies.")
    flags.DEFINE_enum("dtype", "keep", list(DTYPES), "Of the floating numbers; keep: what the file has.")


def main(argv: list[str]) -> None:
    """The verb's command line."""
    if FLAGS.list:
        print(table(manifests.files()))
        return
    names = argv[1:]
    if not FLAGS.out:
        raise ValueError("write where to with --out FOLDER (or --list to see which networks are known)")
    if (len(names) != 1) if FLAGS.workdir is None else names:
        raise ValueError("write one network's NAME (--list shows them), or --workdir RUN and no name")
    start = time.monotonic()
    if FLAGS.workdir is not None:
        options = dict(weights=FLAGS.weights or "ema", dtype=FLAGS.dtype)
        if FLAGS.to == "orbax":
            raise ValueError("a run's checkpoint is Orbax already; write --to torch, --to diffusers or --to lora")
        if FLAGS.to == "diffusers":
            options |= dict(published=FLAGS.published, link=FLAGS.link)
        of_run = {"torch": student_to_torch, "diffusers": student_to_diffusers, "lora": student_to_lora}
        written = of_run[FLAGS.to](FLAGS.workdir, FLAGS.out, **options)
    elif FLAGS.to not in ("orbax", "torch"):
        raise ValueError(f"--to {FLAGS.to} is of a run: write --workdir RUN and no name, or --to orbax or torch")
    else:
        convert = to_torch if FLAGS.to == "torch" else to_orbax
        written = convert(names[0], FLAGS.weights, FLAGS.out, dtype=FLAGS.dtype)
    size = sum(path.stat().st_size for path in (written.rglob("*") if written.is_dir() else [written]))
    print(f"{written}: {size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    _define_flags()
    config_lib.run_verb(main)
