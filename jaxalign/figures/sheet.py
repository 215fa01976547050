"""A sheet of pictures: rows with a name on the left, columns with a heading, a line of explanation below."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxalign.figures.correspondence import INK

GREY = "#666666"
LABELS = 1.62  # inches for the names of the rows


def picture_sheet(
    rows: Sequence[tuple[str, str]],
    columns: Sequence[str],
    *,
    aspect: float,
    cell: float = 1.3,
    title: str = "",
    note: str = "",
    right: float = 0.1,
    gaps: Sequence[int] = (),
) -> tuple[Figure, list[list[Axes]]]:
    """An empty sheet: its Figure and axes [row][column], without ticks, thinly framed.

    rows: (name, details) of each row; columns: headings. aspect: height over width of a picture; cell: inches
    of its width. right: inches left free for a legend. gaps: columns that keep some distance to the one before.
    """
    widths = []
    for column in range(len(columns)):
        widths += [0.1, 1.0] if column in gaps else [1.0]
    places = [k for k, width in enumerate(widths) if width == 1.0]
    height_of_row = cell * aspect
    above = 0.12 + 0.14 * max(1 + heading.count("\n") for heading in columns) + (0.28 if title else 0.0)
    inches = LABELS + cell * (sum(widths) + 0.03 * len(widths)) + right
    lines = textwrap.wrap(note, width=max(40, int(inches * 19.5)))
    below = 0.1 + 0.14 * len(lines)
    height = above + below + len(rows) * height_of_row * 1.04
    figure = Figure(figsize=(inches, height), dpi=160, facecolor="white")
    grid = figure.add_gridspec(
        len(rows),
        len(widths),
        width_ratios=widths,
        wspace=0.03,
        hspace=0.04,
        left=LABELS / inches,
        right=1 - right / inches,
        top=1 - above / height,
        bottom=below / height,
    )
    axes = [[figure.add_subplot(grid[row, place]) for place in places] for row in range(len(rows))]
    for line, (name, details) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(color="#bbbbbb", linewidth=0.6)
        _name(figure, line[0], inches, height, name, details)
    for axis, heading in zip(axes[0], columns, strict=True):
        axis.set_title(heading, fontsize=8, color=INK, pad=3)
    if title:
        figure.text(0.08 / inches, 1 - 0.08 / height, title, ha="left", va="top", fontsize=10.5, color=INK)
    figure.text(
        0.08 / inches, 0.06 / height, "\n".join(lines), ha="left", va="bottom", fontsize=7, color=GREY, linespacing=1.3
    )
    return figure, axes


def _name(figure: Figure, axis: Axes, inches: float, height: float, name: str, details: str) -> None:
    """The name of a row, bold, its details below it in grey, both as one block at the height of the row's middle."""
    bold = textwrap.wrap(name, 20) or [""]
    grey = [part for line in details.splitlines() for part in textwrap.wrap(line, 28)]
    box = axis.get_position()
    top = (box.y0 + box.y1) / 2 + (0.15 * len(bold) + 0.125 * len(grey)) / 2 / height
    style = {"ha": "left", "va": "top", "linespacing": 1.25}
    figure.text(0.08 / inches, top, "\n".join(bold), fontsize=8.5, color=INK, weight="bold", **style)
    top -= 0.15 * len(bold) / height
    figure.text(0.08 / inches, top, "\n".join(grey), fontsize=7, color=GREY, **style)


def show(axis: Axes, image: np.ndarray, size: tuple[int, int], **options: Any) -> None:
    """Draw an image over (height, width) pixels of the video, whatever its own grid: tokens as squares."""
    height, width = size
    options = {"interpolation": "nearest", "aspect": "auto"} | options
    axis.imshow(image, extent=(0, width, height, 0), **options)
    axis.set(xlim=(0, width), ylim=(height, 0))


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 … count-1, evenly spaced, the first and the last among them."""
    return sorted({round(float(k)) for k in np.linspace(0, count - 1, min(most, count))})


def frame_of(index: int, frames: int, tokens: int) -> int:
    """The token frame, of `tokens`, that shows picture `index` of `frames`."""
    return min(int((index + 0.5) * tokens / frames), tokens - 1)


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Write the figure as PNG, if `path` is given; returns it."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure
