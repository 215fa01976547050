"""Loss against compute: every run's points, the lower envelope, the law through it and what it leaves over."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from jaxalign.figures.curves import INK
from jaxalign.metrics.scaling import Fitted, Point, mean_over_seeds

FIT = "#b2182b"
MARKERS = "osD^v"  # one for each number of tokens
BEYOND = 3.0  # the law is drawn so many times past the largest compute


def draw(
    points: Sequence[Point],
    front: Sequence[Point],
    laws: Sequence[Fitted],
    path: str | Path | None = None,
    *,
    note: str = "",
) -> Figure:
    """Points coloured by size, the envelope and the first law of compute with its interval; L(N, D) beside it, if any.

    `note` is written into the picture. Written as PNG when `path` is given. Raises ValueError without points.
    """
    if not points:
        raise ValueError("scaling: there are no points to draw")
    of_compute = [one for one in laws if "C" in one.law.variables][:1]
    of_size = [one for one in laws if "N" in one.law.variables][:1]
    rows = 2 if laws else 1
    columns = 2 if of_size else 1
    ratios = dict(height_ratios=[3.2, 1][:rows], width_ratios=[1.45, 1][:columns])
    figure = Figure(figsize=(7.6 + 4.4 * (columns - 1), 4.9 + 1.3 * (rows - 1)), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios)
    colours = _colours(points)
    _loss_by_compute(axes[0, 0], points, front, of_compute, colours, note)
    if rows == 2:
        axes[1, 0].sharex(axes[0, 0])
        axes[0, 0].tick_params(labelbottom=False)
        axes[0, 0].set_xlabel("")
        if of_compute:
            fitted = of_compute[0]
            compute = np.asarray([p.compute for p in fitted.points])
            _residuals(axes[1, 0], compute, fitted.points, fitted.law(compute), colours)
        axes[1, 0].set_xlabel("training compute (FLOPs)", fontsize=9, color=INK)
    if of_size:
        _size_and_data(axes[0, 1], axes[1, 1], of_size[0], colours)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def _colours(points: Sequence[Point]) -> dict[int, tuple]:
    """Parameters -> colour, dark for small; the palest yellow is left out."""
    sizes = sorted({p.parameters for p in points})
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(sizes)))
    return dict(zip(sizes, map(tuple, colours), strict=True))


def _loss_by_compute(axis: Axes, points, front, of_compute, colours, note: str) -> None:
    marker = dict(zip(sorted({p.clip_tokens for p in points}), MARKERS * 9, strict=False))
    runs: dict[str, list[Point]] = {}
    for point in points:
        runs.setdefault(point.run, []).append(point)
    labelled = set()
    for run in sorted(runs.values(), key=lambda r: (r[0].clip_tokens, r[0].parameters)):
        run = sorted(run, key=lambda p: p.compute)
        what = run[0].parameters, run[0].clip_tokens
        seeds = len({p.run for p in points if (p.parameters, p.clip_tokens) == what})
        label = f"{short(what[0])} parameters, {what[1]} tokens" + (f" × {seeds} runs" if seeds > 1 else "")
        x, y = [p.compute for p in run], [p.loss for p in run]
        axis.plot(x, y, color=colours[what[0]], linewidth=0.9, alpha=0.45)
        axis.plot(
            x,
            y,
            marker[what[1]],
            color=colours[what[0]],
            markersize=4,
            alpha=0.75,
            markeredgewidth=0,
            label=None if what in labelled else label,
        )
        labelled.add(what)
    axis.plot(
        [p.compute for p in front],
        [p.loss for p in front],
        "o",
        markersize=8,
        markerfacecolor="none",
        markeredgecolor=INK,
        markeredgewidth=1.1,
        label="lower envelope (mean over seeds)",
    )
    for fitted in of_compute:
        compute = np.asarray([p.compute for p in fitted.points])
        x = np.geomspace(compute.min() / 1.3, BEYOND * max(p.compute for p in points), 120)
        if fitted.replicates:
            many = np.stack([law(x) for law in fitted.replicates])
            low, high = np.quantile(many, [0.025, 0.975], axis=0)
            axis.fill_between(x, low, high, color=FIT, alpha=0.14, linewidth=0)
        inside = x <= compute.max()
        axis.plot(x[inside], fitted.law(x[inside]), color=FIT, linewidth=1.8, label=_law_text(fitted))
        axis.plot(x[~inside], fitted.law(x[~inside]), color=FIT, linewidth=1.2, linestyle=(0, (4, 3)))
        if fitted.law.floor:
            axis.axhline(fitted.law.floor, color=FIT, linewidth=0.8, linestyle=":", alpha=0.8)
            axis.annotate("E", (x[0], fitted.law.floor), (0, 3), textcoords="offset points", fontsize=8, color=FIT)
    losses = np.asarray([p.loss for p in points])
    lowest = min([losses.min(), *(one.law.floor for one in of_compute if one.law.floor > 0.4 * losses.min())])
    axis.set_ylim(0.96 * lowest, 1.06 * losses.max())
    axis.set_title("held-out denoising loss", fontsize=10, color=INK, loc="left")
    axis.set_xlabel("training compute (FLOPs)", fontsize=9, color=INK)
    axis.set_xscale("log")
    _log_loss(axis.yaxis, axis.get_ylim())
    axis.legend(fontsize=7.5, frameon=False, loc="upper right")
    if note:
        axis.text(0.02, 0.02, note, transform=axis.transAxes, fontsize=7.5, color=FIT, va="bottom", wrap=True)
    _tidy(axis)


def _law_text(fitted: Fitted) -> str:
    numbers = fitted.numbers()
    shown = [
        f"{name} = {v:.3g} [{low:.2g}, {high:.2g}]" for name, (v, low, high) in numbers.items() if name in "Eα" and v
    ]
    return f"{fitted.title}: " + ", ".join(shown)


def _residuals(axis: Axes, x: np.ndarray, points: Sequence[Point], predicted: np.ndarray, colours) -> None:
    """How far the points are from the law, in percent of it."""
    left = 100 * (np.asarray([p.loss for p in points]) / predicted - 1)
    axis.axhline(0, color=FIT, linewidth=1)
    axis.vlines(x, 0, left, color="#bbbbbb", linewidth=0.8)
    axis.scatter(x, left, c=[colours[p.parameters] for p in points], s=18, zorder=3, linewidths=0)
    reach = 1.2 * max(np.abs(left).max(), 0.1)
    axis.set_ylim(-reach, reach)
    axis.set_xscale("log")
    if x.max() < 20 * x.min():  # in little more than a decade a power of ten is one tick or none
        few = x.min() * (x.max() / x.min()) ** np.linspace(0, 1, 4)
        axis.set_xticks([float(f"{v:.1e}") for v in few], minor=False)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("residual (%)", fontsize=9, color=INK)
    _tidy(axis)


def _size_and_data(axis: Axes, below: Axes, fitted: Fitted, colours) -> None:
    """Measured against fitted loss of L(N, D), and what is left over by the tokens seen."""
    points = mean_over_seeds(fitted.points)
    loss = np.asarray([p.loss for p in points])
    tokens = np.asarray([p.tokens for p in points])
    values = np.asarray([p.parameters for p in points], float), tokens
    predicted = fitted.law(*values)
    limits = 0.96 * min(loss.min(), predicted.min()), 1.04 * max(loss.max(), predicted.max())
    axis.plot(limits, limits, color=FIT, linewidth=1.2)
    axis.scatter(predicted, loss, c=[colours[p.parameters] for p in points], s=18, alpha=0.85, linewidths=0)
    axis.set(xlim=limits, ylim=limits, xscale="log")
    _log_loss(axis.yaxis, limits)
    _log_loss(axis.xaxis, limits)
    numbers = fitted.numbers()
    text = "\n".join(f"{k} = {v:.3g}  [{low:.2g}, {high:.2g}]" for k, (v, low, high) in numbers.items())
    axis.text(0.04, 0.97, text, transform=axis.transAxes, fontsize=7.5, color=INK, va="top")
    axis.set_title("measured against L(N, D)", fontsize=10, color=INK, loc="left")
    axis.set_xlabel("fitted loss", fontsize=9, color=INK)
    _tidy(axis)
    _residuals(below, tokens, points, predicted, colours)
    below.set_xlabel("tokens seen", fontsize=9, color=INK)


def short(count: float | int) -> str:
    """1234567 -> '1.23 M'."""
    for size, letter in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def _log_loss(axis, limits: tuple[float, float]) -> None:
    """A logarithmic axis whose ticks are plain numbers, few of them even in less than a decade."""
    axis.axes.set_yscale("log") if axis.axis_name == "y" else axis.axes.set_xscale("log")
    low, high = limits
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1e9) if (high - low) / s <= 12)
    axis.set_ticks(np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step)
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks([], minor=True)


def _tidy(axis: Axes) -> None:
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
