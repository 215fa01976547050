"""Where a clip moves: TSA's motion saliency (eq. 11) and the query positions that M-TSA keeps (eq. 12)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def motion_saliency(video: Float[Array, "b T H W 3"], grid: tuple[int, int, int]) -> Float[Array, "b t h w"]:
    """Sum over each tubelet's pixels of |Y_t − Y_{t−1}|, on [0, 1] pixels (TSA eq. 11); fp32.

    video: [b, T, H, W, 3] in [−1, 1]. grid: the teacher's token grid (t, h, w). The first token frame copies
    the second; with one token frame all is zero. Frames belong to token frames by the first rule that fits:
      T = p·t            equal tubelets of p frames
      T = p·t + 1        frame 0 is dropped first (VideoMAEv2 at 49 frames sees 48, methods.md §2)
      T = p·(t − 1) + 1  frame 0 is a token frame alone, as in a causal video VAE (49 frames, t = 13)
    but 9 frames on 3 are the last: such VAEs take four frames to one, and no teacher takes three.
    Where h or w does not divide the frame, a pixel counts for the cells it touches by the area in each.
    Raises ValueError for other numbers of frames and for a grid finer than the video.
    """
    t, h, w = grid
    _, frames, height, width, _ = video.shape
    if min(grid) < 1 or t > frames or h > height or w > width:
        raise ValueError(f"motion_saliency: no token grid {grid} on a video of {(frames, height, width)}")
    if t == 1:
        return jnp.zeros((len(video), 1, h, w), jnp.float32)
    video = video.astype(jnp.float32)
    if frames % t == 0 and (frames, t) != (9, 3):
        p = frames // t
    elif (frames - 1) % t == 0:
        p = (frames - 1) // t
        video = video[:, 1:]
    elif (frames - 1) % (t - 1) == 0:
        p = (frames - 1) // (t - 1)
        video = jnp.concatenate([jnp.repeat(video[:, :1], p - 1, axis=1), video], axis=1)
    else:
        raise ValueError(
            f"motion_saliency: {frames} frames do not make {t} token frames; it takes a multiple of {t}, "
            f"one more than that, or one more than a multiple of {t - 1}"
        )
    # The factor ½ is [−1, 1] -> [0, 1]; the offset cancels.
    change = 0.5 * jnp.abs(video[:, p:] - video[:, :-p]).sum(axis=-1)
    change = change.reshape(len(video), t - 1, p, height, width).sum(axis=2)
    delta = jnp.einsum("hy,btyx,wx->bthw", _cells(height, h), change, _cells(width, w), precision="highest")
    return jnp.concatenate([delta[:, :1], delta], axis=1)


def select_queries(saliency: Float[Array, "b t h w"], mask_ratio: float) -> Int[Array, "b t k"]:
    """The k = round(mask_ratio·h·w), at least 1, most salient positions of every frame (TSA eq. 12), int32.

    Positions count through the frame, h·w of them. Exactly k a frame (the paper keeps all ties), so that
    shapes are static; of ties the earlier position wins. Raises ValueError unless 0 < mask_ratio <= 1.
    """
    if not 0 < mask_ratio <= 1:
        raise ValueError(f"select_queries: mask_ratio = {mask_ratio}; expected 0 < it <= 1 (paper: 0.2)")
    b, t, h, w = saliency.shape
    k = max(1, round(mask_ratio * h * w))
    return jax.lax.top_k(saliency.reshape(b, t, h * w), k)[1].astype(jnp.int32)


def _cells(pixels: int, cells: int) -> Float[Array, "{cells} {pixels}"]:
    """Length of pixel x that lies in cell i, when `cells` equal cells cover all pixels."""
    edges = np.linspace(0, pixels, cells + 1)
    x = np.arange(pixels)
    overlap = np.minimum(edges[1:, None], x + 1) - np.maximum(edges[:-1, None], x)
    return jnp.asarray(np.maximum(overlap, 0), jnp.float32)
