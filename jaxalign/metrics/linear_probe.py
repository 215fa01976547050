"""What can be read from features by a line: ridge regression and PCA, closed forms in float64 on the host."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

AT_ONCE = 1 << 14  # rows that are taken to float64 together


class Linear(NamedTuple):
    """y = (x − mean) @ matrix + offset."""

    mean: Float[np.ndarray, " d"]
    matrix: Float[np.ndarray, "d k"]
    offset: Float[np.ndarray, " k"]

    def __call__(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        return np.concatenate([(rows - self.mean) @ self.matrix + self.offset for rows in _in_float64(x)])


def ridge(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n k"], *, strength: float = 1e-4) -> Linear:
    """The minimiser of mean |y − ŷ|² + strength · |w|², with an offset that is free.

    w counts in features of unit variance, so the answer does not depend on their scale; one that never varies is left
    out. Raises ValueError for fewer samples than features.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) <= x.shape[1]:
        raise ValueError(f"ridge: {len(x)} samples of {x.shape[1]} features; give more clips")
    mean, deviation, offset = x.mean(0), x.std(0), y.mean(0)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-12)
    z = (x - mean) * scale
    gram = z.T @ z / len(z) + strength * np.eye(z.shape[1])
    return Linear(mean, scale[:, None] * np.linalg.solve(gram, z.T @ (y - offset) / len(z)), offset)


def pca(x: Float[np.ndarray, "n d"], width: int) -> Linear:
    """The projection on the `width` directions of largest variance. Raises ValueError for more than there are."""
    if width > x.shape[1]:
        raise ValueError(f"pca: {width} directions of features {x.shape[1]} wide")
    mean = x.mean(0, dtype=np.float64)
    _, vectors = np.linalg.eigh(sum((rows - mean).T @ (rows - mean) for rows in _in_float64(x)) / len(x))
    return Linear(mean, np.ascontiguousarray(vectors[:, ::-1][:, :width]), np.zeros(width))


def _in_float64(x: Float[np.ndarray, "n d"]) -> Iterator[Float[np.ndarray, "m d"]]:
    """The rows of x, some at a time: all of a wide x in float64 would take gigabytes."""
    return (np.asarray(x[k : k + AT_ONCE], np.float64) for k in range(0, max(1, len(x)), AT_ONCE))


def r_squared(true: Float[np.ndarray, "n k"], predicted: Float[np.ndarray, "n k"]) -> float:
    """1 − squared errors / squared deviations from the mean, all outputs together; 1 is perfect, 0 the mean."""
    true = np.asarray(true, np.float64)
    return float(1 - np.square(true - predicted).sum() / np.square(true - true.mean(0)).sum())
