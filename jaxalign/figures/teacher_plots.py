"""Curves that compare teachers: IICR over the number of clusters, and spectra with the gap Δ."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from jaxalign.figures.curves import COLOURS, INK
from jaxalign.figures.sheet import GREY, save
from jaxalign.metrics.iicr import mean_iicr
from jaxalign.metrics.spectrum import HIGH, frequency_gap, radial_profile


def _plain(axis: Axes, title: str, across: str, up: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(across, fontsize=8.5, color=INK)
    axis.set_ylabel(up, fontsize=8.5, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _styles(count: int) -> list[tuple[str, str]]:
    """(colour, line) of so many curves; when the colours are through, the lines change."""
    return [(COLOURS[k % len(COLOURS)], ("-", "--", ":")[k // len(COLOURS) % 3]) for k in range(count)]


def iicr_figure(
    ks: Sequence[int], values: Mapping[str, Float[np.ndarray, "clips k"]], path: str | Path | None = None
) -> Figure:
    """IICR over k, a line a teacher: the mean over clips, with a band of the mean's standard error.

    Written as PNG when `path` is given; the Figure is returned.
    """
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axis = figure.subplots()
    for (name, found), (colour, line) in zip(values.items(), _styles(len(values)), strict=True):
        mean, count = mean_iicr(found), np.maximum((~np.isnan(found)).sum(axis=0), 1)
        variance = np.nansum(np.square(found - mean), axis=0) / np.maximum(count - 1, 1)
        error = np.sqrt(variance / count)
        axis.fill_between(ks, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        axis.plot(ks, mean, marker="o", linestyle=line, color=colour, linewidth=1.8, markersize=4, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(bottom=0)
    clips = max(len(found) for found in values.values())
    title = f"IICR, mean of {clips} clip{'' if clips == 1 else 's'}"
    _plain(axis, title, "clusters k", "min distance of centroids / max std within")
    axis.legend(fontsize=8, frameon=False)
    note = "Higher: things are well apart and keep their token over time. Band: standard error."
    figure.supxlabel(note, fontsize=7, color=GREY, x=0.01, ha="left")
    return save(figure, path)


def spectrum_figure(spectra: Mapping[str, Float[np.ndarray, "..."]], path: str | Path | None = None) -> Figure:
    """Radial profiles, the gaps Δ as bars, and below them the log spectra M [h, w] relative to frequency zero.

    Written as PNG when `path` is given; the Figure is returned.
    """
    across = max(3, min(len(spectra), 6))
    lines = -(-len(spectra) // across)
    figure = Figure(figsize=(max(9.2, 2.2 * across), 3.7 + 2.3 * lines), dpi=150, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, 2.3 * lines], hspace=0.03)
    profile, bars = above.subplots(1, 2, width_ratios=[1.35, 1])
    styles = _styles(len(spectra))
    gaps = {name: frequency_gap(spectrum) for name, spectrum in spectra.items()}
    profile.axvspan(HIGH, 1.0, color="#000000", alpha=0.05, linewidth=0)
    for (name, spectrum), (colour, line) in zip(spectra.items(), styles, strict=True):
        where, found = radial_profile(spectrum)
        profile.plot(where, found, marker="o", linestyle=line, color=colour, linewidth=1.8, markersize=4, label=name)
    profile.set_xlim(0, 1.0)
    _plain(profile, "radial profile", "spatial frequency (1: the grid's highest)", "log magnitude, zero frequency = 0")
    profile.legend(fontsize=8, frameon=False)
    names = [f"{name}\n{spectrum.shape[0]}×{spectrum.shape[1]} tokens" for name, spectrum in spectra.items()]
    bars.barh(range(len(gaps)), list(gaps.values()), color=[colour for colour, _ in styles], height=0.6)
    bars.set_yticks(range(len(gaps)), names)
    bars.invert_yaxis()
    for k, gap in enumerate(gaps.values()):
        inside = gap < 0.3 * min(gaps.values())
        style = {"va": "center", "ha": "left" if inside else "right", "fontsize": 8}
        bars.annotate(
            f"{gap:.2f}".replace("-", "−"), (gap, k), (4 if inside else -4, 0), textcoords="offset points",
            color="white" if inside else INK, **style,
        )  # fmt: skip
    _plain(bars, "gap Δ", "mean over the grey band, zero frequency = 0", "")
    bars.tick_params(axis="y", labelsize=7.5, length=0)
    relative = {name: s - s[s.shape[0] // 2, s.shape[1] // 2] for name, s in spectra.items()}
    lowest = min(float(np.percentile(found, 2)) for found in relative.values())
    maps = below.subplots(lines, across, squeeze=False).ravel()
    for axis in maps[len(relative) :]:
        axis.set_axis_off()
    for axis, (name, found) in zip(maps, relative.items(), strict=False):
        height, width = found.shape
        # Pixel edges such that zero frequency lies at the origin and the highest one at ±1.
        left, top = -(width // 2) - 0.5, -(height // 2) - 0.5
        extent = np.asarray([left, left + width, top + height, top]) * 2 / np.asarray([width, width, height, height])
        drawn = axis.imshow(found, cmap="magma", vmin=lowest, vmax=0, extent=tuple(extent), interpolation="nearest")
        angle = np.linspace(0, 2 * np.pi, 200)
        axis.plot(HIGH * np.cos(angle), HIGH * np.sin(angle), color="white", linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set(xlim=tuple(extent[:2]), ylim=tuple(extent[2:]))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(name, fontsize=8, color=INK)
    bar = below.colorbar(drawn, ax=list(maps), shrink=0.85, pad=0.01)
    bar.ax.tick_params(labelsize=7, colors=INK)
    bar.set_label("log magnitude", fontsize=7.5, color=INK)
    note = (
        "Lower Δ: smoother, more semantic tokens. It falls by up to ln 2 as a grid's side doubles: compare equal grids."
    )
    figure.supxlabel(note, fontsize=7, color=GREY, x=0.01, ha="left")
    return save(figure, path)
