"""Intra-Inter Consistency Ratio: how discriminative and how steady in time a teacher's tokens are.

Align4Gen, eq. 5 to 7. All tokens of a clip are clustered; IICR(k) is the smallest distance between two
centroids over the largest standard deviation within a cluster. High: what belongs to one thing gives the same
token in every frame, and different things are well apart.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2

# The ratio of two extremes follows the local optimum that k-means ends in (at k = 8 on one real clip: 0.55 to
# 0.70 over five starts), so the tightest of a few starts is taken; from there on 30 rounds change the third digit.
STARTS, ROUNDS = 4, 30


def unit_tokens(tokens: Float[np.ndarray, "*axes d"]) -> Float[np.ndarray, "n d"]:
    """Tokens as one list, each at unit length (a zero token stays zero): what REPA and the relations see."""
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float32)
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)


def ratio(points: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"]) -> float:
    """min ‖u_i − u_j‖ / max σ_i of given clusters (eq. 5 to 7).

    u_i is the mean of a cluster and σ_i = sqrt(mean ‖x − u_i‖²). NaN for a single cluster, infinity when every
    cluster is a single point.
    """
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return float("nan")
    points = points.astype(np.float64)
    sums = np.stack([points[labels == i].sum(axis=0) for i in range(len(sizes))])
    centroids = sums / sizes[:, None]
    spread = np.sqrt(np.bincount(labels, np.square(points - centroids[labels]).sum(axis=1)) / sizes).max()
    apart = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1)
    apart = apart[~np.eye(len(sizes), dtype=bool)].min()
    return float(apart / spread) if spread > 0 else float("inf")


def clusters(points: Float[np.ndarray, "n d"], k: int, *, seed: int = 0) -> Int[np.ndarray, "n"]:
    """Labels of SciPy's k-means (k-means++ seeds): the tightest of STARTS runs, always the same ones."""
    found = []
    for start in range(STARTS):
        rng = np.random.default_rng((seed, k, start))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cluster that ran empty counts as none
            centroids, labels = kmeans2(points, k, iter=ROUNDS, minit="++", rng=rng)
        found.append((float(np.square(points - centroids[labels]).sum()), start, labels))
    return min(found, key=lambda one: one[:2])[2]


def iicr(tokens: Float[np.ndarray, "t h w d"], ks: Sequence[int], *, seed: int = 0) -> Float[np.ndarray, "k"]:
    """IICR(k) of one clip for every k in `ks`; the tokens of all frames are clustered together.

    NaN where the clip has fewer different tokens than clusters (a still, a black clip). Raises ValueError for
    a k below 2 and for tokens that are not finite.
    """
    if bad := [k for k in ks if k < 2]:
        raise ValueError(f"IICR compares clusters: write 2 or more of them, not {bad[0]}")
    if not np.isfinite(tokens).all():
        raise ValueError("IICR: the tokens hold values that are not finite")
    points = unit_tokens(tokens)
    different = len(np.unique(points.round(6), axis=0))
    return np.asarray([ratio(points, clusters(points, k, seed=seed)) if k <= different else np.nan for k in ks])


def mean_iicr(values: Float[np.ndarray, "clips k"]) -> Float[np.ndarray, "k"]:
    """Mean over the clips that have that many different tokens; NaN if none has."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)
