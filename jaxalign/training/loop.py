"""The training loop, top to bottom: what is run, where it stands, one step after the other, what a person sees."""

import contextlib
import json
import signal
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxalign.data import pipeline
from jaxalign.data.clips import Clip, Source, short_items
from jaxalign.data.summary import summary as describe_source
from jaxalign.figures.video import enlarge, grid
from jaxalign.interop.sealed import write_atomic
from jaxalign.training import (
    chips,
    environment,
    evaluation,
    flops,
    init_from,
    lock,
    processes,
    prompts,
    same_data,
    setup,
    showing,
    subspaces,
)
from jaxalign.training import config as config_lib
from jaxalign.training.checkpoint import Checkpoints, agree, check_writable
from jaxalign.training.data_settings import abstract_batch, clip_settings, held_out_size, split_batch, task_parts
from jaxalign.training.ending import finish, leave, logged_summary
from jaxalign.training.interrupt import Interrupts, Maintenance
from jaxalign.training.mesh import batch_sharding, process_share
from jaxalign.training.optimizer import learning_rate
from jaxalign.training.prepare import compiled_step, in_place, prepare
from jaxalign.training.report import Report, first_screen, read_json
from jaxalign.training.restore import step_folders
from jaxalign.training.step import make_gradient_cosine
from jaxalign.training.stopwatch import SlowHosts, Stopwatch
from jaxalign.training.substitutes import Substitutes
from jaxalign.training.watchdog import Profile, Recompilations, Watchdog

HELD_OUT_CLIPS, HELD_OUT_TIMES = 8, 4  # of the loss curve; `evaluate loss` asks more
# Of the summary: what this start knows, whatever an earlier one of the same run had found.
ABOUT_THIS_START = ("config", "environment", "skipped_files")


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
    with contextlib.ExitStack() as held:
        with processes.all_or_none("workdir"):
            check_writable(workdir)
            held.enter_context(lock.alone_in(workdir))
            changes = compare_workdir(config, workdir)
        processes.check_shared(workdir)
        return _train(config, workdir, here, changes, hang_after, profile_steps)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    here: dict[str, Any],
    changes: list[str],
    hang_after: float | int,
    profile_steps: int,
) -> int:
    """`train`, in a workdir that is this run's alone; `changes` are said."""
    with processes.all_or_none("setup"):
        source, run, mesh, optimizer, abstract, fresh = prepare(config)
        clip = clip_settings(config)
        data, held_out = open_data(config, source, mesh)
        if not step_folders(workdir / "checkpoints"):
            init_from.check(config, run)
        base = {"base": init_from.fingerprint(config, run)} if run.task.lora else {}
    processes.check_agreement(processes.data_facts(data, config.seed) | config_lib.flatten(base))
    seen = same_data.facts(data, config.seed)
    about_data = {
        "skipped_files": dict(source.skipped),
        "missing_files": list(source.missing),
        "short_files": list(short_items(source, Clip(**clip))),
        "cut_prompts": source.cut_prompts,
    }
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
        def check_data(extra):
            with processes.all_or_none("data"):
                by_label = run.task.num_classes > 0
                changes.extend(same_data.changes(extra.get("data"), seen, by_label=by_label, where=str(workdir)))

        found = checkpoints.restore_latest(abstract, check=check_data)
        if found:
            state = found.state
            init_from.check_base(found.extra.get("base"), base.get("base"), str(workdir))
        else:
            with processes.all_or_none("init_from"):
                state = init_from.begin(config, run, fresh(init_key), say=report.say)
        start = int(state.step)
        finished = start >= config.steps
        if finished:
            report.say(f"{workdir} is finished: step {start} of {config.steps}")
            if agree(read_json(workdir / "summary.json").get("step", 0)) >= start:
                return finish(report, workdir, leave(config, run, state, workdir))
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
        sampler = figure = cosine = None
        if hasattr(run.task, "sample"):
            sampler = showing.Sampler(run, config, tokens=prompts.for_samples(config, held_out, source))
        else:
            figure = showing.PredictedFlow(run, held_out[0])
        held_out_now: dict[str, float] = {}
        if run.task.alignments:
            # The student's tokens at step 0 are kept in a file: to make it again would need room for a second state.
            at_start = workdir / "figures" / "tokens_000000.npz"
            figure = showing.Correspondence(run, config, held_out[0], None if found else state.trainable, at_start)
            if figure.note:
                report.say(figure.note)
            placed = jax.tree.map(lambda leaf: leaf.sharding, abstract.trainable)
            terms = (in_place(loss, placed) for loss in (run.task.denoising_loss, run.task.aligning_loss))
            cosine = jax.jit(make_gradient_cosine(*terms, grad_accum=config.optimizer.grad_accum))

        def look(state, number, batch):
            """Everything that is not training: gradients' cosine, held-out losses, samples, the figure."""
            final = number >= config.steps
            if cosine is not None and batch and (number % config.eval_every == 0 or final):
                report.scalars(number, jax.device_get(cosine(state, run.frozen, batch, step_key)))
            if number % config.eval_every == 0 or final:
                trainable = {**state.trainable, "model": state.ema}
                losses = evaluation.held_out_losses(
                    run, trainable, held_out, times=HELD_OUT_TIMES, compiled=measure, mesh=mesh
                )
                held_out_now.update(evaluation.summarise(losses))
                report.scalars(number, {f"held_out/{k}": v for k, v in held_out_now.items()})
            if number % config.sample_every == 0 or final:
                if sampler is not None:
                    # A large student's videos are drawn one a device; a small one's in fours, whatever the mesh.
                    rows = mesh.shape["data"] * mesh.shape["fsdp"]
                    videos = sampler(state.ema, run.frozen, at_once=max(4, rows) if run.task.text else 4)
                    report.video(number, "samples", grid(enlarge(videos, 128)), config.sample.fps)
                    with report.writing("samples"):
                        if report.active:
                            showing.write_samples(workdir / "samples", f"step_{number:06d}", videos, config.sample.fps)
                if figure is not None:
                    path = workdir / "figures" / f"{figure.name}_{number:06d}.png"
                    with report.writing("figures"):
                        report.figure(
                            number, figure.name, figure(state.trainable, number, path if report.active else None)
                        )

        if finished:  # killed behind its last save: what a run leaves is made now
            look(state, start, None)
            summary = {"held_out": held_out_now, **logged_summary(workdir, start), **about_data}
            report.summary({"config": config.to_dict(), "environment": here, **summary}, whole=ABOUT_THIS_START)
            return finish(report, workdir, leave(config, run, state, workdir))

        def save(number, state):
            extra = {"config": config.to_dict(), "environment": here, "data": seen, **base}
            checkpoints.save(number, state, extra=extra)

        # ---- One step after the other.
        batches = data.iterate(start)
        substitutes = Substitutes(workdir, report.say)
        nonfinite = 0
        shown = ("loss", "denoising", "end_point_error", *(f"align/{a.name}" for a in run.task.alignments))
        pending = None  # the step before, whose metrics are read while this one is computed
        chip = chips.chip_of(here["device_kind"])
        watch = Stopwatch(config.batch_size * int(np.prod(run.student_grid)), chip and chip.flops * mesh.size)
        slow_hosts = SlowHosts(report.say)
        vote = processes.Vote(mesh)
        recompilations = Recompilations(step, report.say)
        profile = Profile(profile_steps, workdir / "tensorboard", start, report.say)
        report.start(start, config.steps)
        with (
            Interrupts(report.say) as interrupts,
            Maintenance(report.say) as maintenance,
            Watchdog(hang_after, workdir, report.say) as dog,
        ):
            for number in range(start + 1, config.steps + 1):
                profile.before(number, config.steps)
                try:
                    with watch.waiting():
                        host = next(batches)
                except Exception:
                    # The state is whole. Of several processes the others are in a step that never ends: none can save.
                    if number > start + 1 and jax.process_count() == 1:
                        save(number - 1, state)
                        checkpoints.wait()
                        behind = f"behind {said_step(checkpoints.last_good)}; the same command goes on from there"
                        report.say(f"there is no data for step {number}; saved {behind}")
                    if interrupts and jax.process_count() == 1 and (checkpoints.last_good or 0) == number - 1:
                        report.say(f"stopped by {interrupts.name}")  # which also ends waiting for a disk
                        return interrupts.status
                    raise
                substitutes.note(data.names(host["index"][host["substituted"]]), len(host["index"]))
                parts = task_parts(host).items()
                batch = {k: jax.make_array_from_process_local_data(batch_sharding(mesh), x) for k, x in parts}
                with watch.blocked():
                    state, metrics = step(state, run.frozen, batch, step_key)
                    wish = processes.SAVE if maintenance.come() else processes.GO_ON
                    asked = vote(processes.STOP if interrupts else wish)
                if not watch.flops_per_step:  # traced already, and the devices are at work meanwhile
                    watch.flops_per_step = flops.count(step.trace(state, run.frozen, batch, step_key).jaxpr).model
                pending, ready = (number, metrics, host["index"]), pending
                stopped = asked == processes.STOP
                last = number == config.steps or stopped
                for at, values, index in filter(None, (ready, pending if last else None)):
                    with watch.blocked():
                        values = {k: float(v) for k, v in jax.device_get(values).items()}
                    watch.count()
                    if values["nonfinite"]:
                        nonfinite += 1
                        dog.rest()
                        skip_or_stop(config, at, values, data.names(index), checkpoints, report)
                    dog.alive()
                    report.progress(at, **{k.split("/")[-1]: values[k] for k in shown if k in values})
                    if at % config.log_every == 0 or at == config.steps:
                        values |= {"learning_rate": float(schedule(at - 1)), "substituted": substitutes.share()}
                        values |= watch.rates()
                        report.scalars(at, {f"train/{k}": v for k, v in values.items()})
                        slow_hosts(watch.interval())
                recompilations.check(number)
                # Saved before it is looked at: what ends the run there, memory or a signal, costs no step.
                if number % config.checkpoint.every == 0 or last or asked == processes.SAVE:
                    dog.rest()
                    save(number, state)
                    dog.alive()
                if is_looked_at(config, number):
                    dog.rest()
                    with watch.paused():
                        look(state, number, batch)
                    dog.alive()
                if last:
                    break
            dog.rest()
            profile.stop(state.step)
            batches.close()
            checkpoints.wait()  # a signal that comes now must not end it
        good = checkpoints.last_good
        report.summary(
            {
                "config": config.to_dict(),
                "environment": here,
                "step": good or 0,  # where the same command goes on
                "train": values,
                "held_out": held_out_now,
                **watch.rates(),
                "seconds_to_first_step": report.seconds_to_first_step,
                "peak_memory": environment.peak_memory(),
                "last_checkpoint": good,
                "failed_saves": checkpoints.failed_saves,
                "nonfinite_steps": nonfinite,
                "unreadable_clips": substitutes.of_all(),
                **about_data,
            },
            whole=ABOUT_THIS_START,
        )
        if stopped:
            saved = "saved" if good == number else "NOT saved"
            by = interrupts.name if interrupts else "a signal to another process"
            report.say(f"stopped by {by} at step {number}, {saved}; the same command goes on from here")
            return interrupts.status if interrupts else 128 + signal.SIGTERM
        with processes.all_or_none("checkpoints"):
            if good != number:
                raise OSError(
                    f"{workdir} is not finished: its last step, {number}, could not be saved, and the last good "
                    f"checkpoint is {said_step(good)}; make room on the disk and give the same command again"
                )
        return finish(report, workdir, leave(config, run, state, workdir))


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
    held_out = pipeline.held_out(source, HELD_OUT_CLIPS, **clip)
    return data, split_batch(held_out, held_out_size(config, mesh, HELD_OUT_CLIPS))


def dry_run(config: ml_collections.ConfigDict) -> int:
    """Print what would run and the memory of its compiled step; nothing is trained or written."""
    source, run, mesh, optimizer, abstract, _ = prepare(config)
    trees = {"student": abstract.trainable["model"], "heads": abstract.trainable["heads"]}
    print(first_screen(trees, mesh=mesh, facts=describe(config, run)))
    print("\n".join(describe_source(source, **clip_settings(config))), flush=True)
    held = dict(given=source.given, beside=subspaces.beside(config))
    batch = abstract_batch(config, mesh, text=run.task.text, **held)
    step = compiled_step(config, run, optimizer, abstract)
    memory = step.lower(abstract, run.frozen, batch, jax.random.key(0)).compile().memory_analysis()
    print(
        f"memory of a step on each device: {memory.argument_size_in_bytes / 1e9:.2f} GB of state, frozen networks and "
        f"batch, {memory.temp_size_in_bytes / 1e9:.2f} GB temporary"
    )
    return 0


def said_step(step: int | None) -> str:
    return "none" if step is None else f"step {step}"


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
    if found:
        return f"resumed at step {start} of {config.steps}"
    beginning = "from scratch" if not config.init_from.path else f"starting from {config.init_from.path}"
    return f"{beginning}, {config.steps} steps"


def describe(config: ml_collections.ConfigDict, run: setup.Run) -> dict[str, str]:
    """What is minimised, on which tokens, and who is aligned with whom."""
    if subspaces.is_subspace(config):
        return subspaces.describe(config, run)
    facts = {
        "objective": f"{config.objective}, {config.precision}, batch {config.batch_size}",
        "tokens": f"{run.student_grid} (t, h, w)",
    }
    if (adapters := run.task.lora) is not None:
        facts["adapters"] = f"rank {adapters.rank}, alpha {adapters.alpha:g}, upon {config.init_from.path}"
    for a in run.task.alignments:
        start = float(a.weight(jax.numpy.asarray(config.align.warmup_steps)))
        against = f"the student's own block {a.teacher_depth}"
        if a.head is not None:
            against = f"teacher {' + '.join(a.teachers)}: tokens {a.grid}, width {a.head.teacher_width}"
        facts[f"alignment {a.name}"] = f"{a.method}, weight {start:g}, after block {a.depth} (0-based); {against}"
    return facts if run.task.alignments else facts | {"alignment": "none: plain denoising"}


def is_looked_at(config: ml_collections.ConfigDict, number: int) -> bool:
    """Whether the run is looked at behind step `number`."""
    return 0 in (number % config.eval_every, number % config.sample_every) or number == config.steps


def skip_or_stop(config, number: int, values: dict, clips: list[str], checkpoints: Checkpoints, report: Report) -> None:
    """A non-finite step was not applied; go on by config, or stop and say where, on what and where to go back to."""
    where = f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}; clips {', '.join(clips)}"
    if config.on_nonfinite == "skip":
        report.say(f"skipped a non-finite {where}")
        return
    checkpoints.wait()  # the one that is being written counts; process 0 seals it last, and all wait for that
    good = agree(-1 if checkpoints.last_good is None else checkpoints.last_good)
    raise FloatingPointError(
        f"non-finite {where}; the last good checkpoint is {said_step(None if good < 0 else good)} in "
        f"{checkpoints.directory}; go on from there with --config.on_nonfinite=skip, or with a lower "
        "optimizer.learning_rate in another --workdir with --config.init_from.path=CHECKPOINT"
    )
