"""How tokens [b, t, h, w, d] are brought from one grid to another, exactly as the papers' code does it.

Every interpolation is torch's with align_corners=False: positions are cell centres (methods.md §2).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Grid = tuple[int, int, int]  # tokens: (frames, rows, columns)


def resample_time(tokens: Float[Array, "b t h w d"], scale: int) -> Float[Array, "b s h w d"]:
    """Linear interpolation in time to scale·t frames (VideoREPA and TSA: ×2, 12 latent frames -> 24)."""
    if scale == 1:
        return tokens
    t = tokens.shape[1]
    position = np.clip((np.arange(t * scale) + 0.5) / scale - 0.5, 0, t - 1)  # of the new frames, in old ones
    before = np.floor(position).astype(int)
    after = np.minimum(before + 1, t - 1)
    weight = jnp.asarray((position - before)[:, None, None, None], tokens.dtype)
    return tokens[:, before] * (1 - weight) + tokens[:, after] * weight


def resize_space(tokens: Float[Array, "b t h w d"], size: tuple[int, int]) -> Float[Array, "b t i j d"]:
    """Every frame's tokens resized bilinearly to size (h, w), no antialiasing (Align4Gen: SAM2 -> 16×16)."""
    b, t, h, w, d = tokens.shape
    if (h, w) == tuple(size):
        return tokens
    return jax.image.resize(tokens, (b, t, *size, d), "bilinear", antialias=False)


def pool_time(tokens: Float[Array, "b t h w d"], factor: int) -> Float[Array, "b s h w d"]:
    """Frame 0 as it is, the others averaged in groups of `factor` (DINOv2's 49 frames -> CogVideoX's 13, §1).

    Raises ValueError unless factor divides t − 1.
    """
    if factor == 1:
        return tokens
    b, t, h, w, d = tokens.shape
    if (t - 1) % factor:
        raise ValueError(f"pool_time: {t} frames are not 1 + a multiple of {factor}")
    groups = tokens[:, 1:].reshape(b, (t - 1) // factor, factor, h, w, d)
    return jnp.concatenate([tokens[:, :1], groups.mean(axis=2)], axis=1)
