"""Methods beside each other: a panel a column of the table, a line of panels a data set, a point a seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxalign.figures.curves import COLOURS, INK

REAL_COLOUR = "#999999"


def draw(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    real: Mapping[str, Mapping[str, float]],
    path: str | Path | None = None,
    *,
    titles: Mapping[str, str] | None = None,
    across: int = 7,
) -> Figure:
    """`panels` {data: {column: {method: values of its seeds}}}; `real` {data: {column: value of real clips}}, a line.

    Points are seeds, the bar is mean ± standard deviation. Written as PNG when `path` is given. Raises ValueError when
    there is nothing to draw.
    """
    known = {data: {c: of for c, of in columns.items() if of} for data, columns in panels.items()}
    known = {data: columns for data, columns in known.items() if columns}
    if not known:
        raise ValueError("comparison: there is nothing to draw")
    titles = titles or {}
    lines = {data: -(-len(columns) // across) for data, columns in known.items()}
    wide = min(across, max(len(columns) for columns in known.values()))
    methods = list(dict.fromkeys(m for columns in known.values() for of in columns.values() for m in of))
    tall = 1.0 + 0.24 * len(methods)
    figure = Figure(figsize=(1.2 + 2.1 * wide, tall * sum(lines.values()) + 0.3), dpi=120, layout="constrained")
    parts = figure.subfigures(len(known), 1, squeeze=False, height_ratios=list(lines.values()))[:, 0]
    for part, (data, columns) in zip(parts, known.items(), strict=True):
        part.suptitle(data, fontsize=9, color=INK, x=0.01, ha="left")
        axes = part.subplots(lines[data], wide, squeeze=False)
        for axis in axes.ravel()[len(columns) :]:
            axis.set_axis_off()
        for k, (column, of) in enumerate(columns.items()):
            _panel(axes.ravel()[k], of, methods, real.get(data, {}).get(column))
            axes.ravel()[k].set_title(titles.get(column, column), fontsize=7.5, color=INK)
            if k % wide:
                axes.ravel()[k].set_yticklabels([])
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def _panel(axis: Axes, of: Mapping[str, Sequence[float]], methods: Sequence[str], real: float | None) -> None:
    if real is not None and np.isfinite(real):
        axis.axvline(real, color=REAL_COLOUR, linewidth=1, linestyle="--", zorder=0)
    for row, method in enumerate(methods):
        values = np.asarray([v for v in of.get(method, ()) if np.isfinite(v)])
        if not len(values):
            continue
        colour = COLOURS[row % len(COLOURS)]
        deviation = values.std(ddof=1) if len(values) > 1 else 0.0
        axis.plot(values, np.full(len(values), row), "o", color=colour, markersize=3, alpha=0.55, markeredgewidth=0)
        axis.errorbar(values.mean(), row, xerr=deviation, fmt="|", color=colour, markersize=9, linewidth=1.4)
    axis.set_yticks(range(len(methods)), methods, fontsize=7, color=INK)
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.tick_params(labelsize=6.5, colors=INK)
    axis.locator_params(axis="x", nbins=4)
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
