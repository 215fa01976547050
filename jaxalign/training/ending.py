"""The end of a run: what it leaves for people and for other runs."""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections

from jaxalign.figures import curves
from jaxalign.training import setup, subspaces, tensorboard
from jaxalign.training.mesh import fetch
from jaxalign.training.report import Report

RATES = ("steps_per_second", "tokens_per_second", "data_wait_share", "flops_per_step", "flops_per_second", "mfu")
DRAWN = re.compile(r"train/align/\w+(?<!_weight)|held_out/(?!denoising_)\w+|gradients/cosine")


def leave(config: ml_collections.ConfigDict, run: setup.Run, state, workdir: Path) -> list[Path]:
    """What a finished run leaves beside its checkpoints for another to take: the motion head of a subspace."""
    if not subspaces.is_subspace(config):
        return []
    model = fetch(state.ema)
    return [subspaces.save_head(config, run, model, workdir / "motion_head")] if jax.process_index() == 0 else []


def finish(report: Report, workdir: Path, left: Sequence[Path] = ()) -> int:
    """Draw the curves, then name the files that a person will want to open, the pictures first, and what is `left`."""
    if not report.active:
        return 0
    rows = tensorboard.read_scalars(workdir / "tensorboard")
    found = dict.fromkeys(k for row in rows for k in row)
    keys = ["train/denoising", "train/flow", *sorted(k for k in found if DRAWN.fullmatch(k))]
    if rows:
        with report.writing("figures"):
            curves.loss_curves(rows, workdir / "figures" / "curves.png", keys=keys)
    report.say("look at:")
    pictures = ("figures/correspondence_*.png", "figures/flow_*.png", "figures/curves.png")
    for pattern in (*pictures, "samples/*.mp4", "samples/*.png"):
        if newest := sorted(workdir.glob(pattern))[-1:]:
            report.say(f"  {newest[0]}")
    for path in (*left, workdir / "summary.json"):
        report.say(f"  {path}")
    report.say(f"  tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def logged_summary(workdir: Path, step: int) -> dict:
    """What the logs say of a run that ended at `step` without its summary: its last metrics and speeds."""
    row = next((r for r in tensorboard.read_scalars(workdir / "tensorboard") if r["step"] == step), {})
    train = {name.removeprefix("train/"): value for name, value in row.items() if name.startswith("train/")}
    speeds = {name: train[name] for name in RATES if name in train}
    return {"step": step, "last_checkpoint": step, "train": train, **speeds}
