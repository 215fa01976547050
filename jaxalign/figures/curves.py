"""Curves over training steps, one panel a quantity. matplotlib by its objects: no global figure state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#762a83", "#e08214", "#01665e")
INK = "#333333"


def smooth(values: Sequence[float] | np.ndarray, halflife: float) -> np.ndarray:
    """Exponential running mean without a start-up bias; what is not finite is left out, not spread."""
    decay, total, weight = 0.5 ** (1 / halflife), 0.0, 0.0
    smoothed = []
    for value in values:
        total, weight = total * decay, weight * decay
        if math.isfinite(value):
            total, weight = total + value, weight + 1.0
        smoothed.append(total / weight if weight else math.nan)
    return np.asarray(smoothed)


def loss_curves(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path | None = None,
    *,
    keys: Sequence[str] | None = None,
    columns: int = 3,
) -> Figure:
    """Curves of `rows` ({'step': ..., 'loss': ...}, one dict a logged step), or of several runs by name.

    `keys`: which quantities, in this order (default: all that occur). The raw values are thin, their
    running mean is bold; a quantity with one value a run is a dot. Written as PNG when `path` is given; the
    Figure is returned. Raises ValueError when there is nothing to draw.
    """
    runs = rows if isinstance(rows, Mapping) else {"": rows}
    keys = list(keys or dict.fromkeys(key for run in runs.values() for row in run for key in row if key != "step"))
    series = {(run, key): [(r["step"], float(r[key])) for r in runs[run] if key in r] for run in runs for key in keys}
    keys = [key for key in keys if any(series[run, key] for run in runs)]
    if not keys:
        raise ValueError("loss_curves: no row holds any of the quantities to draw")

    columns = min(columns, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * lines), dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(keys) :]:
        axis.set_axis_off()
    for axis, key in zip(axes, keys, strict=False):
        shown = []
        for number, run in enumerate(runs):
            if not series[run, key]:
                continue
            steps, values = (np.asarray(column) for column in zip(*sorted(series[run, key]), strict=True))
            colour = COLOURS[number % len(COLOURS)]
            # A running mean lags: few points are joined as they are, many are averaged, each over a few.
            averaged = smooth(values, len(values) / 50) if len(values) >= 50 else values
            if len(values) >= 50:
                axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(
                steps,
                averaged,
                color=colour,
                linewidth=1.8,
                label=run or None,
                marker="o" if len(values) == 1 else None,
            )
            shown.append(values[np.isfinite(values)])
        shown = np.concatenate(shown)
        if shown.size and shown.min() > 0 and shown.max() / shown.min() > 30:
            axis.set_yscale("log")
        axis.set_title(key, fontsize=10, color=INK)
        axis.set_xlabel("step", fontsize=8, color=INK)
        axis.tick_params(labelsize=8, colors=INK)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if any(runs):
            axis.legend(fontsize=8, frameon=False)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure
