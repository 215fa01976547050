"""Videos generated to be scored: as many as asked for, told what the real clips show, kept in the workdir in parts.

A killed run of this goes on at the first part that is not whole, and the videos are the same bit for bit: noise
belongs to a video's number, batches and parts are of fixed size. The student is loaded only if something is missing.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxalign.data import captions as captions_lib
from jaxalign.data import precomputed
from jaxalign.data.clips import Clip, Source
from jaxalign.diffusion import SAMPLERS
from jaxalign.interop import sealed
from jaxalign.metrics import parts, protocol
from jaxalign.metrics.protocol import Clips, Pace, of_source, part_size
from jaxalign.tasks.aligning import cast
from jaxalign.training import config as config_lib
from jaxalign.training import contents, prompts, setup, trained
from jaxalign.training.data_settings import classes_of, clip_settings
from jaxalign.training.evaluation import fixed_noise
from jaxalign.training.mesh import batch_sharding, make_mesh, replicate
from jaxalign.training.restore import find_checkpoint
from jaxalign.training.showing import to_uint8

UNALIGNED = {"align": {"method": "none"}}  # no teacher is loaded: sampling asks none


def of_run(
    workdir: str | Path,
    *,
    count: int,
    real: str = "",
    split: str = "held_out",
    seed: int = 0,
    steps: int = 50,
    sampler: str = "",
    guidance_scale: float = 1.0,
    weights: str = "ema",
    at_once: int = 8,
    say: Callable[[str], None] = print,
) -> tuple[Clips, Clips]:
    """(generated clips of a run, the real ones that they are compared with).

    `workdir` may be the folder of one of its checkpoints: that one is taken, not the newest. `real` is the source of
    the real clips (empty: the run's own); number k is generated of the class, or the caption, of real clip k, so both
    have the same proportions. `sampler` empty: the process's first (ddim or euler). Raises FileNotFoundError without a
    whole checkpoint, ValueError for a source that does not fit the run.
    """
    place, workdir = Path(workdir), trained.workdir_of(workdir)
    config = trained.read_config(workdir)
    if (task := config.get("task", "denoising")) != "denoising":
        raise ValueError(f"{workdir} is a run of task {task}, which generates no videos")
    own, told_by_text = config.copy_and_resolve_references(), setup.is_told_by_text(config)
    if real:
        config.data.source = real
        # The run's own CSV may be of its training videos alone.
        if real != own.data.source and captions_lib.beside_of(real).is_file():
            config.data.captions = ""
    elif precomputed.is_precomputed(config.data.source):
        raise ValueError(
            f"{config.data.source} is precomputed and holds no videos to compare with: give --real, the source that it "
            "was made from"
        )
    clip = Clip(**clip_settings(config))
    source = _opened(_resolved(config), real)
    of_real = of_source(source, clip, split=split, count=count, seed=seed, at_once=at_once)
    notes = _check_classes(own, source) if real and own.model.num_classes and not told_by_text else ()
    run = setup.build(_resolved(config), num_classes=len(source.classes), abstract=True, with_text=False)
    told = _told(run, source, of_real)
    fitting = [name for name, (kinds, _) in SAMPLERS.items() if isinstance(run.task.process, kinds)]
    if sampler and sampler not in fitting:
        raise ValueError(f"--sampler {sampler!r} does not fit the run's process; write {' or '.join(fitting)}")
    options = dict(sampler=sampler or fitting[0], steps=steps, guidance_scale=float(guidance_scale))
    checkpoint = find_checkpoint(place, say=say)
    mesh = make_mesh(devices=jax.local_devices())
    size = at_once + -at_once % mesh.size
    about = {
        "step": int(checkpoint.name),
        "checkpoint": sealed.identity(checkpoint),
        "weights": weights,
        "sampler": f"{options['sampler']}-{steps}",
        "guidance": guidance_scale,
        "n": count,
        "seed": seed,
        "told": "" if told is None else hashlib.sha256(np.ascontiguousarray(told).tobytes()).hexdigest()[:16],
        "at_once": size,
        "latents": contents.of_latents(config),
    }
    if run.task.text:
        about["prompts"] = contents.of_prompts(config)
    name = f"step{about['step']}-{weights}-{about['sampler']}-n{count}-seed{seed}"
    name += f"-guidance{guidance_scale:g}" * (guidance_scale != 1)
    folder = workdir / "generated" / name
    parts.claim(folder, about, what="videos", remedy="remove that folder, or give another --seed")
    part, pace = part_size(clip, size), Pace(count, "generated", say)
    if done := parts.there(folder, range(len(parts.spans(count, part)))):
        say(f"{min(done * part, count)} of {count} videos are in {folder} already")

    @functools.cache
    def drawer():
        return _drawer(workdir, checkpoint, weights, mesh, options, seed)

    def make(rows: range) -> dict[str, np.ndarray]:
        videos, draw = [], drawer()
        pace.start()  # real clips were measured before, and the student is loaded now
        for first in range(rows.start, rows.stop, size):
            numbers = np.arange(first, first + size) % count  # full batches only: one compilation
            videos.append(draw(first, size, None if told is None else told[numbers]))
            pace.did(min(size, count - first), min(first + size, count))
        return {"video": np.concatenate(videos)[: len(rows)]}

    def read(rows: range) -> np.ndarray:
        return parts.part(folder, rows.start // part, lambda: make(rows), say=say)["video"]

    usual = protocol.PAPER["sampler"] if options["sampler"] in ("ddim", "euler") else options["sampler"]
    differs = {"n": count, "sampler": usual, "steps": steps, "guidance": float(guidance_scale)} | protocol.looks(clip)
    captions = of_real.captions if run.task.text else ()
    told_as = dict(items=of_real.items, labels=of_real.labels, captions=captions, notes=notes)
    return Clips(workdir.name, count, of_real.shape, part, read, about, differs, folder=folder, **told_as), of_real


def _resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.update(UNALIGNED)
    return config_lib.resolve(config)


def _opened(config: ml_collections.ConfigDict, real: str) -> Source:
    """`prompts.open_told`; where captions of `real` are wanting, the error says where to put them."""
    try:
        return prompts.open_told(config)
    except (ValueError, FileNotFoundError) as error:
        problem, d = str(error).partition(";")[0], config.data
        of_the_run = d.captions and problem.startswith("data.captions=")
        if not real or not (of_the_run or "have no caption" in problem or ": no column" in problem):
            raise
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        columns = f"columns {d.video_column}, {d.caption_column}"
        raise kind(f"{problem}; put {captions_lib.FILE} ({columns}) into the folder of --real") from None


def _check_classes(config: ml_collections.ConfigDict, real: Source) -> tuple[str, ...]:
    """Notes. Raises ValueError unless the classes of `real` are those of a run's own source, by which it is told."""
    own, known = config.data.source, config.model.num_classes
    try:
        classes = classes_of(config)
    except (OSError, ValueError):  # the run was trained elsewhere: their number is all that can be compared
        gone = f"{own}, which the run was trained on, cannot be opened"
        if known == -1:
            raise ValueError(f"{gone}, and its classes are what the run is told by") from None
        if len(real.classes) != known:
            raise ValueError(f"{gone}, and --real {real.name} has {len(real.classes)} classes, not {known}") from None
        return (f"{gone}: names of classes are not compared with those of --real {real.name}",)
    if classes == real.classes:
        return ()
    differ = sorted(set(classes) ^ set(real.classes))
    raise ValueError(
        f"--real {real.name} has other classes than the run's own source {own}, which it is told by: "
        f"{len(real.classes)} and {len(classes)}, "
        + (f"{differ[0]!r} is in one of them only" if differ else "in another order")
    )


def _told(run: setup.Run, source: Source, real: Clips) -> np.ndarray | None:
    """What number k is told: the class or the caption's tokens of real clip k; None of an unconditional run."""
    if run.task.text:
        return np.stack([source.tokens[k] for k in real.items]).astype(np.int32)
    if not run.task.num_classes:
        return None
    labels = np.asarray(real.labels, np.int32)
    if labels.max() >= run.task.num_classes:
        raise ValueError(
            f"--real {source.name}: class {labels.max()} of its {len(source.classes)}, but the run knows "
            f"{run.task.num_classes}: give the source that it was trained on"
        )
    return labels


def _drawer(workdir: Path, checkpoint: Path, weights: str, mesh, options: dict[str, Any], seed: int) -> Callable:
    """(first, how many, told) -> videos uint8, on all local devices."""
    opened = trained.open_run(workdir, weights=weights, checkpoint=checkpoint, overrides=UNALIGNED)
    opened = trained.whole(opened)
    run, rows = opened.run, batch_sharding(mesh)
    # A student that is sampled from is read, never trained: the compute dtype will do.
    model = replicate(cast(opened.trainable["model"], run.task.dtype), mesh)
    frozen = replicate({k: v for k, v in run.frozen.items() if k in ("codec", "text", "null_prompt")}, mesh)
    sample = jax.jit(functools.partial(run.task.sample, **options))

    def draw(first: int, count: int, told: np.ndarray | None) -> np.ndarray:
        noise = jax.device_put(fixed_noise(run, first, count, seed), rows)
        told = None if told is None else jax.device_put(told, rows)
        return to_uint8(sample(model, frozen, noise, told, jax.random.fold_in(jax.random.key(seed), first)))

    return draw
