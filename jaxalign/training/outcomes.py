"""What the runs under a folder came to: config, summary, and what their losses were on the way."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from jaxalign.metrics.scaling import Point
from jaxalign.training import config as config_lib
from jaxalign.training import setup, tensorboard
from jaxalign.training.report import read_json
from jaxalign.training.trained import read_config

EARLY = 0.1  # of a run: what comes before is warm-up, of the learning rate and of the average of the weights


class Outcome(NamedTuple):
    """A finished run; `group` names it without its seed."""

    name: str
    group: str
    config: ml_collections.ConfigDict
    summary: dict
    workdir: Path


def read(root: Path) -> tuple[list[Outcome], list[str]]:
    """(the finished runs in the folders of `root`, by name; remarks on the others). FileNotFoundError without any.

    A run that lies in two folders counts once: twice the same seed would pass for two.
    """
    outcomes, unfinished, groups, first, again = [], [], {}, {}, []
    for path in sorted(root.glob("*/config.json")):
        config, summary = read_config(path.parent), read_json(path.parent / "summary.json")
        name = path.parent.name
        if summary.get("step", 0) < config.steps or "held_out" not in summary:
            unfinished.append(name)
            continue
        whole = config_lib.identity(config)
        if (known := first.setdefault(json.dumps([whole, config.steps], sort_keys=True), name)) != name:
            again.append(f"{name} (as {known})")
            continue
        same = json.dumps({k: v for k, v in whole.items() if k != "seed"}, sort_keys=True)
        group = groups.setdefault((same, config.steps), re.sub(r",?\bseed=[^,]*", "", name).strip(",") or name)
        outcomes.append(Outcome(name, group, config, summary, path.parent))
    if not outcomes:
        raise FileNotFoundError(f"{root} holds no finished run: give the --root of launch/sweep.py")
    left_out = {"not finished and left out": unfinished, "the same run again and left out": again}
    return outcomes, [f"{why}: {_few(names)}" for why, names in left_out.items() if names]


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def size_of(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(the student's parameters, its tokens for a clip), from shapes alone."""
    run = setup.build(config_lib.resolve(config), abstract=True)
    model = jax.eval_shape(run.init, jax.random.key(0))["model"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model)), int(np.prod(run.student_grid))


def scaling_points(outcomes: Sequence[Outcome]) -> tuple[list[Point], list[str]]:
    """(points for metrics.scaling, remarks).

    Compute is flops a step (summary.json) times steps; unless every run says its flops, 6·N·tokens for all of them.
    With a constant learning rate each evaluation on the way is a point, else the end alone.
    """
    counted = all(outcome.summary.get("flops_per_step") for outcome in outcomes)
    remarks = []
    if not counted:
        remarks.append("compute is 6 · parameters · tokens, for not every run knows its flops_per_step")
    sizes, points, ends = {}, [], 0
    for name, group, config, summary, workdir in outcomes:
        if group not in sizes:
            sizes[group] = size_of(config)
        size, tokens = sizes[group]
        of_step = config.batch_size * tokens
        flops = summary["flops_per_step"] if counted else 6 * size * of_step
        losses = {int(summary["step"]): summary["held_out"]["denoising"]}
        if config_lib.spans_the_run(config):
            ends += 1
        else:
            first = max(config.optimizer.warmup_steps, EARLY * config.steps)
            rows = tensorboard.read_scalars(workdir / "tensorboard")
            logged = {r["step"]: r["held_out/denoising"] for r in rows if "held_out/denoising" in r}
            losses = {step: loss for step, loss in logged.items() if step >= first} | losses
        points += [
            Point(name, group, size, tokens, float(step * of_step), float(flops) * step, float(loss))
            for step, loss in sorted(losses.items())
            if np.isfinite(float(loss))
        ]
    if ends:
        remarks.append(f"{ends} runs have a schedule that spans them and count with their last loss alone")
    return points, remarks
