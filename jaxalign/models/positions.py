"""Fixed position tables: computed where they are used, never stored; modules hold only what is trained."""

import numpy as np
from jaxtyping import Float, Shaped


def sincos_1d(width: int, positions: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "m width"]:
    """Sine-cosine table [m, width] of m scalar positions, [sin | cos], at frequencies 10000^(-2i / width).

    Computed in float64, returned in float32. Raises ValueError for an odd width.
    Source: Latte models/latte.py, get_1d_sincos_pos_embed_from_grid (after MAE).
    """
    if width % 2:
        raise ValueError(f"sin-cos positions need an even width, got {width}")
    frequencies = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.asarray(positions, np.float64).reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_2d(
    width: int, height_tokens: int, width_tokens: int, scale: float | int = 1.0
) -> Float[np.ndarray, "n width"]:
    """Sine-cosine table [height_tokens * width_tokens, width] in raster order; positions count tokens over `scale`.

    The first half of the channels encodes the column (upstream's width axis comes first), the second half the row.
    Raises ValueError unless 4 divides the width. Source: Latte models/latte.py, get_2d_sincos_pos_embed.
    """
    if width % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, got {width}")
    axes = (np.arange(length, dtype=np.float32) / np.float32(scale) for length in (height_tokens, width_tokens))
    rows, columns = np.meshgrid(*axes, indexing="ij")
    return np.concatenate([sincos_1d(width // 2, columns), sincos_1d(width // 2, rows)], axis=1)


def rotary_1d(num_channels: int, positions: Shaped[np.ndarray, "m"]) -> Float[np.ndarray, "m half"]:
    """Angles [m, channels / 2] of rotary embeddings, one a pair of channels: position · 10000^(-2i / channels).

    Computed in float64, returned in float32. Raises ValueError for an odd number of channels.
    Source: Su et al. 2021, equation 15; diffusers models/embeddings.py, get_1d_rotary_pos_embed.
    """
    if num_channels % 2:
        raise ValueError(f"rotary positions turn pairs of channels; {num_channels} channels are odd")
    frequencies = 10000.0 ** (-np.arange(0, num_channels, 2, dtype=np.float64) / num_channels)
    return (np.asarray(positions, np.float64)[:, None] * frequencies).astype(np.float32)
