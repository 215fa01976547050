"""Optical flow as colours: hue is direction, saturation is speed, on the colour wheel of the Middlebury benchmark.

Baker et al., A Database and Evaluation Methodology for Optical Flow (IJCV 2011): right is red, down orange to
yellow, left between cyan and blue, up violet; the steps between the six corner colours are unequal, as for the eye.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, UInt8
from matplotlib.figure import Figure

from jaxalign.figures.correspondence import INK
from jaxalign.figures.sheet import evenly, frame_of, picture_sheet, save, show

# Six colours and how many steps the wheel takes from each to the next.
CORNERS = (((255, 0, 0), 15), ((255, 255, 0), 6), ((0, 255, 0), 4), ((0, 255, 255), 11), ((0, 0, 255), 13))
CORNERS = (*CORNERS, ((255, 0, 255), 6))
FULL = 99.9  # percentile of the speeds of a clip that gets full saturation: outliers do not bleach the rest


def colour_wheel() -> Float[np.ndarray, "55 3"]:
    """The 55 colours of the wheel in [0, 1], from red over yellow, green, cyan, blue and magenta."""
    colours = []
    for (start, steps), (end, _) in zip(CORNERS, (*CORNERS[1:], CORNERS[0]), strict=True):
        turn = np.sign(np.subtract(end, start))  # the one channel that comes or goes
        colours += [start + turn * (255 * k // steps) for k in range(steps)]
    return np.asarray(colours) / 255


def flow_colours(
    flow: Float[np.ndarray, "*axes h w 2"], *, largest: float | int | None = None
) -> UInt8[np.ndarray, "*axes h w 3"]:
    """Flow (x to the right, y down, in pixels) as colours; no motion is white.

    largest: the speed in pixels at full saturation (default: the largest one here); what is faster is darkened,
    what is not finite is black.
    """
    finite = np.isfinite(flow).all(axis=-1)
    flow = np.where(finite[..., None], flow, 0.0).astype(np.float64)
    speed = np.hypot(flow[..., 0], flow[..., 1])
    largest = float(speed.max()) if largest is None else largest
    relative = speed / max(largest, 1e-9)
    wheel = colour_wheel()
    place = (np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi + 1) / 2 * (len(wheel) - 1)
    before = np.floor(place).astype(int)
    part = (place - before)[..., None]
    colour = (1 - part) * wheel[before] + part * wheel[(before + 1) % len(wheel)]
    inside = 1 - np.minimum(relative, 1)[..., None] * (1 - colour)
    colour = np.where(relative[..., None] <= 1 + 1e-9, inside, colour * 0.75)
    return np.floor(255 * np.where(finite[..., None], colour, 0.0) + 1e-6).astype(np.uint8)


def legend(side: int) -> UInt8[np.ndarray, "n n 4"]:
    """The wheel as a disc with a transparent outside: what each direction and speed looks like."""
    y, x = np.mgrid[:side, :side] * (2 / (side - 1)) - 1
    distance = np.hypot(x, y)
    inside = np.stack([x, y], axis=-1) * np.minimum(1, 1 / np.maximum(distance, 1))[..., None]
    colours = flow_colours(inside, largest=1.0)
    opaque = np.clip((1 - distance) * side / 2 + 0.5, 0, 1)  # an edge that fades over one pixel
    return np.concatenate([colours, (opaque[..., None] * 255).astype(np.uint8)], axis=-1)


def flow_figure(
    video: UInt8[np.ndarray, "t h w 3"],
    panels: Mapping[str, Float[np.ndarray, "..."] | Float[Array, "..."]],
    path: str | Path | None = None,
    *,
    frames: int = 8,
    title: str = "",
) -> Figure:
    """Frames of a clip, and below each the flow to the next frame, a row a panel (flow [t-1, h', w', 2], pixels).

    All rows share one scale, so that equal colours are equal speeds. Written as PNG when `path` is given; the
    Figure is returned. Raises ValueError for what is not a flow.
    """
    panels = {name: np.asarray(flow, np.float32) for name, flow in panels.items()}
    for name, flow in panels.items():
        if flow.ndim != 4 or flow.shape[-1] != 2:
            raise ValueError(f"panel {name!r}: flow must be [t, h, w, 2], got shape {flow.shape}")
    speeds = {name: np.linalg.norm(flow, axis=-1) for name, flow in panels.items()}
    largest = max(float(np.nanpercentile(speed, FULL)) for speed in speeds.values())
    pairs = max(1, len(video) - 1)
    shown, size = evenly(pairs, frames), video.shape[1:3]
    rows = [("video", "")]
    for name, flow in panels.items():
        speed = float(np.nanmean(speeds[name]))
        rows.append((name, f"{flow.shape[1]}×{flow.shape[2]} positions\nmean speed {speed:.2f} px"))
    figure, axes = picture_sheet(
        rows,
        [f"{k + 1} → {k + 2}" for k in shown],
        aspect=size[0] / size[1],
        title=title,
        right=1.35,
        note="Hue: direction of the motion to the next frame; saturation: its speed. White stands still; speeds above "
        f"the {FULL:g}th percentile of the clip are darkened.",
    )
    for column, k in enumerate(shown):
        show(axes[0][column], video[k], size)
        for line, flow in zip(axes[1:], panels.values(), strict=True):
            show(line[column], flow_colours(flow[frame_of(k, pairs, len(flow))], largest=largest), size)
    _draw_legend(figure, axes[0][-1], largest)
    return save(figure, path)


def _draw_legend(figure: Figure, beside, largest: float) -> None:
    """The wheel to the right of the first row, with the speed at its rim."""
    inches, height = figure.get_size_inches()
    box = beside.get_position()
    side = 0.78
    left, top = box.x1 + 0.32 / inches, box.y1 - 0.12 / height
    axis = figure.add_axes((left, top - side / height, side / inches, side / height))
    axis.imshow(legend(220), interpolation="bilinear")
    axis.set_axis_off()
    for direction, (x, y) in {"right": (1.1, 0.5), "left": (-0.1, 0.5), "up": (0.5, 1.1), "down": (0.5, -0.1)}.items():
        turned = 90 if direction in ("left", "right") else 0
        style = {"ha": "center", "va": "center", "fontsize": 6.5, "color": INK, "rotation": turned}
        axis.text(x, y, direction, transform=axis.transAxes, **style)
    rim = f"rim: {largest:.3g} px a frame"
    axis.text(0.5, -0.3, rim, transform=axis.transAxes, ha="center", va="center", fontsize=6.5, color=INK)
