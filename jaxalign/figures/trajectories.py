"""Trajectories: points followed from frame to frame by nothing but the similarity of a teacher's tokens.

What TSA and M-TSA hand to the student, read as tracking: P = softmax(cos / τ) over the positions of the next
frame says where a token has gone. A teacher with good correspondences keeps its points on the things that they
began on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.patheffects
import numpy as np
from jaxtyping import Array, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxalign.figures.correspondence import moving_queries
from jaxalign.figures.sheet import evenly, frame_of, picture_sheet, save, show
from jaxalign.metrics.iicr import unit_tokens

# Bright and unlike one another on a darkened picture, for the colour-blind too (after Okabe and Ito).
COLOURS = ("#ffd23f", "#3ec1ff", "#ff6f59", "#43e08a", "#d896ff", "#ffffff", "#ff9f1c", "#8be9e0")
TEMPERATURE = 0.1  # the paper's
REACH = 1  # positions around the best one whose weighted mean is the new place
MEMORY = 0.5  # share of the first frame's token in what is looked for
SURE = 0.5  # of the probability lies around the best position, or the place is a guess
TAIL = 6  # steps drawn behind a point


def token_at(frame: Float[np.ndarray, "h w d"], place: Float[np.ndarray, "2"]) -> Float[np.ndarray, "d"]:
    """The token at a (row, column) between centres, bilinear; token (i, j) has its centre at (i + ½, j + ½)."""
    last = np.asarray(frame.shape[:2]) - 1
    place = np.clip(place - 0.5, 0, last)
    low = np.minimum(place.astype(int), np.maximum(last - 1, 0))
    (i, j), (a, b) = low, place - low
    k, m = min(i + 1, last[0]), min(j + 1, last[1])
    top = (1 - b) * frame[i, j] + b * frame[i, m]
    return ((1 - a) * top + a * ((1 - b) * frame[k, j] + b * frame[k, m])).astype(frame.dtype)


def match(
    token: Float[np.ndarray, "d"], frame: Float[np.ndarray, "h w d"], temperature: float | int
) -> tuple[Float[np.ndarray, "2"], float]:
    """Where a unit token lies in a frame of unit tokens: a (row, column), and how sure, from 0 to 1.

    P = softmax(cos / temperature) over the frame (TSA, eq. 3). The place is the mean of P over the positions
    within REACH of its maximum: the mean over all of them would lie between two things that look alike. Sure:
    the part of P in there.
    """
    scores = frame @ token / temperature
    p = np.exp(scores - scores.max())
    p /= p.sum()
    i, j = np.unravel_index(int(p.argmax()), p.shape)
    rows = slice(max(0, i - REACH), i + REACH + 1)
    columns = slice(max(0, j - REACH), j + REACH + 1)
    near = p[rows, columns]
    y, x = np.mgrid[rows, columns][:, : near.shape[0], : near.shape[1]] + 0.5
    mass = near.sum()
    return np.asarray([(near * y).sum() / mass, (near * x).sum() / mass]), float(mass)


def follow(
    tokens: Float[np.ndarray, "t h w d"],
    points: Sequence[tuple[float | int, float | int]],
    *,
    temperature: float | int = TEMPERATURE,
) -> tuple[Float[np.ndarray, "n t 2"], Float[np.ndarray, "n t"]]:
    """Paths (row, column), in tokens, of points of the first frame, and how sure each place is.

    In every step the token that is looked for is half the one at the last place (things turn and change) and
    half the one at the beginning (a chain of small errors would drift away).
    """
    t, h, w, _ = tokens.shape
    unit = unit_tokens(tokens).reshape(tokens.shape)
    paths = np.zeros((len(points), t, 2))
    sure = np.ones((len(points), t))
    for n, point in enumerate(points):
        paths[n, 0] = np.clip(point, 0.5, np.maximum([h - 0.5, w - 0.5], 0.5))
        first = last = token_at(unit[0], paths[n, 0])
        for f in range(1, t):
            wanted = unit_tokens((MEMORY * first + (1 - MEMORY) * last)[None])[0]
            paths[n, f], sure[n, f] = match(wanted, unit[f], temperature)
            last = token_at(unit[f], paths[n, f])
    return paths, sure


def trajectory_figure(
    video: UInt8[np.ndarray, "t h w 3"],
    panels: Mapping[str, Float[np.ndarray, "..."] | Float[Array, "..."]],
    path: str | Path | None = None,
    *,
    points: Sequence[tuple[float | int, float | int]] | None = None,
    count: int = 6,
    frames: int = 8,
    temperature: float | int = TEMPERATURE,
    title: str = "",
) -> Figure:
    """Frames of a clip, a row a panel (tokens [t', h', w', d]), with the points where that panel takes them.

    points: (row, column) of the first frame in [0, 1] (default: `count` places that move). Written as PNG when
    `path` is given; the Figure is returned. Raises ValueError for tokens that are not 4-D and for points
    outside of the picture.
    """
    size = video.shape[1:3]
    points = list(points) if points is not None else moving_points(video, count)
    if bad := [point for point in points if not (0 <= point[0] <= 1 and 0 <= point[1] <= 1)]:
        raise ValueError(f"point {bad[0]} is outside of the picture: write (row, column) between 0 and 1")
    shown = evenly(len(video), frames)
    rows, followed = [], []
    for name, tokens in panels.items():
        tokens = np.asarray(tokens, np.float32)
        if tokens.ndim != 4:
            raise ValueError(f"panel {name!r}: tokens must be [t, h, w, d], got shape {tokens.shape}")
        t, h, w, _ = tokens.shape
        paths, sure = follow(tokens, [(y * h, x * w) for y, x in points], temperature=temperature)
        followed.append((paths / (h, w) * size, sure))
        rows.append((name, f"{t}×{h}×{w} tokens\nsure: {sure[:, 1:].mean() if t > 1 else 1:.0%}"))
    figure, axes = picture_sheet(
        rows,
        [f"frame {k + 1}" for k in shown],
        aspect=size[0] / size[1],
        title=title,
        note=f"Each point is looked for in the next frame by softmax(cos / τ) between tokens, τ = {temperature:g}; it "
        f"trails its last {TAIL} steps. Hollow, thin line: a guess, less than half of P lies around its maximum. Sure: "
        "the mean of that part.",
    )
    for line, (paths, sure) in zip(axes, followed, strict=True):
        for axis, k in zip(line, shown, strict=True):
            grey = video[k].astype(np.float32).mean(axis=-1, keepdims=True)
            show(axis, ((0.65 * video[k] + 0.35 * grey) * 0.85).astype(np.uint8), size, interpolation="bilinear")
            until = frame_of(k, len(video), paths.shape[1]) + 1
            for n in range(len(points)):
                _draw_path(axis, paths[n, :until], sure[n, :until], COLOURS[n % len(COLOURS)])
    return save(figure, path)


def moving_points(video: UInt8[np.ndarray, "t h w 3"], count: int) -> list[tuple[float, float]]:
    """Places of the first frame worth following, (row, column) in [0, 1]: see `moving_queries`."""
    grid = (len(video), min(16, video.shape[1]), min(16, video.shape[2]))
    return [((i + 0.5) / grid[1], (j + 0.5) / grid[2]) for _, i, j in moving_queries(video, grid, count)]


def _draw_path(axis: Axes, path: Float[np.ndarray, "t 2"], sure: Float[np.ndarray, "t"], colour: str) -> None:
    """The place, and the last steps to it: bold where the teacher was sure, a thin line where it guessed."""
    edge = [matplotlib.patheffects.withStroke(linewidth=2.6, foreground="black", alpha=0.5)]
    for f in range(max(1, len(path) - TAIL), len(path)):
        trusted = sure[f] >= SURE
        style = {"linewidth": 1.3, "path_effects": edge} if trusted else {"linewidth": 0.6, "alpha": 0.6}
        axis.plot(path[f - 1 : f + 1, 1], path[f - 1 : f + 1, 0], color=colour, solid_capstyle="round", **style)
    y, x = path[-1]
    axis.plot(x, y, "o", markersize=6.2, mfc="none", mec="black", mew=2.4, alpha=0.6)
    axis.plot(x, y, "o", markersize=5.4, mfc=colour if sure[-1] >= SURE else "none", mec=colour, mew=1.4)
