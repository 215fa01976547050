"""How much a video moves, from its pixels alone: no flow network, no weights."""

import numpy as np
from jaxtyping import Float, UInt8


def _grey(video: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 luma in [0, 1]."""
    return (video.astype(np.float32) / 255) @ np.asarray([0.299, 0.587, 0.114], np.float32)


def motion_magnitude(video: UInt8[np.ndarray, "b t h w 3"]) -> Float[np.ndarray, " b"]:
    """Mean absolute difference of neighbouring frames, one value a clip, in [0, 1].

    0: a still; 1: every channel of every pixel jumps between black and white. Contrast and noise count as
    motion too: compare it between clips of one kind (e.g. samples of two runs). Raises ValueError for a
    single frame.
    """
    _check_length(video)
    magnitude = [np.abs(np.diff(clip.astype(np.float32), axis=0)).mean() / 255 for clip in video]
    return np.asarray(magnitude, np.float32)


def motion_energy_ratio(video: UInt8[np.ndarray, "b t h w 3"]) -> Float[np.ndarray, " b"]:
    """The share of a clip's gradient energy that lies in time: E[I_t²] / E[I_t² + I_x² + I_y²], per clip.

    I is luma; its differences are taken between neighbouring frames, columns and rows. Independent of
    contrast: with constant brightness I_t = −(v · ∇I), so a texture without preferred direction that moves
    at v pixels a frame gives about v² / (v² + 2) while v is small against the texture. 0: a still; 1:
    flicker without any texture; a clip of one colour gives 0. Raises ValueError for a single frame.
    """
    _check_length(video)
    ratios = []
    for clip in video:
        grey = _grey(clip)
        in_time, in_rows, in_columns = (float(np.square(np.diff(grey, axis=axis)).mean()) for axis in (0, 1, 2))
        total = in_time + in_rows + in_columns
        ratios.append(in_time / total if total else 0.0)
    return np.asarray(ratios, np.float32)


def _check_length(video: np.ndarray) -> None:
    if video.shape[1] < 2:
        raise ValueError(f"motion needs at least 2 frames a clip, got {video.shape[1]}")
