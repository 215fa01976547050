"""Resizing with PyTorch's weights (torch.nn.functional.interpolate, align_corners=False), as small matrices.

jax.image.resize has another cubic kernel (a = -0.5 instead of -0.75) and antialiases unless told otherwise, and takes
no scale factor that differs from the ratio of the sizes, which DINOv2's position tables need.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def resize(
    x: Float[Array, "..."],
    shape: Sequence[int],
    *,
    axes: Sequence[int] = (-3, -2),
    method: str = "cubic",
    antialias: bool = False,
    scale_factors: Sequence[float] | None = None,
) -> Float[Array, "..."]:
    """x with `axes` (rows and columns of [..., h, w, c] by default) resized to `shape`; computed in fp32, x's dtype.

    `method`, `antialias` and `scale_factors` (one an axis) as in `resize_matrix`, which raises ValueError for what it
    does not know. Axes that need nothing done are left alone. Source: torch.nn.functional.interpolate with
    mode='linear', 'bilinear' or 'bicubic', align_corners=False.
    """
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        factor = scale_factors[i] if scale_factors is not None else None
        matrix = resize_matrix(x.shape[axis], size, method=method, antialias=antialias, scale_factor=factor)
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(size)):
            continue
        # Full precision everywhere: pixels and positions are exact to more than the 8 bits of a TPU's fast matmul.
        product = jnp.tensordot(x.astype(jnp.float32), matrix.T, axes=((axis,), (0,)), precision=lax.Precision.HIGHEST)
        x = jnp.moveaxis(product, -1, axis).astype(x.dtype)
    return x


def resize_matrix(
    length: int, size: int, *, method: str = "cubic", antialias: bool = False, scale_factor: float | None = None
) -> Float[np.ndarray, "size length"]:
    """Weights of every input position in every output position, fp32.

    method: 'linear' or 'cubic' (Keys' kernel, a = -0.75, with antialias -0.5), else ValueError. antialias: the kernel
    is stretched where it shrinks. scale_factor: the step between outputs is 1/scale_factor input positions instead
    of length/size, as interpolate(scale_factor=...) has it. Source: PyTorch aten/src/ATen/native/UpSample.h and
    cpu/UpSampleKernel.cpp.
    """
    if method not in ("linear", "cubic"):
        raise ValueError(f"resize method {method!r} is not known; write 'linear' or 'cubic'")
    step = 1 / scale_factor if scale_factor is not None else length / size
    centres = step * (np.arange(size) + 0.5)[:, None]
    if antialias:
        # Inputs outside the image have no part, and the others are weighted up.
        stretch = max(step, 1.0)
        weights = _kernel((np.arange(length) + 0.5 - centres) / stretch, method, -0.5)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    # Inputs outside the image repeat its border.
    reach = 2 if method == "cubic" else 1
    first = np.floor(centres - 0.5).astype(int) - reach + 1
    positions = first + np.arange(2 * reach)
    matrix = np.zeros((size, length))
    rows = np.broadcast_to(np.arange(size)[:, None], positions.shape)
    np.add.at(matrix, (rows, positions.clip(0, length - 1)), _kernel(positions + 0.5 - centres, method, -0.75))
    return matrix.astype(np.float32)


def _kernel(distance: np.ndarray, method: str, a: float) -> np.ndarray:
    """Tent, or Keys' cubic convolution kernel (Keys 1981, equation 4 with a free a)."""
    x = np.abs(distance)
    if method == "linear":
        return np.maximum(1 - x, 0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
