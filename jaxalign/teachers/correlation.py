"""RAFT's correlation features: how well every position of one frame matches the neighbourhood of where its flow points.

The product of all pairs of positions is averaged over 2x2 cells of the second frame three times, and each of the four
levels is read bilinearly in a window of (2r + 1)² around the target, zeros outside (RAFT section 3.2; SEA-RAFT has the
same). Averaging is linear, so it is done on the second frame's features instead of the products.

The products are kept, for one pair of frames or a few at a time. Gathering the second frame's features in every window
and multiplying there needs no volume, but takes longer: on 2 busy CPU cores (radius 4; volume once + one lookup) it was
18 + 3 ms and 17 MiB against 0 + 27 ms and 8 MiB at 32x48 positions, and 604 + 18 ms and 170 MiB against 0 + 152 ms and
7 MiB at 60x90: 6 and 2 times as long for RAFT's 12 lookups.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

LEVELS = 4


def pyramid(features: Float[Array, "b h w c"]) -> list[Float[Array, "b _ _ c"]]:
    """The second frame's features at four resolutions: means over 2x2 cells, a last odd row or column is dropped.

    Source: avg_pool2d in RAFT's core/corr.py; the bilinear halving in SEA-RAFT's gives the same numbers.
    """
    levels = [features]
    while len(levels) < LEVELS:
        x = levels[-1]
        b, h, w, c = x.shape
        cells = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
        levels.append(cells.astype(jnp.float32).mean((2, 4)).astype(x.dtype))
    return levels


def all_pairs(first: Float[Array, "b h w c"], second: Float[Array, "b h w c"]) -> list[Float[Array, "b h w _ _"]]:
    """Products of every position of `first` with every one of `second` over √c, at four resolutions; fp32."""
    return [
        jnp.einsum("bhwc,byxc->bhwyx", first, level, preferred_element_type=jnp.float32) * first.shape[-1] ** -0.5
        for level in pyramid(second)
    ]


def look_up(
    volumes: Sequence[Float[Array, "b h w _ _"]], targets: Float[Array, "b h w 2"], radius: int
) -> Float[Array, "b h w k"]:
    """Correlations around `targets` (x, y in positions of the full grid), k = 4·(2r + 1)² channels, fp32.

    Within a level the channel is (dx + r)·(2r + 1) + dy + r: RAFT's core/corr.py counts so (it calls dx dy and dy dx),
    and trained weights depend on it.
    """

    def read(volume: Array, target: Array) -> Array:
        # A slice of fixed size and two small products with tent weights, which are zero outside the frame: no padding
        # of the volume, no gather of single values (2.4 times as slow on CPU).
        y, y_weights = _window(target[1], volume.shape[0], radius)
        x, x_weights = _window(target[0], volume.shape[1], radius)
        window = lax.dynamic_slice(volume, (y, x), (y_weights.shape[1], x_weights.shape[1]))
        found = jnp.matmul(y_weights, window, precision=lax.Precision.HIGHEST)
        return jnp.matmul(x_weights, found.T, precision=lax.Precision.HIGHEST).reshape(-1)

    everywhere = jax.vmap(jax.vmap(jax.vmap(read)))
    return jnp.concatenate([everywhere(volume, targets / 2**level) for level, volume in enumerate(volumes)], axis=-1)


def _window(centre: Float[Array, ""], length: int, radius: int) -> tuple[Int[Array, ""], Float[Array, "side k"]]:
    """Start of a slice of k positions around `centre`, and their tent weights at centre − r ... centre + r."""
    k = min(length, 2 * radius + 2)
    start = jnp.clip(jnp.floor(centre).astype(jnp.int32) - radius, 0, length - k)
    points = centre + jnp.arange(-radius, radius + 1)
    return start, jnp.maximum(1 - jnp.abs(points[:, None] - (start + jnp.arange(k))), 0)
