"""The two bilinear resizes that old score networks were measured behind, neither of which is today's.

Both sample between the two nearest pixels without antialiasing; they differ in where output pixel i lies in the input.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def tensorflow1(x: Float[Array, "*b h w c"], size: int) -> Float[Array, "*b size size c"]:
    """Output pixel i at i·length/size: TensorFlow 1's resize_bilinear, which moves the image up and to the left.

    fp32. Source: torch-fidelity's interpolate_compat_tensorflow.py, align_corners=False.
    """

    def positions(length):
        return np.arange(size, dtype=np.float32) * np.float32(length / size)

    return _at(x, positions)


def corners(x: Float[Array, "*b h w c"], size: int) -> Float[Array, "*b size size c"]:
    """The corners' centres stay where they are: PyTorch's align_corners=True, Chainer's resize_images. fp32."""
    return _at(x, lambda length: np.linspace(0, length - 1, size, dtype=np.float64))


def _at(x, positions):
    """Rows and columns at `positions(length)`, as two products with small matrices."""
    x = x.astype(jnp.float32)
    for axis in (-3, -2):
        length = x.shape[axis]
        matrix = _matrix(positions(length), length)
        # Full precision everywhere: pixels are exact to more than the 8 bits of a TPU's fast matmul.
        x = jnp.moveaxis(jnp.tensordot(x, matrix.T, axes=((axis,), (0,)), precision=lax.Precision.HIGHEST), -1, axis)
    return x


def _matrix(positions: Float[np.ndarray, "size"], length: int) -> Float[np.ndarray, "size length"]:
    """Weights of the pixel at or below a position and of the one above it; at the far border both are the last."""
    low = np.floor(positions).astype(int).clip(0, length - 1)
    above = (positions - low).astype(np.float32)
    matrix, rows = np.zeros((len(positions), length), np.float32), np.arange(len(positions))
    np.add.at(matrix, (rows, low), 1 - above)
    np.add.at(matrix, (rows, np.minimum(low + 1, length - 1)), above)
    return matrix
