"""Metrics of finished runs: `python -m jaxalign.evaluate {loss,probe} --workdir RUN [--workdir RUN ...]`.

loss    held-out denoising loss by time, alignment distance (the run's own head), motion of samples beside real clips
probe   how much of the teacher each student holds: the alignment distance on raw tapped tokens, through a fresh head
        trained for each frozen student (same seed, data and steps), and through the run's own head. The first
        --workdir with an alignment says which teacher, block and method.

Held-out clips, times and noise are the same for every run. Rows are printed as a Markdown table and kept as JSON in
each workdir (evaluate_loss.json) or in the first one (evaluate_probe.json).
"""

import json
from pathlib import Path

from absl import flags

from jaxalign.training import config as config_lib

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_multi_string("workdir", [], "A run to look at; may be given several times.")
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The averaged students or the last ones.")
    flags.DEFINE_integer("clips", 16, "Held-out clips.", lower_bound=1)
    flags.DEFINE_integer("times", 8, "Times of the process at which each clip is asked.", lower_bound=3)
    flags.DEFINE_integer("steps", 200, "probe: training steps of a fresh head.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-3, "probe: of a fresh head (Adam, cosine to zero).")
    flags.DEFINE_integer("seed", 0, "probe: of the fresh heads and their data.")


def main(argv: list[str]) -> int:
    words = {"loss": evaluate_loss, "probe": evaluate_probe}
    if len(argv) != 2 or argv[1] not in words:
        raise ValueError(f"write what to evaluate: python -m jaxalign.evaluate {{{','.join(words)}}} --workdir RUN")
    if not FLAGS.workdir:
        raise ValueError("--workdir is missing: give the folder of a run")
    words[argv[1]]([Path(w) for w in FLAGS.workdir])
    return 0


def evaluate_loss(workdirs: list[Path]) -> list[dict]:
    """One row a run; see the module's docstring."""
    from jaxalign.metrics.motion import motion_magnitude
    from jaxalign.training import evaluation, showing
    from jaxalign.training.trained import open_run

    rows = []
    for workdir in workdirs:
        config, run, trainable = open_run(workdir, weights=FLAGS.weights)
        batches = _held_out(config)
        losses = evaluation.held_out_losses(run, trainable, batches, times=FLAGS.times)
        row = {"run": workdir.name, "weights": FLAGS.weights, **evaluation.summarise(losses)}
        row["denoising_by_time"] = [round(float(v), 6) for v in losses["denoising"]]
        samples = showing.Sampler(run, config)(trainable["model"], run.frozen)
        row["motion_of_samples"] = float(motion_magnitude(samples).mean())
        row["motion_of_real_clips"] = float(_mean([motion_magnitude(b["video"]).mean() for b in batches]))
        _keep(workdir / "evaluate_loss.json", row)
        rows.append(row)
    _table(rows)
    return rows


def evaluate_probe(workdirs: list[Path]) -> list[dict]:
    """Two or three rows a run; see the module's docstring."""
    from jaxalign.data import pipeline
    from jaxalign.data.sources import open_source
    from jaxalign.training import probe
    from jaxalign.training.data_settings import clip_settings
    from jaxalign.training.trained import open_run, read_config

    aligned = next((w for w in workdirs if read_config(w).align.method != "none"), None)
    if aligned is None:
        raise ValueError(
            "probe: none of the runs aligns anything; give one that does, it says which teacher to ask for"
        )
    own = {w: open_run(w, weights=FLAGS.weights) for w in workdirs}
    base = own[aligned]
    sections = {name: base.config[name].to_dict() for name in ("align", "teacher")}
    students = {w: open_run(w, weights=FLAGS.weights, overrides=sections).trainable["model"] for w in workdirs}
    batches = pipeline.batches(
        open_source(base.config.data.source),
        seed=FLAGS.seed + 1,
        batch_size=base.config.batch_size,
        hflip=base.config.data.hflip,
        **clip_settings(base.config),
    )

    def progress(step, losses):
        if step % 25 == 0 or step == FLAGS.steps:
            shown = ", ".join(f"{name} {float(v):.4f}" for name, v in losses.items())
            print(f"fresh heads, step {step}/{FLAGS.steps}: {shown}", flush=True)

    heads = probe.fit_heads(
        base.run,
        {w.name: model for w, model in students.items()},
        batches.iterate(),
        steps=FLAGS.steps,
        learning_rate=FLAGS.learning_rate,
        seed=FLAGS.seed,
        progress=progress,
    )
    held_out = _held_out(base.config)
    rows = []
    for w, model in students.items():
        kinds = {"raw tokens, no head": {}, "fresh head": heads[w.name]}
        if base.run.task.alignments[0].name in own[w].trainable["heads"]:
            kinds["own head"] = own[w].trainable["heads"]
        for kind, head in kinds.items():
            if not head and base.run.student_grid != base.run.teacher_grid:
                continue  # raw tokens live on another grid: nothing to compare position by position
            measured = probe.measure(base.run, {"model": model, "heads": head}, held_out, times=FLAGS.times)
            method = base.run.task.alignments[0].method
            rows.append(
                {
                    "run": w.name,
                    "measured through": kind,
                    "denoising": measured["denoising"],
                    method: measured["aligned"],
                }
            )
    _keep(workdirs[0] / "evaluate_probe.json", rows)
    _table(rows)
    return rows


def _held_out(config) -> list[dict]:
    from jaxalign.data import pipeline
    from jaxalign.data.sources import open_source
    from jaxalign.training.data_settings import clip_settings, split_batch

    clips = pipeline.held_out(open_source(config.data.source), FLAGS.clips, **clip_settings(config))
    return split_batch(clips, min(config.batch_size, FLAGS.clips))


def _mean(values) -> float:
    return sum(values) / len(values)


def _keep(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"kept in {path}")


def _table(rows: list[dict]) -> None:
    """Markdown; lists stay in the JSON."""
    names = list(dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list)))
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = (row.get(n, "") for n in names)
        print("| " + " | ".join(f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells) + " |")


if __name__ == "__main__":
    define_flags()
    config_lib.run_verb(main)
