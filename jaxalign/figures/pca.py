"""Tokens as colours: the first three principal components of a clip's tokens, shown as red, green and blue.

One PCA for all frames of a clip: the same token has the same colour in every frame, so colours that flicker
are tokens that flicker.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, UInt8
from matplotlib.figure import Figure

from jaxalign.figures.sheet import evenly, frame_of, picture_sheet, save, show
from jaxalign.metrics.iicr import unit_tokens

PERCENTILES = (1.0, 99.0)  # of a component: black and full colour; a few outliers do not grey out the rest


def principal_colours(tokens: Float[np.ndarray, "t h w d"]) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """Colours of the tokens of one clip, and the share of their variance that the three components hold.

    Tokens are brought to unit length first, as the alignment losses see them. A component's sign is arbitrary:
    it is turned so that its largest loading is positive, and stretched from its 1st to its 99th percentile.
    """
    t, h, w, d = tokens.shape
    points = unit_tokens(tokens).astype(np.float64)
    points -= points.mean(axis=0)
    covariance = points.T @ points / len(points)
    count = min(3, d)
    _, axes = scipy.linalg.eigh(covariance, subset_by_index=[d - count, d - 1])
    axes = axes[:, ::-1] * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(count)])[::-1]
    components = points @ axes
    total = np.trace(covariance)
    share = float(np.square(components).sum(axis=1).mean() / total) if total > 0 else 0.0
    low, high = np.percentile(components, PERCENTILES, axis=0)
    # A component that holds nothing (a clip of one colour) stays grey instead of showing rounding errors.
    flat = high - low < 1e-6
    scaled = np.where(flat, 0.5, (components - low) / np.where(flat, 1.0, high - low))
    colours = np.full((len(points), 3), 0.5)
    colours[:, :count] = scaled.clip(0, 1)
    return (colours * 255).round().astype(np.uint8).reshape(t, h, w, 3), share


def pca_figure(
    video: UInt8[np.ndarray, "t h w 3"],
    panels: Mapping[str, Float[np.ndarray, "..."] | Float[Array, "..."]],
    path: str | Path | None = None,
    *,
    frames: int = 8,
    title: str = "",
) -> Figure:
    """Frames of a clip, and below them the PCA colours of each panel's tokens [t', h', w', d] on it.

    Written as PNG when `path` is given; the Figure is returned. Raises ValueError for tokens that are not 4-D.
    """
    painted = {}
    for name, tokens in panels.items():
        if tokens.ndim != 4:
            raise ValueError(f"panel {name!r}: tokens must be [t, h, w, d], got shape {tokens.shape}")
        painted[name] = principal_colours(np.asarray(tokens, np.float32))
    shown, size = evenly(len(video), frames), video.shape[1:3]
    rows = [("video", "")]
    for name, (colours, share) in painted.items():
        grid = "×".join(str(n) for n in colours.shape[:3])
        rows.append((name, f"{grid} tokens of {panels[name].shape[-1]}\n{share:.0%} of the variance shown"))
    figure, axes = picture_sheet(
        rows,
        [f"frame {k + 1}" for k in shown],
        aspect=size[0] / size[1],
        title=title,
        note="Colours: the first three principal components of the unit tokens, one PCA for all frames of the clip. "
        "A thing that keeps its colour is one the teacher recognises in every frame. Colours of different rows "
        "have nothing to do with each other.",
    )
    for column, k in enumerate(shown):
        show(axes[0][column], video[k], size)
        for line, (colours, _) in zip(axes[1:], painted.values(), strict=True):
            show(line[column], colours[frame_of(k, len(video), len(colours))], size)
    return save(figure, path)
