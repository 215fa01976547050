"""Fréchet distance of two clouds of features, each seen as a Gaussian, in float64: FVD, FID and their relatives.

d² = |μa - μb|² + tr Σa + tr Σb - 2 tr (Σa Σb)^½   (Dowson and Landau 1982; Heusel et al. 2017, equation 6)

The last trace is the sum of the singular values of Σb^½ Σa^½. The usual ways to it (a matrix square root of the
product, or square roots of its eigenvalues) turn rounding of 1e-16 into 1e-8 wherever a covariance is nearly singular,
and leave imaginary residues. Singular values need no further root and are never negative.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

PAPERS_COUNT = 2048  # clips on either side in most tables of FVD, Align4Gen's among them


@dataclasses.dataclass(frozen=True)
class Moments:
    """How many features there were, their mean [d] and their unbiased covariance [d, d] (division by n - 1)."""

    count: int
    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return len(self.mean)


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Mean and covariance in float64, whatever the features are; of a single one the covariance is zero.

    Raises ValueError for no features, or some that are not finite.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"features of shape {x.shape}: expected [n, d] with at least one row")
    if bad := int((~np.isfinite(x).all(axis=1)).sum()):
        raise ValueError(f"{bad} of {len(x)} features are not finite: the network's weights or its input are broken")
    mean = x.mean(axis=0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred / max(len(x) - 1, 1))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both clouds together, as if all their features had been at hand.

    Raises ValueError for different widths. Source: Chan, Golub and LeVeque 1979, equation 2.1.
    """
    if a.width != b.width:
        raise ValueError(f"features of width {a.width} and {b.width}: both must come from the same network")
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.covariance * (a.count - 1) + b.covariance * (b.count - 1)
    scatter = scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter / (count - 1))


def merge_all(parts: Iterable[Moments]) -> Moments:
    """`merge` from left to right, so the same parts give the same bits. Raises ValueError without a part."""
    total = None
    for part in parts:
        total = part if total is None else merge(total, part)
    if total is None:
        raise ValueError("there are no features")
    return total


def frechet_distance(a: Moments, b: Moments) -> float:
    """The (squared) Fréchet distance, as every table of FID and FVD has it; never negative.

    Raises ValueError for features of different widths, or fewer than two on a side.
    """
    if a.width != b.width:
        raise ValueError(f"features of width {a.width} and {b.width}: both must come from the same network")
    if min(a.count, b.count) < 2:
        raise ValueError(f"{a.count} and {b.count} features: a covariance needs at least two on either side")
    shift = a.mean - b.mean
    overlap = np.linalg.svd(_root(b.covariance).T @ _root(a.covariance), compute_uv=False).sum()
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(float(distance), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """A factor R [d, rank] with R Rᵀ = covariance; directions that are rounding alone are left out."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def advice(count: int, width: int) -> str | None:
    """What to say of `count` features of `width` channels: None, or a warning with the number that is needed."""
    if count > width:
        return None
    return (
        f"{count} features of width {width} have a singular covariance, so the distance is too large and unstable; "
        f"take at least {width + 1} (tables of papers: {PAPERS_COUNT}), and compare rows of equal n only"
    )
