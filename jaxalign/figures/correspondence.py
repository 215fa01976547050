"""The correspondence figure: where in other frames does a model find the point that a query marks?

Rows are query points on a real frame; a group of columns per model shows P over the positions of a few
other frames. For a query token i and a frame f, P_{i,f} = softmax over the positions j of f of cos(x_i,
x_j) / τ (TSA eq. 3; what the TSA loss compares). A sharp spot on the right thing is a good correspondence;
a veil over everything is none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, UInt8
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

# Transparent at chance level, then blue to red to yellow and opaque: readable on a darkened grey frame.
HEAT = LinearSegmentedColormap.from_list(
    "heat",
    [
        (0.0, (0.16, 0.23, 0.55, 0.0)),
        (0.25, (0.36, 0.20, 0.72, 0.55)),
        (0.5, (0.80, 0.16, 0.45, 0.85)),
        (0.75, (0.97, 0.50, 0.16, 0.95)),
        (1.0, (1.0, 0.95, 0.45, 1.0)),
    ],
)
INK = "#222222"
MARK = "#39ff88"
CELL = 1.25  # inches a picture


def correspondence(
    tokens: Float[np.ndarray, "t h w d"], query: tuple[int, int, int], temperature: float | int
) -> Float[np.ndarray, "t h w"]:
    """P of one query token (frame, row, column): for every frame a distribution over its positions."""
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    scores = unit @ unit[query] / temperature
    scores = np.exp(scores - scores.max(axis=(1, 2), keepdims=True))
    return scores / scores.sum(axis=(1, 2), keepdims=True)


def entropy(distribution: Float[np.ndarray, "h w"]) -> float:
    """−Σ P ln P in nats; ln(h·w) at chance."""
    p = distribution[distribution > 0]
    return float(-(p * np.log(p)).sum())


def moving_queries(
    video: UInt8[np.ndarray, "t h w 3"], grid: tuple[int, int, int], count: int, *, frame: int = 0
) -> list[tuple[int, int, int]]:
    """`count` positions of a token frame of `grid` (t, h, w) worth asking about: moving, textured, apart.

    The score of a position is how much its pixels change over the clip times how much they vary in space,
    so that neither a still background nor a moving flat patch is picked; each pick suppresses its
    surroundings. Where nothing moves the texture decides, and in a flat picture the places lie apart.
    """
    frames, rows, columns = grid
    grey = video.astype(np.float32).mean(axis=-1)
    height, width = grey.shape[1] // rows, grey.shape[2] // columns
    cells = grey[:, : rows * height, : columns * width].reshape(-1, rows, height, columns, width)
    change = np.abs(np.diff(cells, axis=0)).sum(axis=0).mean(axis=(1, 3)) / max(1, len(cells) - 1)
    if not change.any():  # one frame, or a still clip
        change = np.ones_like(change)
    still = cells[min(frame * video.shape[0] // frames, video.shape[0] - 1)]
    score = change * still.std(axis=(1, 3)) + 1e-6  # of zeros no surroundings could be suppressed
    score[[0, -1], :] *= 0.5  # what sits at the rim soon leaves the picture
    score[:, [0, -1]] *= 0.5
    picks = []
    y, x = np.mgrid[:rows, :columns]
    for _ in range(min(count, rows * columns)):
        i, j = np.unravel_index(int(score.argmax()), score.shape)
        picks.append((frame, int(i), int(j)))
        near = np.hypot((y - i) / rows, (x - j) / columns)
        score = score * (1 - np.exp(-((near / 0.25) ** 2)))
        score[i, j] = -1.0
    return picks


def _shown_frame(video: np.ndarray, index: int, frames: int) -> np.ndarray:
    """The picture in the middle of token frame `index` out of `frames`."""
    return video[min(int((index + 0.5) * len(video) / frames), len(video) - 1)]


def _same_place(query: tuple[int, int, int], first: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, int, int]:
    """The token of another grid whose centre is nearest to that of a token of the first grid."""
    return tuple(min(int((q + 0.5) * n / m), n - 1) for q, m, n in zip(query, first, other, strict=True))


def correspondence_figure(
    video: UInt8[np.ndarray, "t h w 3"],
    panels: Mapping[str, Float[np.ndarray, "..."] | Float[Array, "..."]],
    queries: Sequence[tuple[int, int, int]],
    temperature: float | int,
    path: str | Path | None = None,
    *,
    frames: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """The figure as PNG at `path` (if given) and as a matplotlib Figure.

    video: [t, h, w, 3] uint8, the clip at any size. panels: title -> tokens [t', h', w', d] of one model on
    it; grids may differ. queries: (frame, row, column) in tokens of the FIRST panel. frames: the token
    frames of the first panel to look for them in (default: two later ones, near and far, else two earlier
    ones). All panels share one colour scale: P over chance, logarithmic, so 1 (transparent) says nothing is
    known. Small numbers are entropies. Raises ValueError for tokens that are not 4-D and for queries or
    frames outside of the grid.
    """
    panels = {name: np.asarray(tokens, np.float32) for name, tokens in panels.items()}
    for name, tokens in panels.items():
        if tokens.ndim != 4:
            raise ValueError(f"panel {name!r}: tokens must be [t, h, w, d], got shape {tokens.shape}")
    first = next(iter(panels.values())).shape[:3]
    if bad := [q for q in queries if not all(0 <= i < n for i, n in zip(q, first, strict=True))]:
        raise ValueError(f"query {bad[0]} is outside of the first panel's grid {first}")
    frames = list(frames) if frames is not None else _other_frames(queries[0][0], first[0])
    if bad := [frame for frame in frames if not 0 <= frame < first[0]]:
        raise ValueError(f"frame {bad[0]} is outside of the first panel's {first[0]} token frames")

    maps = {}
    for name, tokens in panels.items():
        for row, query in enumerate(queries):
            p = correspondence(tokens, _same_place(query, first, tokens.shape[:3]), temperature)
            for frame in frames:
                maps[name, row, frame] = p[_same_place((frame, 0, 0), first, tokens.shape[:3])[0]]
    sharpest = max(float(p.max()) * p.size for p in maps.values())
    scale = LogNorm(1.0, max(2.0, sharpest))
    return _draw(video, list(panels), queries, frames, first, maps, scale, temperature, title, path)


def _other_frames(query_frame: int, count: int) -> list[int]:
    """A near and a far frame, later ones if there are any."""
    later = [query_frame + max(1, (count - 1 - query_frame) // 3), count - 1]
    if later[1] > query_frame:
        return sorted(set(later))
    return sorted({0, max(0, query_frame - max(1, query_frame // 3))} - {query_frame}) or [query_frame]


def _draw(video, names, queries, frames, first, maps, scale, temperature, title, path) -> Figure:
    """Lay the pictures out: one column for the query, a gap, then a group of columns per panel."""
    aspect = video.shape[1] / video.shape[2]
    widths = [1.0] + ([0.12] + [1.0] * len(frames)) * len(names) + [0.12, 0.09]
    inches = CELL * (sum(widths) + 0.035 * len(widths)) + 0.75
    row = CELL * aspect
    above, below = 0.56 + (0.34 if title else 0.0), 0.3
    height = above + below + len(queries) * row * 1.04
    heading = {"ha": "center", "va": "bottom", "fontsize": 9.5, "color": INK, "weight": "bold"}
    heading_at = 1 - (above - 0.27) / height
    figure = Figure(figsize=(inches, height), dpi=160, facecolor="white")
    sheet = figure.add_gridspec(
        len(queries),
        len(widths),
        width_ratios=widths,
        wspace=0.035,
        hspace=0.04,
        left=0.08 / inches,
        right=1 - 0.62 / inches,
        top=1 - above / height,
        bottom=below / height,
    )
    extent = (0, first[2], first[1], 0)  # every picture is drawn in tokens of the first panel

    def picture(row, column):
        axis = figure.add_subplot(sheet[row, column])
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color="#bbbbbb", linewidth=0.6)
        return axis

    for number, query in enumerate(queries):
        axis = picture(number, 0)
        axis.imshow(_shown_frame(video, query[0], first[0]), extent=extent, interpolation="nearest", aspect="auto")
        centre = (query[2] + 0.5, query[1] + 0.5)
        for colour, width in (("black", 3.4), (MARK, 1.8)):
            axis.plot(*centre, marker="s", markersize=9, mfc="none", mec=colour, mew=width)
        if number == 0:
            axis.set_title(f"frame {query[0] + 1}", fontsize=8, color=INK, pad=3)
            box = axis.get_position()
            figure.text((box.x0 + box.x1) / 2, heading_at, "query", **heading)
        column = 2
        for name in names:
            for place, frame in enumerate(frames):
                axis = picture(number, column)
                back = _shown_frame(video, frame, first[0]).astype(np.float32).mean(axis=-1) / 255
                axis.imshow(0.08 + 0.5 * back, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto")
                p = maps[name, number, frame]
                heat = axis.imshow(
                    p * p.size, cmap=HEAT, norm=scale, extent=extent, interpolation="nearest", aspect="auto"
                )
                axis.text(
                    0.97,
                    0.04,
                    f"{entropy(p):.1f}",
                    transform=axis.transAxes,
                    ha="right",
                    va="bottom",
                    fontsize=6.5,
                    color="white",
                    bbox={"boxstyle": "round,pad=0.15", "facecolor": "black", "alpha": 0.55, "linewidth": 0},
                )
                if number == 0:
                    axis.set_title(f"frame {frame + 1}", fontsize=8, color=INK, pad=3)
                    if place == 0:
                        start = axis.get_position().x0
                    if place == len(frames) - 1:
                        figure.text((start + axis.get_position().x1) / 2, heading_at, name, **heading)
                column += 1
            column += 1
    bar = figure.add_subplot(sheet[:, -1])
    figure.colorbar(heat, cax=bar)
    bar.set_facecolor("#303030")
    bar.tick_params(labelsize=7, colors=INK, length=2)
    ticks = [4**power for power in range(8) if 4**power <= scale.vmax]
    bar.set_yticks(ticks, [f"{tick}×" for tick in ticks])
    bar.set_yticks([], minor=True)
    bar.set_title("P / chance", fontsize=7, color=INK, loc="left", pad=3)
    chance = " or ".join(dict.fromkeys(f"{np.log(p.size):.1f}" for p in maps.values()))
    note = f"P = softmax(cos / τ) over the positions of one frame, τ = {temperature:g}."
    note += f" In the corner: its entropy in nats (chance: {chance})."
    figure.text(0.08 / inches, 0.09 / height, note, ha="left", va="bottom", fontsize=7, color="#666666")
    if title:
        figure.text(0.08 / inches, 1 - 0.08 / height, title, ha="left", va="top", fontsize=10, color=INK)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure
