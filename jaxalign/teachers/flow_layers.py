"""What RAFT and SEA-RAFT share: convolutions, sizes of frames, the walk over pairs of frames, upsampling of flow.

Frames are [n, h, w, 3], flow is [n, h, w, 2] in pixels: u to the right, v down, from the first frame to the second.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxalign.models.frames import default_at_once, over_frames
from jaxalign.teachers.resize import resize

STRIDE = 8  # of the features on which flow is computed
MIN_SIDE = 128  # the coarsest correlations have 1/64 of it, and upstream's sampling needs two of them
NORM_EPS = 1e-5  # PyTorch's default, of BatchNorm and InstanceNorm


def check_settings(name: str, config: Any) -> None:
    """Raises ValueError for iterations, size or pairs_at_once of a config that cannot be."""
    if config.iterations < 1:
        raise ValueError(f"{name}: iterations must be at least 1, not {config.iterations}")
    if config.size is not None and min(config.size) < MIN_SIDE:
        raise ValueError(f"{name}: size must be at least ({MIN_SIDE}, {MIN_SIDE}), not {config.size}")
    if config.pairs_at_once is not None and config.pairs_at_once < 1:
        raise ValueError(f"{name}: pairs_at_once must be at least 1, not {config.pairs_at_once}")


# ---- layers -------------------------------------------------------------------------------------------------------


class Conv(nnx.Conv):
    """Convolution with a bias, padded on both sides by half its kernel, as PyTorch's networks have it."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int] = 3, stride: int = 1, *, rngs: nnx.Rngs):
        size = (size, size) if isinstance(size, int) else size
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        super().__init__(inputs, outputs, size, kernel_init=init, rngs=rngs)
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return convolve(x, self.kernel[...], self.bias[...], self.stride)


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "i j c d"], bias: Float[Array, "d"] | None = None, stride: int = 1
) -> Float[Array, "b h2 w2 d"]:
    """Convolution with kernels of odd sides, padded by half of them."""
    padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)
    return x if bias is None else x + bias


def numbered(modules: Mapping[int, nnx.Module]) -> nnx.Module:
    """Modules under the indices of upstream's Sequential, which also counts what has no parameters."""
    sequential = nnx.Module()
    for index, module in modules.items():
        setattr(sequential, str(index), module)
    return sequential


def instance_norm(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Every channel of every frame to mean 0 and variance 1, in fp32 (torch.nn.InstanceNorm2d without parameters)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean((1, 2), keepdims=True)
    return (centred * lax.rsqrt(jnp.square(centred).mean((1, 2), keepdims=True) + NORM_EPS)).astype(x.dtype)


def motion_features(
    flow: Float[Array, "b h w 2"],
    correlations: Float[Array, "b h w k"],
    on_correlations: Sequence[Conv],
    on_flow: Sequence[Conv],
    merge: Conv,
) -> Float[Array, "b h w d"]:
    """Flow and what is seen where it points, as one map; its last two channels are the flow itself (MotionEncoder)."""
    dtype = merge.kernel.dtype
    flow, correlations = flow.astype(dtype), correlations.astype(dtype)
    seen, moved = correlations, flow
    for conv in on_correlations:
        seen = jax.nn.relu(conv(seen))
    for conv in on_flow:
        moved = jax.nn.relu(conv(moved))
    return jnp.concatenate([jax.nn.relu(merge(jnp.concatenate([seen, moved], axis=-1))), flow], axis=-1)


def positions(like: Float[Array, "b h w _"]) -> Float[Array, "h w 2"]:
    """(x, y) of every position of a map, fp32."""
    _, h, w, _ = like.shape
    return jnp.stack(jnp.meshgrid(jnp.arange(w), jnp.arange(h)), axis=-1).astype(jnp.float32)


# ---- upsampling ---------------------------------------------------------------------------------------------------


def upsample_convex(x: Float[Array, "b h w c"], mask: Float[Array, "b h w 576"]) -> Float[Array, "b h8 w8 c"]:
    """Every fine value is a convex combination of its 3x3 coarse neighbours, zeros outside; fp32.

    The 576 channels of the mask are logits [neighbour 9, fine row 8, fine column 8] (RAFT section 3.3).
    """
    b, h, w, c = x.shape
    weights = jax.nn.softmax(mask.astype(jnp.float32).reshape(b, h, w, 9, STRIDE, STRIDE), axis=3)
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    fine = jnp.zeros((b, h, w, STRIDE, STRIDE, c), jnp.float32)
    for k in range(9):
        neighbour = padded[:, k // 3 : k // 3 + h, k % 3 : k % 3 + w]
        fine = fine + weights[:, :, :, k, :, :, None] * neighbour[:, :, :, None, None]
    return fine.transpose(0, 1, 3, 2, 4, 5).reshape(b, STRIDE * h, STRIDE * w, c)


def upsample_bilinear(x: Float[Array, "b h w c"]) -> Float[Array, "b h8 w8 c"]:
    """Eight times as many rows and columns, the corners kept (interpolate with align_corners=True); fp32."""

    def matrix(length: int) -> np.ndarray:
        at = np.linspace(0, length - 1, STRIDE * length)
        return np.maximum(1 - np.abs(at[:, None] - np.arange(length)), 0).astype(np.float32)

    _, h, w, _ = x.shape
    x = x.astype(jnp.float32)
    return jnp.einsum("iy,byxc,jx->bijc", matrix(h), x, matrix(w), precision=lax.Precision.HIGHEST)


# ---- video -> pairs -> flow ---------------------------------------------------------------------------------------


def over_pairs(
    video: Float[Array, "b t h w 3"],
    features: Callable[[Array], Array],
    context: Callable[[Array], Array],
    refine: Callable[[Array], Array],
    *,
    size: tuple[int, int] | None = None,
    at_once: int | None = None,
) -> Float[Array, "*out"]:
    """What `refine` makes of every two consecutive frames: [b, t - 1, ..., h, w, c], in pixels of the resized frames.

    features: frames [n, h, w, 3] -> maps of stride 8; context: pairs [n, h, w, 6] -> maps of stride 8; refine: the two
    features and the context side by side -> [n, ..., h, w, c]. A frame's features serve both pairs that it is in.
    size: frames are resized to it before (bilinear, no antialiasing, as SEA-RAFT's custom.py); then their borders are
    repeated to a multiple of 8, evenly on both sides (InputPadder in upstream's core/utils/utils.py), and cut off at
    the end. at_once: about so many pairs, those of all clips together, are in memory at a time.
    Raises ValueError for less than two frames and for frames under 128 pixels.
    """
    if video.shape[1] < 2:
        raise ValueError(f"optical flow needs two frames, this video has {video.shape[1]}")
    frames = video.astype(jnp.float32)
    if size is not None:
        frames = resize(frames, size, method="linear")
    h, w = frames.shape[2:4]
    if min(h, w) < MIN_SIDE:
        raise ValueError(f"optical flow needs {MIN_SIDE} pixels a side, frames have {h}x{w}; set size=(height, width)")
    missing = [-side % STRIDE for side in (h, w)]
    (top, bottom), (left, right) = [(m // 2, m - m // 2) for m in missing]
    frames = jnp.pad(frames, ((0, 0), (0, 0), (top, bottom), (left, right), (0, 0)), mode="edge")
    at_once = at_once or default_at_once(frames.shape[2] * frames.shape[3] // STRIDE**2)
    maps = over_frames(features, frames, at_once)
    pairs = jnp.concatenate([frames[:, :-1], frames[:, 1:]], axis=-1)
    maps = jnp.concatenate([maps[:, :-1], maps[:, 1:], over_frames(context, pairs, at_once)], axis=-1)
    return over_frames(refine, maps, at_once)[..., top : top + h, left : left + w, :]


def resize_flow(flow: Float[Array, "*b h w 2"], size: tuple[int, int]) -> Float[Array, "*b h2 w2 2"]:
    """Flow of frames of another size (height, width): resized bilinearly, u and v counted in the new pixels."""
    h, w = flow.shape[-3:-1]
    return resize(flow, size, method="linear") * jnp.array([size[1] / w, size[0] / h], flow.dtype)


def area_pool(x: Float[Array, "*b h w c"], size: tuple[int, int]) -> Float[Array, "*b h2 w2 c"]:
    """Mean of all pixels that a cell touches (torch.nn.functional.interpolate with mode='area'); fp32."""

    def matrix(length: int, cells: int) -> np.ndarray:
        i, at = np.arange(cells)[:, None], np.arange(length)
        touched = (at >= i * length // cells) & (at < -(-(i + 1) * length // cells))
        return (touched / touched.sum(1, keepdims=True)).astype(np.float32)

    rows, columns = (matrix(length, cells) for length, cells in zip(x.shape[-3:-1], size, strict=True))
    x = x.astype(jnp.float32)
    return jnp.einsum("iy,...yxc,jx->...ijc", rows, x, columns, precision=lax.Precision.HIGHEST)
