"""Scores from CLIP's embeddings: whether frames of a video show the same thing, and whether it is what a text says."""

import numpy as np
from jaxtyping import Float


def temporal_consistency(frames: Float[np.ndarray, "n t d"]) -> Float[np.ndarray, "n"]:
    """(1/(t-1)) Σ_{k≥2} ½ [cos(φ_1, φ_k) + cos(φ_{k-1}, φ_k)] of each video's image embeddings, in float64.

    Raises ValueError for videos of one frame. Source: Align4Gen's CLIP consistency (methods §5).
    """
    if frames.ndim != 3 or frames.shape[1] < 2:
        raise ValueError(f"embeddings {frames.shape}: consistency in time needs [n, t, d] with at least two frames")
    x = _unit(frames)
    to_first = np.einsum("nd,ntd->nt", x[:, 0], x[:, 1:])
    to_previous = np.einsum("ntd,ntd->nt", x[:, :-1], x[:, 1:])
    return ((to_first + to_previous) / 2).mean(axis=1)


def text_similarity(frames: Float[np.ndarray, "n t d"], texts: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n"]:
    """CLIP-T: the mean over frames of cos(image, text) of each video, in float64 (papers often write it times 100)."""
    return np.einsum("ntd,nd->nt", _unit(frames), _unit(texts)).mean(axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
