"""Optical flow of clips on the host, while batches are made: what the source knows, or OpenCV's DIS.

A function here is a `Source.beside`: it sees the row of a clip as it will be seen, flipped and cropped, and returns
what is put into the batch beside it.
"""

import itertools

import numpy as np
from jaxtyping import Float, UInt8


def exact(part: str, row: dict) -> dict[str, np.ndarray]:
    """The flow that the source made with the clip, under the name `part`. Raises ValueError if it made none."""
    if "flow" not in row:
        raise ValueError(
            "config.motion.flow.name = 'exact': the source does not know the flow of its clips (only 'synthetic' "
            "does); write dis, or a flow network such as raft_large"
        )
    return {part: row["flow"]}


def dis(part: str, row: dict) -> dict[str, np.ndarray]:
    """OpenCV's DIS flow of the clip (Kroeger et al. 2016), under the name `part`."""
    return {part: dis_flow(row["video"])}


def dis_flow(video: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "s h w 2"]:
    """Flow from each of t frames to the next in pixels, fp32, s = t - 1, by DIS at its medium preset.

    Raises ImportError if OpenCV is not installed.
    """
    cv2 = opencv()
    # Small frames are enlarged: the method's patches of 8 pixels would span the things in them.
    factor = max(1, -(-256 // min(video.shape[1:3])))
    size = video.shape[2] * factor, video.shape[1] * factor
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    grey = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) if factor > 1 else frame for frame in grey]
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = np.stack([method.calc(a, b, None) for a, b in itertools.pairwise(grey)])
    t, h, w = video.shape[:3]
    return flows.reshape(t - 1, h, factor, w, factor, 2).mean(axis=(2, 4), dtype=np.float32) / np.float32(factor)


def opencv():
    """The module cv2. Raises ImportError that says how to get it."""
    try:
        import cv2
    except ImportError:
        raise ImportError(
            "config.motion.flow.name = 'dis' is OpenCV's optical flow: pip install -e '.[demo]' (or "
            "opencv-python-headless), or write a flow network such as raft_large"
        ) from None
    # Rows are made in several threads already; its own pool would fight them for the cores.
    cv2.setNumThreads(1)
    return cv2
