"""X-T slices: one row of pixels (or of a teacher's tokens) through all frames of a clip, time downwards.

A still background gives vertical stripes, uniform motion slanted ones, flicker horizontal ones: the steadiness of
a whole clip in one picture (Align4Gen, fig. 4).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from jaxalign.figures.correspondence import MARK
from jaxalign.figures.sheet import picture_sheet, save, show
from jaxalign.figures.trajectories import moving_points


def xt_slice(video: UInt8[np.ndarray, "t h w c"], place: float) -> UInt8[np.ndarray, "t w c"]:
    """The row at `place` (0 top, 1 bottom) of every frame."""
    return video[:, min(int(place * video.shape[1]), video.shape[1] - 1)]


def xt_figure(
    clips: Mapping[str, tuple[UInt8[np.ndarray, "t h w 3"], Mapping[str, UInt8[np.ndarray, "t2 h2 w2 3"]]]],
    path: str | Path | None = None,
    *,
    places: Sequence[float] | None = None,
    cell: float = 1.75,
    title: str = "",
) -> Figure:
    """A row a clip: its first frame with the slice marked, the slice of the pixels, and one of each panel.

    clips: name -> (video, {panel: colours of its tokens [t', h', w', 3], see `pca.principal_colours`}); every
    clip has the same panels. places: height of each clip's slice, 0 to 1 (default: through what moves most).
    Written as PNG when `path` is given; the Figure is returned.
    """
    names = list(next(iter(clips.values()))[1])
    first = next(iter(clips.values()))[0]
    places = list(places) if places is not None else [moving_points(video, 1)[0][0] for video, _ in clips.values()]
    figure, axes = picture_sheet(
        [(name, f"{len(video)} frames, row {int(y * video.shape[1])}")
         for (name, (video, _)), y in zip(clips.items(), places, strict=True)],
        ["first frame", "pixels, x–t", *(_heading(name) for name in names)],
        aspect=first.shape[1] / first.shape[2],
        cell=cell,
        gaps=[1, 2] if names else [1],
        title=title,
        note="One row of the picture (green) through all frames, time downwards: vertical stripes stand still, slanted "
        "ones move, horizontal ones flicker. Teachers are shown in the colours of their principal components.",
    )  # fmt: skip
    for line, (video, panels), place in zip(axes, clips.values(), places, strict=True):
        size = video.shape[1:3]
        show(line[0], video[0], size)
        line[0].axhline(place * size[0], color=MARK, linewidth=1.6)
        for axis, images in zip(line[1:], (video, *panels.values()), strict=True):
            show(axis, xt_slice(images, place), (len(video), size[1]))
        line[1].set_ylabel("time ↓", fontsize=7, color="#666666", labelpad=2)
    return save(figure, path)


def _heading(name: str) -> str:
    """A teacher's name and its settings on two lines."""
    return "\n".join(name.split(" ", 1))
