"""One table of many runs: methods beside each other at equal steps and data, mean and deviation over seeds.

What is asked of a run is the same for all: held-out losses at fixed times and noise, videos drawn from fixed noise, how
far those are from the law of their world (synthetic:gravity) and from real clips. It is kept beside the run.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np

from jaxalign.data import pipeline
from jaxalign.figures import comparison as figure
from jaxalign.interop import sealed
from jaxalign.interop.sealed import write_atomic
from jaxalign.metrics import features, motion_law
from jaxalign.metrics.frechet import Moments, advice, frechet_distance, moments
from jaxalign.metrics.motion import motion_magnitude
from jaxalign.training import evaluation, prompts, showing
from jaxalign.training.data_settings import clip_settings, split_batch
from jaxalign.training.outcomes import Outcome
from jaxalign.training.report import read_json
from jaxalign.training.restore import find_checkpoint, step_folders
from jaxalign.training.trained import open_run

METHODS = ("baseline", "repa", "trd", "tsa", "m_tsa", "moalign", "align4gen")
LAWFUL = "synthetic:gravity"  # the source whose motion can be judged
REAL = "real clips"
KEPT = "compare.json"
REFERENCE = 256  # held-out clips that the features of samples are compared with
TIMES = 6
AT_ONCE = 16
# Column -> its title. The order of the table and the panels; what a data set has none of is left out.
COLUMNS = {
    "denoising_low": "denoising, low noise",
    "denoising_mid": "mid",
    "denoising_high": "high noise",
    "aligned": "alignment distance (own)",
    "motion_error": "motion error (%)",
    "acceleration": "acceleration (%)",
    "energy": "energy (%)",
    "open_turns": "open turns (/100)",
    "vanished": "vanished (%)",
    "flicker": "come or go (%)",
    "extra": "extra blobs (/100)",
    "motion": "motion of pixels",
    "frechet": "Fréchet (EfficientNet)",
}


@dataclasses.dataclass(frozen=True)
class Questions:
    """What every run is asked; a kept answer to others is not taken."""

    samples: int = 128
    clips: int = 32
    weights: str = "ema"


class Row(NamedTuple):
    """A method on a data set; `values` are the columns of each seed, REAL has none and one value each."""

    data: str
    method: str
    seeds: tuple[int, ...]
    values: dict[str, list[float]]


class Reference(NamedTuple):
    """The real clips of a data set and what they say."""

    values: dict[str, float]
    moments: Moments
    network: features.Network


def data_of(config: ml_collections.ConfigDict) -> str:
    """What a run sees, as the table names it: all that decides the clips, what is seldom changed only if it is."""
    d = config.data
    parts = [d.source, f"{d.num_frames} × {d.height} × {d.width}", f"stride {d.stride}"]
    seldom = {"short": "skip", "split": 1, "frame_rate": 25.0}  # older configs lack some
    parts += [f"{name} {d[name]}" for name, usual in seldom.items() if d.get(name, usual) != usual]
    return ", ".join(parts)


def method_of(config: ml_collections.ConfigDict) -> str:
    """The method of a run, as the table names it."""
    return "baseline" if config.align.method == "none" else config.align.method


def answers(
    outcomes: Sequence[Outcome], questions: Questions, *, say: Callable[[str], None] = print
) -> tuple[list[Row], list[str]]:
    """(the rows, REAL first in each data set; remarks). What is kept beside a run is not asked again.

    Raises FileNotFoundError where no run at all answers.
    """
    rows, remarks = [], []
    for data in dict.fromkeys(data_of(o.config) for o in outcomes):
        own = [o for o in outcomes if data_of(o.config) == data]
        reference = _reference(own[0].config, questions)
        if warning := advice(questions.samples, reference.moments.width):
            remarks.append(f"Fréchet distance: {warning}")
        rows.append(Row(data, REAL, (), {name: [value] for name, value in reference.values.items()}))
        groups = {}
        for outcome in own:
            groups.setdefault(outcome.group, []).append(outcome)
        names = _names(groups)
        for group in sorted(groups, key=lambda g: _place(names[g])):
            members = sorted(groups[group], key=lambda o: o.config.seed)
            members, found, more = _ask(members, questions, reference, say)
            remarks += more
            if not members:
                continue
            columns = [name for name in COLUMNS if any(name in one for one in found)]
            values = {name: [float(one.get(name, np.nan)) for one in found] for name in columns}
            rows.append(Row(data, names[group], tuple(o.config.seed for o in members), values))
        remarks += _unequal(data, own)
    if all(row.method == REAL for row in rows):
        raise FileNotFoundError(f"there is nothing to compare: {'; '.join(remarks)}")
    return rows, remarks + missing(rows)


def _names(groups: dict[str, list[Outcome]]) -> dict[str, str]:
    """What each group is called: its method, or its own name where a method has several."""
    methods = {group: method_of(members[0].config) for group, members in groups.items()}
    alone = {group: list(methods.values()).count(method) == 1 for group, method in methods.items()}
    return {group: method if alone[group] else group for group, method in methods.items()}


def _place(name: str) -> tuple:
    return (METHODS.index(name), "") if name in METHODS else (len(METHODS), name)


def _unequal(data: str, outcomes: Sequence[Outcome]) -> list[str]:
    """What the runs of a data set should share and do not."""
    asked = {
        "steps": lambda c: c.steps,
        "batch_size": lambda c: c.batch_size,
        "model": lambda c: json.dumps(c.model.to_dict(), sort_keys=True),
        "learning rate": lambda c: c.optimizer.learning_rate,
    }
    asked |= {f"sample.{name}": lambda c, name=name: c.sample.get(name) for name in showing.SAMPLING}
    differing = [name for name, of in asked.items() if len({of(o.config) for o in outcomes}) > 1]
    return [f"{data}: the runs differ in {', '.join(differing)}, so rows do not compare"] if differing else []


def missing(rows: Sequence[Row]) -> list[str]:
    """Methods and seeds that some data set has and another row lacks, in words."""
    said = []
    asked = [row for row in rows if row.method != REAL]
    seeds = sorted({seed for row in asked for seed in row.seeds})
    for data in dict.fromkeys(row.data for row in asked):
        own = {row.method: row for row in asked if row.data == data}
        if absent := [method for method in METHODS if method not in own]:
            said.append(f"{data}: no finished run of {', '.join(absent)}")
        for method, row in own.items():
            if lacking := [str(seed) for seed in seeds if seed not in row.seeds]:
                said.append(f"{data}: {method} lacks seed {', '.join(lacking)}")
    if asked and min(len(row.seeds) for row in asked) < 3:
        said.append("rows of fewer than 3 seeds: their deviation says little")
    return said


def _reference(config: ml_collections.ConfigDict, questions: Questions) -> Reference:
    """Held-out clips to compare with; the row of real clips is of as many training clips as there are samples."""
    clip = clip_settings(config)
    source = prompts.open_told(config)
    size = max(64, 32 * (max(clip["height"], clip["width"]) // 16))
    network = features.open_network(features.DEMO, stride=16, size=size)
    held_out = pipeline.held_out(source, REFERENCE, **clip)["video"]
    stated = moments(features.features(network, held_out, at_once=AT_ONCE))
    shown = pipeline.batches(source, seed=20_000, batch_size=questions.samples, **clip)[0]["video"]
    values = of_videos(shown, config) | {"frechet": _distance(shown, stated, network)}
    return Reference(values, stated, network)


def of_videos(videos: np.ndarray, config: ml_collections.ConfigDict) -> dict[str, float]:
    """The columns that videos alone decide: their motion, and how far from the law it is where there is one."""
    found = {"motion": float(motion_magnitude(videos).mean())}
    if config.data.source == LAWFUL and videos.shape[1] >= motion_law.FEWEST:
        judged = motion_law.judge(motion_law.track(videos), stride=max(1, config.data.stride))
        found |= {name: float(np.nanmean(v)) if np.isfinite(v).any() else np.nan for name, v in judged.items()}
    return found


def _distance(videos: np.ndarray, stated: Moments, network: features.Network) -> float:
    return frechet_distance(moments(features.features(network, videos, at_once=AT_ONCE)), stated)


def _ask(
    members: Sequence[Outcome], questions: Questions, reference: Reference, say
) -> tuple[list[Outcome], list[dict[str, float]], list[str]]:
    """(the runs of one group that answer, the columns of each, remarks); they share what is compiled."""
    answering, found, remarks, compiled = [], [], [], {}
    for outcome in members:
        kept = read_json(outcome.workdir / KEPT)
        if kept.get("asked") != _asked(questions, _newest(outcome.workdir)):  # all bytes are read for new answers only
            try:
                checkpoint = find_checkpoint(outcome.workdir, say=say)
            except FileNotFoundError:
                gone = f"{outcome.name}: its checkpoints are gone or damaged"
                if not _answered(kept, questions, outcome):
                    remarks.append(f"{gone}, so it is left out")
                    continue
                remarks.append(f"{gone}; what stands here was measured earlier ({kept['asked']['checkpoint']})")
            else:
                kept = _measured(outcome, checkpoint, questions, reference, compiled, say)
        answering.append(outcome)
        found.append({name: float(value) for name, value in kept["values"].items()})
    return answering, found, remarks


def _measured(outcome: Outcome, checkpoint: Path, questions: Questions, reference: Reference, compiled, say) -> dict:
    """The answers of a run, which are kept beside it."""
    asked = _asked(questions, checkpoint)
    say(f"{outcome.name}: {questions.samples} samples")
    values, videos = _measure(outcome, checkpoint, questions, compiled)
    values |= of_videos(videos, outcome.config)
    values["frechet"] = _distance(videos, reference.moments, reference.network)
    kept = {"asked": asked, "values": values}
    write_atomic(outcome.workdir / KEPT, json.dumps(kept, indent=2) + "\n")
    return kept


def _answered(kept: dict, questions: Questions, outcome: Outcome) -> bool:
    """Whether these are answers to the same questions, given at the step that the run ended at."""
    asked = kept.get("asked") or {}
    at_the_end = str(asked.get("checkpoint")).startswith(f"step {outcome.summary['step']}, ")
    return at_the_end and asked == _asked(questions, None) | {"checkpoint": asked["checkpoint"]}


def _newest(workdir: Path) -> Path | None:
    """A run's newest checkpoint that has a manifest, whether or not it is whole."""
    folders = (workdir / "checkpoints" / str(step) for step in reversed(step_folders(workdir / "checkpoints")))
    return next((folder for folder in folders if (folder / sealed.NAME).is_file()), None)


def _asked(questions: Questions, checkpoint: Path | None) -> dict:
    """What an answer is the answer to. The digest is there because trained again, the same step is another."""
    identity = None if checkpoint is None else f"step {checkpoint.name}, {sealed.identity(checkpoint)}"
    return {"questions": dataclasses.asdict(questions), "checkpoint": identity, "version": 2}


def _measure(
    outcome: Outcome, checkpoint: Path, questions: Questions, compiled: dict
) -> tuple[dict[str, float], np.ndarray]:
    """(held-out losses, sampled videos) of a run."""
    config, run, trainable = open_run(outcome.workdir, weights=questions.weights, checkpoint=checkpoint)
    config.sample.count, config.sample.seed = questions.samples, 0
    source = prompts.open_told(config)
    held_out = pipeline.held_out(source, questions.clips, **clip_settings(config))
    batches = split_batch(held_out, min(AT_ONCE, questions.clips))
    if not compiled:
        compiled["held_out"] = evaluation.make_held_out(run)
        tokens = prompts.for_samples(config, batches)
        compiled["sampler"] = showing.Sampler(run, config, tokens=tokens)
    losses = evaluation.held_out_losses(run, trainable, batches, times=TIMES, compiled=compiled["held_out"])
    values = evaluation.summarise(losses)
    aligned = [values.pop(a.name) for a in run.task.alignments]
    if aligned:
        values["aligned"] = aligned[0]
    return values, compiled["sampler"](trainable["model"], run.frozen, at_once=min(AT_ONCE, questions.samples))


# ---- The table


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation over seeds, n - 1) of what is not NaN; the deviation of one value is NaN."""
    known = np.asarray([v for v in values if np.isfinite(v)], float)
    if not len(known):
        return np.nan, np.nan
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else np.nan


def shown_columns(rows: Sequence[Row]) -> list[str]:
    """The columns that some row has, in order."""
    return [name for name in COLUMNS if any(np.isfinite(row.values.get(name, [np.nan])).any() for row in rows)]


def markdown(rows: Sequence[Row], remarks: Sequence[str] = ()) -> str:
    """A table for each data set: mean ± standard deviation over seeds, 3 significant digits."""
    parts = []
    for data in dict.fromkeys(row.data for row in rows):
        own = [row for row in rows if row.data == data]
        columns = shown_columns(own)
        lines = [f"### {data}", ""]
        lines.append("| " + " | ".join(["method", "seeds", *(COLUMNS[name] for name in columns)]) + " |")
        lines.append("|" + "---|" * (2 + len(columns)))
        for row in own:
            cells = [cell(*spread(row.values.get(name, []))) for name in columns]
            lines.append("| " + " | ".join([row.method, str(len(row.seeds) or ""), *cells]) + " |")
        parts.append("\n".join(lines))
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(parts) + "\n"


def cell(mean: float, deviation: float) -> str:
    """'0.123 ± 0.004': the deviation to two digits, the mean to the same place."""
    if not np.isfinite(mean):
        return ""
    if not np.isfinite(deviation) or deviation == 0:
        return f"{mean:.3g}"
    places = int(np.clip(1 - np.floor(np.log10(deviation)), 0, 6))
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def by_run(rows: Sequence[Row]) -> list[dict]:
    """One flat row a run, for the CSV."""
    return [
        {"data": row.data, "method": row.method, "seed": seed}
        | {name: values[k] for name, values in row.values.items() if k < len(values)}
        for row in rows
        for k, seed in enumerate(row.seeds or ("",))
    ]


def as_json(rows: Sequence[Row], remarks: Sequence[str], questions: Questions) -> dict:
    """Everything of the table, with NaN as null."""

    def number(value):
        return value if np.isfinite(value) else None

    found = [
        {
            "data": row.data,
            "method": row.method,
            "seeds": list(row.seeds),
            "columns": {
                name: dict(zip(("mean", "std"), map(number, spread(values)), strict=True))
                | {"values": [number(v) for v in values]}
                for name, values in row.values.items()
            },
        }
        for row in rows
    ]
    return {"asked": dataclasses.asdict(questions), "rows": found, "remarks": list(remarks)}


def write(folder: Path, rows: Sequence[Row], remarks: Sequence[str], questions: Questions) -> list[Path]:
    """compare.md and compare.json in `folder`; their paths."""
    paths = [folder / "compare.md", folder / "compare.json"]
    write_atomic(paths[0], markdown(rows, remarks))
    write_atomic(paths[1], json.dumps(as_json(rows, remarks, questions), indent=2, ensure_ascii=False) + "\n")
    return paths


def draw(rows: Sequence[Row], path: Path) -> None:
    """The table as a picture: a panel a column, dashed lines for real clips."""
    panels: dict[str, dict] = {}
    for row in rows:
        if row.method != REAL:
            for name in shown_columns([r for r in rows if r.data == row.data and r.method != REAL]):
                panels.setdefault(row.data, {}).setdefault(name, {})[row.method] = row.values.get(name, [])
    real = {row.data: {name: values[0] for name, values in row.values.items()} for row in rows if row.method == REAL}
    figure.draw(panels, real, path, titles=COLUMNS)
