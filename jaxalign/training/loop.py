"""The training loop, top to bottom: what is run, where it stands, one step after the other, what a person sees."""

import dataclasses
import functools
import json
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
import optax

from jaxalign.data import pipeline
from jaxalign.data.clips import Clip, Source, short_items
from jaxalign.data.sources import open_source
from jaxalign.data.summary import summary as describe_source
from jaxalign.figures import curves
from jaxalign.figures.video import enlarge, grid
from jaxalign.tasks.aligning import init_gates, update_gates
from jaxalign.training import config as config_lib
from jaxalign.training import environment, evaluation, processes, setup, showing, tensorboard
from jaxalign.training.checkpoint import Checkpoints, check_writable
from jaxalign.training.data_settings import clip_settings, split_batch
from jaxalign.training.interrupt import Interrupts
from jaxalign.training.manifest import write_atomic
from jaxalign.training.mesh import (
    batch_sharding,
    check_batch,
    coverage,
    make_mesh,
    process_share,
    replicate,
    shardings,
    spread_clips,
    token_axis,
)
from jaxalign.training.optimizer import learning_rate, make_optimizer
from jaxalign.training.report import Report, first_screen
from jaxalign.training.state import TrainState, create_state
from jaxalign.training.step import make_gradient_cosine, make_step
from jaxalign.training.stopwatch import Stopwatch
from jaxalign.training.watchdog import Profile, Recompilations, Watchdog

HELD_OUT_CLIPS, HELD_OUT_TIMES = 8, 4  # of the loss curve; `evaluate loss` asks more
DRAWN = re.compile(r"train/align/\w+(?<!_weight)|held_out/(?!denoising_)\w+|gradients/cosine")
BATCH_PARTS = ("video", "label")  # what travels to the device


def train(
    config: ml_collections.ConfigDict, workdir: Path, *, hang_after: float | int = 600, profile_steps: int = 0
) -> int:
    """Train a resolved config in `workdir` until config.steps, from wherever the workdir stands.

    After `hang_after` seconds without a step the stacks are written down (0: never); `profile_steps` are traced.
    Returns the exit status: 0, or 128 + signal when a signal ended the run (everything is saved then). Raises
    ValueError or OSError, one line each, for what a person can mend; FloatingPointError at a non-finite loss.
    """
    # ---- What is run, and on what; with several processes: by all of them alike.
    here = environment.environment()
    processes.check_agreement(
        config_lib.flatten({"config": config.to_dict(), "versions": here["versions"]})
        | {"code": processes.code_digest()}
    )
    with processes.all_or_none("workdir"):
        check_writable(workdir)
        changes = compare_workdir(config, workdir)
    processes.check_shared(workdir)
    with processes.all_or_none("setup"):
        source, run, mesh, optimizer, abstract, fresh = prepare(config)
        clip = clip_settings(config)
        data, held_out = open_data(config, source, mesh)
    processes.check_agreement(processes.data_facts(data, config.seed))
    schedule = learning_rate(config)
    root_key = jax.random.key(config.seed)
    init_key, step_key = jax.random.fold_in(root_key, 0), jax.random.fold_in(root_key, 1)

    # Only now is the workdir this run's: a mistake above leaves nothing behind that the next try would meet.
    if jax.process_index() == 0:
        write_atomic(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    report = Report(workdir)
    kept = {"keep": config.checkpoint.keep, "keep_every": config.checkpoint.get("keep_every", 0)}
    with (
        report,
        Checkpoints(workdir / "checkpoints", say=report.say, **kept) as checkpoints,
        processes.leaving_at_once(report.say),
    ):
        # ---- Where it stands.
        found = checkpoints.restore_latest(abstract)
        state = found.state if found else fresh(init_key)
        start = int(state.step)
        if start >= config.steps:
            report.say(f"{workdir} is finished: step {start} of {config.steps}")
            return finish(report, workdir)
        report.first_screen(
            {"student": state.trainable["model"], "heads": state.trainable["heads"]},
            mesh=mesh,
            facts={"run": f"{workdir}, {describe_start(config, start, found)}", **describe(config, run)},
        )
        for line in (*describe_source(source, **clip), *changes):
            report.say(line)
        for line in environment.changes(found.extra.get("environment", {}), here) if found else ():
            report.say(f"not as when the checkpoint was written, so bits may differ: {line}")

        # ---- What is compiled: the step, and what looks at the run from time to time.
        step = compiled_step(config, run, optimizer, abstract)
        measure = evaluation.make_held_out(run)
        sampler = showing.Sampler(run, config)
        figure = cosine = None
        held_out_now: dict[str, float] = {}
        if run.task.alignments:
            figure = showing.Correspondence(run, config, held_out[0], fresh(init_key).trainable)
            cosine = jax.jit(make_gradient_cosine(run.task.denoising_loss, run.task.aligning_loss))

        def look(state, number, batch):
            """Everything that is not training: gradients' cosine, held-out losses, samples, the figure."""
            if cosine is not None and (number % config.eval_every == 0 or number == config.steps):
                report.scalars(number, jax.device_get(cosine(state, run.frozen, batch, step_key)))
            if number % config.eval_every == 0 or number == config.steps:
                trainable = {**state.trainable, "model": state.ema}
                losses = evaluation.held_out_losses(run, trainable, held_out, times=HELD_OUT_TIMES, compiled=measure)
                held_out_now.update(evaluation.summarise(losses))
                report.scalars(number, {f"held_out/{k}": v for k, v in held_out_now.items()})
            if number % config.sample_every == 0 or number == config.steps:
                videos = sampler(state.ema, run.frozen)
                report.video(number, "samples", grid(enlarge(videos, 128)), config.sample.fps)
                with report.writing("samples"):
                    if report.active:
                        showing.write_samples(workdir / "samples", f"step_{number:06d}", videos, config.sample.fps)
                if figure is not None:
                    path = workdir / "figures" / f"correspondence_{number:06d}.png"
                    with report.writing("figures"):
                        report.figure(
                            number, "correspondence", figure(state.trainable, number, path if report.active else None)
                        )

        # ---- One step after the other.
        batches = data.iterate(start)
        unreadable: Counter[str] = Counter()
        nonfinite = 0
        shown = ("loss", "denoising", *(f"align/{a.name}" for a in run.task.alignments))
        pending = None  # the step before, whose metrics are read while this one is computed
        watch = Stopwatch(config.batch_size * int(np.prod(run.student_grid)))
        stop_now = processes.StopVote(mesh)
        recompilations = Recompilations(step, report.say)
        profile = Profile(profile_steps, workdir / "tensorboard", start, report.say)
        report.start(start, config.steps)
        with Interrupts(report.say) as interrupts, Watchdog(hang_after, workdir, report.say) as dog:
            for number in range(start + 1, config.steps + 1):
                profile.before(number, config.steps)
                with watch.waiting():
                    host = next(batches)
                unreadable.update(data.names(host["index"][host["substituted"]]))
                batch = {k: jax.make_array_from_process_local_data(batch_sharding(mesh), host[k]) for k in BATCH_PARTS}
                state, metrics = step(state, run.frozen, batch, step_key)
                pending, ready = (number, metrics, host["index"]), pending
                stopped = stop_now(bool(interrupts))
                last = number == config.steps or stopped
                for at, values, index in filter(None, (ready, pending if last else None)):
                    values = {k: float(v) for k, v in jax.device_get(values).items()}
                    watch.count()
                    dog.alive()
                    if values["nonfinite"]:
                        nonfinite += 1
                        skip_or_stop(config, at, values, data.names(index), checkpoints, report)
                    report.progress(at, **{k.split("/")[-1]: values[k] for k in shown if k in values})
                    if at % config.log_every == 0 or at == config.steps:
                        values |= {"learning_rate": float(schedule(at - 1)), **watch.rates()}
                        report.scalars(at, {f"train/{k}": v for k, v in values.items()})
                recompilations.check(number)
                if number % min(config.eval_every, config.sample_every) == 0 or number == config.steps:
                    dog.rest()
                    with watch.paused():
                        look(state, number, batch)
                if number % config.checkpoint.every == 0 or last:
                    dog.rest()
                    checkpoints.save(number, state, extra={"config": config.to_dict(), "environment": here})
                if last:
                    break
            profile.stop(state.step)
        batches.close()
        checkpoints.wait()
        report.summary(
            {
                "config": config.to_dict(),
                "environment": here,
                "step": number,
                "train": values,
                "held_out": held_out_now,
                **watch.rates(),
                "peak_memory": environment.peak_memory(),
                "last_checkpoint": checkpoints.last_good,
                "failed_saves": checkpoints.failed_saves,
                "nonfinite_steps": nonfinite,
                "unreadable_clips": dict(unreadable),
                "skipped_files": dict(source.skipped),
                "short_files": list(short_items(source, Clip(**clip))),
            }
        )
        if stopped:
            saved = "saved" if checkpoints.last_good == number else "NOT saved"
            by = interrupts.name if interrupts else "a signal to another process"
            report.say(f"stopped by {by} at step {number}, {saved}; the same command goes on from here")
            return interrupts.status if interrupts else 128 + signal.SIGTERM
        return finish(report, workdir)


def open_data(config: ml_collections.ConfigDict, source: Source, mesh: jax.sharding.Mesh):
    """(this process's rows of the global batches by step, the held-out clips in batches)."""
    clip = clip_settings(config)
    share, shares = process_share(mesh)
    data = pipeline.batches(
        source,
        seed=config.seed,
        batch_size=config.batch_size,
        hflip=config.data.hflip,
        workers=config.data.workers,
        process_index=share,
        process_count=shares,
        **clip,
    )
    return data, split_batch(pipeline.held_out(source, HELD_OUT_CLIPS, **clip), config.batch_size)


class Prepared(NamedTuple):
    """What a config stands for on these devices, before anything is allocated but the frozen networks."""

    source: Source
    run: setup.Run
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    abstract: TrainState  # shapes, dtypes and shardings
    fresh: Callable  # key -> TrainState at step 0, made in its shards


def prepare(config: ml_collections.ConfigDict) -> Prepared:
    """Open the source, load what is frozen, lay the state out on the mesh. Raises ValueError or OSError, one line."""
    source = open_source(config.data.source)
    run = setup.build(config, num_classes=len(source.classes))
    mesh = make_mesh(**config.mesh)
    check_batch(mesh, config.batch_size, config.optimizer.grad_accum)
    optimizer = make_optimizer(config)
    run, abstract, fresh = lay_out(run, optimizer, mesh)
    return Prepared(source, run, mesh, optimizer, abstract, fresh)


def lay_out(run: setup.Run, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh):
    """The run on a mesh, the state's shapes with their shardings, and what makes the state in its shards from a key.

    Raises ValueError when the rules leave parameters whole that the mesh could split, or the tokens do not divide.
    """
    axis = token_axis(mesh, run.student_grid)
    if mesh.size > 1:
        place = functools.partial(spread_clips, mesh=mesh, axis=axis)
        run = dataclasses.replace(run, task=dataclasses.replace(run.task, place=place))
    run = dataclasses.replace(run, frozen=replicate(run.frozen, mesh))

    def init(key):
        return create_state(run.init(key), optimizer, init_gates(run.task.alignments))

    abstract = jax.eval_shape(init, jax.random.key(0))
    placed = shardings(abstract, run.sharding_rules, mesh)
    coverage(abstract.trainable, placed.trainable, mesh)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed)
    return run, abstract, jax.jit(init, out_shardings=placed)


def compiled_step(config: ml_collections.ConfigDict, run: setup.Run, optimizer, abstract: TrainState):
    """The jitted training step; the state keeps its placement and its buffers."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = make_step(
        in_place(run.task.loss, placed.trainable),
        optimizer,
        ema_decay=config.ema_decay,
        grad_accum=config.optimizer.grad_accum,
        update_gates=functools.partial(update_gates, run.task.alignments),
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))


def in_place(loss: Callable, placed) -> Callable:
    """`loss(trainable, ...)` whose parameters, and so their gradients, are cut as `placed` says.

    A constraint's cotangent has the same constraint: each device forms its own part of the gradient. And what is cast
    to the compute dtype is the part, so what fsdp gathers is the cast copy and not the fp32 master.
    """

    def constrained(trainable, *rest):
        return loss(jax.lax.with_sharding_constraint(trainable, placed), *rest)

    return constrained


def dry_run(config: ml_collections.ConfigDict) -> int:
    """Print what would run and the memory of its compiled step; nothing is trained or written."""
    source, run, mesh, optimizer, abstract, _ = prepare(config)
    trees = {"student": abstract.trainable["model"], "heads": abstract.trainable["heads"]}
    print(first_screen(trees, mesh=mesh, facts=describe(config, run)))
    print("\n".join(describe_source(source, **clip_settings(config))), flush=True)
    d = config.data
    batch = {
        "video": ((config.batch_size, d.num_frames, d.height, d.width, 3), np.uint8),
        "label": ((config.batch_size,), np.int32),
    }
    rows = batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in batch.items()}
    step = compiled_step(config, run, optimizer, abstract)
    memory = step.lower(abstract, run.frozen, batch, jax.random.key(0)).compile().memory_analysis()
    print(
        f"memory of a step on each device: {memory.argument_size_in_bytes / 1e9:.2f} GB of state, frozen networks and "
        f"batch, {memory.temp_size_in_bytes / 1e9:.2f} GB temporary"
    )
    return 0


def finish(report: Report, workdir: Path) -> int:
    """Draw the curves, then name the files that a person will want to open, the pictures first."""
    if not report.active:
        return 0
    rows = tensorboard.read_scalars(workdir / "tensorboard")
    keys = ["train/denoising", *sorted(k for k in dict.fromkeys(k for r in rows for k in r) if DRAWN.fullmatch(k))]
    if rows:
        with report.writing("figures"):
            curves.loss_curves(rows, workdir / "figures" / "curves.png", keys=keys)
    report.say("look at:")
    for pattern in ("figures/correspondence_*.png", "figures/curves.png", "samples/*.mp4", "samples/*.png"):
        if newest := sorted(workdir.glob(pattern))[-1:]:
            report.say(f"  {newest[0]}")
    report.say(f"  {workdir / 'summary.json'}")
    report.say(f"  tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def compare_workdir(config: ml_collections.ConfigDict, workdir: Path) -> list[str]:
    """What changed since the workdir was made; ValueError if it is another run's."""
    path = workdir / "config.json"
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} cannot be read as JSON: mend it, or give another --workdir") from None
    return config_lib.compare(stored, config)


def describe_start(config: ml_collections.ConfigDict, start: int, found) -> str:
    """From where to where."""
    return f"resumed at step {start} of {config.steps}" if found else f"from scratch, {config.steps} steps"


def describe(config: ml_collections.ConfigDict, run: setup.Run) -> dict[str, str]:
    """What is minimised, on which tokens, and who is aligned with whom."""
    facts = {
        "objective": f"{config.objective}, {config.precision}, batch {config.batch_size}",
        "tokens": f"{run.student_grid} (t, h, w)",
    }
    for a in run.task.alignments:
        start = float(a.weight(jax.numpy.asarray(config.align.warmup_steps)))
        against = f"the student's own block {a.teacher_depth}"
        if a.head is not None:
            against = f"teacher {' + '.join(a.teachers)}: tokens {a.grid}, width {a.head.teacher_width}"
        facts[f"alignment {a.name}"] = f"{a.method}, weight {start:g}, after block {a.depth} (0-based); {against}"
    return facts if run.task.alignments else facts | {"alignment": "none: plain denoising"}


def skip_or_stop(config, number: int, values: dict, clips: list[str], checkpoints: Checkpoints, report: Report) -> None:
    """A non-finite step was not applied; go on by config, or stop and say where, on what and where to go back to."""
    where = f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}; clips {', '.join(clips)}"
    if config.on_nonfinite == "skip":
        report.say(f"skipped a non-finite {where}")
        return
    good = checkpoints.last_good
    raise FloatingPointError(
        f"non-finite {where}; the last good checkpoint is {'none' if good is None else f'step {good}'} in "
        f"{checkpoints.directory}; lower optimizer.learning_rate, or write --config.on_nonfinite=skip"
    )
