"""Metrics of finished runs: `python -m jaxalign.evaluate {loss,probe} --workdir RUN [--workdir RUN ...]`.

loss    held-out denoising loss by time, alignment distance (the run's own head), motion of samples beside real clips
probe   how much of the teacher each student holds: the alignment distance on raw tapped tokens, through a fresh head
        trained for each frozen student (same seed, data and steps), and through the run's own head. The first
        --workdir with an alignment says which teacher, block and method.

Held-out clips, times and noise are the same for every run. Rows are printed as a Markdown table and kept as JSON:
evaluate_loss.json in each workdir, evaluate_probe.json in the first.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from jaxalign.data import pipeline
from jaxalign.data.sources import open_source
from jaxalign.metrics.motion import motion_magnitude
from jaxalign.training import config as config_lib
from jaxalign.training import evaluation, showing
from jaxalign.training import probe as probe_lib
from jaxalign.training.data_settings import clip_settings, split_batch
from jaxalign.training.trained import open_run, read_config


def loss(workdirs: Sequence[Path], *, weights: str = "ema", clips: int = 16, times: int = 8) -> list[dict]:
    """One row a run; see the module's docstring. Raises FileNotFoundError for a folder that is no run."""
    rows = []
    for workdir in workdirs:
        config, run, trainable = open_run(workdir, weights=weights)
        batches = held_out(config, clips)
        losses = evaluation.held_out_losses(run, trainable, batches, times=times)
        samples = showing.Sampler(run, config)(trainable["model"], run.frozen)
        real = np.concatenate([motion_magnitude(batch["video"]) for batch in batches])
        row = {
            "run": workdir.name,
            "weights": weights,
            **evaluation.summarise(losses),
            "denoising_by_time": [round(float(v), 6) for v in losses["denoising"]],
            "motion_of_samples": float(motion_magnitude(samples).mean()),
            "motion_of_real_clips": float(real.mean()),
        }
        _keep(workdir / "evaluate_loss.json", row)
        rows.append(row)
    return rows


def probe(
    workdirs: Sequence[Path],
    *,
    weights: str = "ema",
    clips: int = 16,
    times: int = 8,
    steps: int = 200,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[dict]:
    """Two or three rows a run; see the module's docstring.

    Raises ValueError when none of the runs aligns anything, or when two of them differ in their clips.
    """
    aligned = next((w for w in workdirs if read_config(w).align.method != "none"), None)
    if aligned is None:
        raise ValueError(
            "probe: none of the runs aligns anything; give one that does, it says which teacher to ask for"
        )
    base = open_run(aligned, weights=weights)
    for w in workdirs:
        if clip_settings(read_config(w)) != clip_settings(base.config):
            raise ValueError(f"probe: {w} has other clips ({clip_settings(read_config(w))}) than {aligned}")
    alignment = probe_lib.probed(base.run)
    sections = {name: base.config[name].to_dict() for name in ("align", "teacher")}
    students = {w: open_run(w, weights=weights, overrides=sections).trainable["model"] for w in workdirs}
    own_heads = {w: open_run(w, weights=weights).trainable["heads"] for w in workdirs}
    batches = pipeline.batches(
        open_source(base.config.data.source),
        seed=seed + 1,
        batch_size=base.config.batch_size,
        hflip=base.config.data.hflip,
        **clip_settings(base.config),
    )

    def progress(step, losses):
        if step % 25 == 0 or step == steps:
            shown = ", ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
            print(f"fresh heads, step {step}/{steps}: {shown}", flush=True)

    stream = batches.iterate()
    named = {w.name: model for w, model in students.items()}
    options = dict(steps=steps, learning_rate=learning_rate, seed=seed, progress=progress)
    fresh = probe_lib.fit_heads(base.run, named, stream, **options)
    stream.close()
    held = held_out(base.config, clips)
    rows = []
    for w, model in students.items():
        heads = {"fresh head": fresh[w.name]}
        if probe_lib.raw_tokens_compare(base.run, alignment):
            heads = {"no head (raw tokens)": {}} | heads
        if alignment.name in own_heads[w]:
            heads["own head"] = own_heads[w]
        for kind, head in heads.items():
            measured = probe_lib.measure(base.run, {"model": model, "heads": head}, held, times=times)
            row = {"run": w.name, "weights": weights, "read through": kind, "denoising": measured["denoising"]}
            rows.append(row | {alignment.method: measured["aligned"]})
    _keep(workdirs[0] / "evaluate_probe.json", rows)
    return rows


def held_out(config, clips: int) -> list[dict]:
    """The first `clips` held-out clips of a run's source, in batches of equal size."""
    found = pipeline.held_out(open_source(config.data.source), clips, **clip_settings(config))
    return split_batch(found, min(config.batch_size, clips))


def _keep(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"kept in {path}")


def table(rows: list[dict]) -> str:
    """Rows as Markdown; lists stay in the JSON."""
    names = list(dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list)))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        lines.append("| " + " | ".join(f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    given = flags.FLAGS
    words = {"loss": loss, "probe": probe}
    if len(argv) != 2 or argv[1] not in words:
        raise ValueError(f"write what to evaluate: python -m jaxalign.evaluate {{{','.join(words)}}} --workdir RUN")
    if not given.workdir:
        raise ValueError("--workdir is missing: give the folder of a run")
    options = dict(weights=given.weights, clips=given.clips, times=given.times)
    if argv[1] == "probe":
        options |= dict(steps=given.steps, learning_rate=given.learning_rate, seed=given.seed)
    print(table(words[argv[1]]([Path(w) for w in given.workdir], **options)))
    return 0


if __name__ == "__main__":
    flags.DEFINE_multi_string("workdir", [], "A run to look at; may be given several times.")
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The averaged students or the last ones.")
    flags.DEFINE_integer("clips", 16, "Held-out clips.", lower_bound=1)
    flags.DEFINE_integer("times", 8, "Times of the process at which each clip is asked.", lower_bound=3)
    flags.DEFINE_integer("steps", 200, "probe: training steps of a fresh head.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-3, "probe: of a fresh head (Adam, cosine to zero).")
    flags.DEFINE_integer("seed", 0, "probe: of the fresh heads and their data.")
    config_lib.run_verb(main)
