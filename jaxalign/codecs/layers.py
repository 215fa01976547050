"""What the autoencoders share: convolutions, GroupNorm, nearest upsampling, the posterior, tiles.

Channels last, [b, t, h, w, c] or [n, h, w, c]. Everything computes in the dtype of the weights, norms and the posterior
in fp32. Attributes bear diffusers' names.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key, UInt32

# A typed key or a raw one.
AnyKey = Key[Array, ""] | UInt32[Array, "2"]


# ---- modules ------------------------------------------------------------------------------------------------------


class Numbered(nnx.Module):
    """Modules under the attributes '0', '1', ...: upstream's ModuleList."""

    def __init__(self, modules: Sequence[nnx.Module]):
        self.count = len(modules)
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def __iter__(self) -> Iterator[nnx.Module]:
        return (getattr(self, str(index)) for index in range(self.count))


class Conv(nnx.Module):
    """Convolution over the last axes before the channels, as many as `size` has; `padding` as lax takes it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: Sequence[int],
        *,
        stride: int = 1,
        padding: str | Sequence[tuple[int, int]] = "SAME",
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding = stride, padding if isinstance(padding, str) else tuple(padding)
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (*size, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch2 d"]:
        kernel, bias = self.kernel[...], self.bias[...]
        axes = kernel.ndim - 2
        if kernel.size == kernel.shape[-2] * kernel.shape[-1]:  # as a matrix product, which every backend does well
            return x @ kernel.reshape(kernel.shape[-2:]) + bias
        spatial = "THW"[-axes:]
        flat = x.reshape(-1, *x.shape[-axes - 1 :])  # frames of a 2-D convolution join the batch
        out = lax.conv_general_dilated(
            flat,
            kernel,
            (self.stride,) * axes,
            self.padding,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        )
        return out.reshape(*x.shape[: -axes - 1], *out.shape[1:]) + bias


class GroupNorm(nnx.Module):
    """GroupNorm over everything but the batch axis, with scale and bias, in fp32; the result has the input's dtype."""

    def __init__(self, width: int, groups: int, eps: float = 1e-6):
        if width % groups:
            raise ValueError(f"norm_num_groups {groups} does not divide {width} channels")
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(centred).mean((1, 3), keepdims=True)
        normed = (centred * lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


# ---- functions ----------------------------------------------------------------------------------------------------


def repeated(x: Float[Array, "..."], factors: Sequence[int]) -> Float[Array, "..."]:
    """Nearest-neighbour upsampling of the axes from 1 on by whole factors. Broadcast, not gathered, so that it fuses
    into what reads it and its gradient is a sum."""
    for axis, factor in enumerate(factors, start=1):
        if factor != 1:
            wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*x.shape[: axis + 1], factor, *x.shape[axis + 1 :]))
            x = wide.reshape(*x.shape[:axis], factor * x.shape[axis], *x.shape[axis + 1 :])
    return x


def posterior(moments: Float[Array, "*batch c2"], key: AnyKey | None) -> Float[Array, "*batch c"]:
    """A draw of the Gaussian with [mean | log variance] on the last axis, its mean where key is None; fp32.

    Source: diffusers autoencoders/vae.py, DiagonalGaussianDistribution (log variance clipped to -30..20).
    """
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    if key is None:
        return mean
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return mean + jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0)) * noise


def tiled(
    function: Callable[[Any], Any],
    x: Float[Array, "b t h w c"],
    *,
    tile: tuple[int, int],
    stride: tuple[int, int],
    blend: tuple[int, int],
    keep: tuple[int, int],
) -> Float[Array, "b t2 h2 w2 d"]:
    """`function` on overlapping tiles of the frames, one at a time, blended linearly where they overlap.

    `tile` and `stride` (rows, columns) in pixels of x, `blend` and `keep` in pixels of the result: how far a tile fades
    into the one above and to the left of it, and how much of it stands. Tiles at the lower and right edge are smaller;
    each size is compiled once. Source: diffusers autoencoder_kl_cogvideox.py, tiled_encode, tiled_decode, blend_v.
    """
    starts = [range(0, x.shape[axis], step) for axis, step in zip((2, 3), stride, strict=True)]
    by_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row in starts[0]:
        for column in starts[1]:
            size = (min(tile[0], x.shape[2] - row), min(tile[1], x.shape[3] - column))
            by_size.setdefault(size, []).append((row, column))
    done = {}
    for (height, width), places in by_size.items():

        def at(place, size=(height, width)):
            cut = lax.dynamic_slice_in_dim(x, place[0], size[0], 2)
            return function(lax.dynamic_slice_in_dim(cut, place[1], size[1], 3))

        outs = lax.map(at, np.array(places)) if len(places) > 1 else at(places[0])[None]
        done |= dict(zip(places, outs, strict=True))

    # Each tile fades into neighbours that are blended already; this order is upstream's.
    rows: list[list[Array]] = []
    for i, row in enumerate(starts[0]):
        rows.append([])
        for j, column in enumerate(starts[1]):
            out = done[row, column]
            out = _faded(rows[i - 1][j], out, blend[0], 2) if i else out
            out = _faded(rows[i][j - 1], out, blend[1], 3) if j else out
            rows[i].append(out)
    kept = [jnp.concatenate([out[:, :, : keep[0], : keep[1]] for out in row], axis=3) for row in rows]
    return jnp.concatenate(kept, axis=2)


def _faded(before: Array, tile: Array, extent: int, axis: int) -> Array:
    """`tile` with its first `extent` pixels along `axis` going over from the last ones of the tile before it."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent == 0:
        return tile
    weight = np.expand_dims(np.arange(extent, dtype=np.float32) / extent, tuple(range(1, tile.ndim - axis)))
    last = lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    first, rest = lax.split(tile, [extent, tile.shape[axis] - extent], axis)
    mixed = (last * (1 - weight) + first * weight).astype(tile.dtype)
    return jnp.concatenate([mixed, rest], axis=axis)
