"""Inception Score: how sure a classifier is of each sample, and how many different classes it sees over all of them."""

import numpy as np
from jaxtyping import Float


def probabilities(logits: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """Softmax over the last axis in float64."""
    x = np.asarray(logits, np.float64)
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def inception_score(classes: Float[np.ndarray, "n k"], *, splits: int = 10) -> tuple[float, float]:
    """(mean, standard deviation over the splits) of exp E[KL(p(y|x) || p(y))], from probabilities [n, k], in float64.

    Samples are split in their order, as upstream does after a shuffle: give them shuffled. Between 1 and k. Raises
    ValueError for fewer samples than splits, or rows that are no probabilities. Source: Salimans et al. 2016, equation
    1; openai/improved-gan inception_score/model.py (population standard deviation).
    """
    p = np.asarray(classes, np.float64)
    if p.ndim != 2 or splits < 1 or len(p) < splits:
        raise ValueError(f"an Inception Score in {splits} splits needs {splits} samples or more; there are {len(p)}")
    if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(axis=1), 1, atol=1e-4)):
        raise ValueError("an Inception Score is of probabilities: rows must sum to 1 (take softmax of the logits)")
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        scores.append(np.exp((_xlogx(part).sum(axis=1)).mean() - _xlogx(part.mean(axis=0)).sum()))
    return float(np.mean(scores)), float(np.std(scores))


def _xlogx(p: np.ndarray) -> np.ndarray:
    """p log p, 0 at 0. E[Σ p log(p/q)] with q the mean of p is E[Σ p log p] - Σ q log q."""
    return p * np.log(np.where(p > 0, p, 1.0))
