"""IICR: equal to its definition written out, and right about what it is meant to tell apart."""

import numpy as np
import pytest

from jaxalign.metrics import iicr


def blobs(centres, spread, frames=3, side=4, seed=0):
    """Tokens [t, h, w, d] around the given unit directions, in equal parts."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.arange(frames * side * side) % len(centres))
    tokens = np.asarray(centres, np.float64)[which] + spread * rng.normal(size=(len(which), len(centres[0])))
    tokens *= rng.uniform(0.5, 20.0, (len(which), 1))  # the length of a token says nothing
    return tokens.astype(np.float32).reshape(frames, side, side, -1), which


def written_out(tokens, labels):
    """Eq. 5 to 7 with loops and without anything of the package."""
    points = [x / np.linalg.norm(x) for x in tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)]
    groups = {}
    for x, label in zip(points, labels, strict=True):
        groups.setdefault(int(label), []).append(x)
    centroids = {k: sum(group) / len(group) for k, group in groups.items()}
    inter = min(np.sqrt(((centroids[a] - centroids[b]) ** 2).sum()) for a in groups for b in groups if a != b)
    intra = max(np.sqrt(sum(((x - centroids[k]) ** 2).sum() for x in g) / len(g)) for k, g in groups.items())
    return inter / intra


def test_equals_the_definition():
    tokens = np.random.default_rng(1).normal(size=(3, 5, 4, 7)).astype(np.float32)
    for k in (2, 5):
        labels = iicr.clusters(iicr.unit_tokens(tokens), k)
        assert len(set(labels.tolist())) == k
        assert iicr.iicr(tokens, [k])[0] == pytest.approx(written_out(tokens, labels), rel=1e-5)


def test_finds_the_clusters_that_are_there():
    tokens, which = blobs(np.eye(4, 6), 0.02)
    labels = iicr.clusters(iicr.unit_tokens(tokens), 4)
    assert len({(a, b) for a, b in zip(which.tolist(), labels.tolist(), strict=True)}) == 4
    two, four, six = iicr.iicr(tokens, [2, 4, 6])
    assert four == pytest.approx(written_out(tokens, which), rel=1e-5)
    assert four > 10 * two and four > 10 * six  # as many clusters as there are things


def test_steady_and_discriminative_tokens_score_higher():
    at = [iicr.iicr(blobs(np.eye(3, 8), spread)[0], [3])[0] for spread in (0.02, 0.1, 0.3)]
    assert at[0] > at[1] > at[2] > 0
    near = np.asarray([[1, 0, 0], [1, 0.2, 0], [1, 0, 0.2]])
    assert iicr.iicr(blobs(near, 0.02)[0], [3])[0] < iicr.iicr(blobs(np.eye(3), 0.02)[0], [3])[0]


def test_is_repeatable():
    tokens = np.random.default_rng(2).normal(size=(2, 6, 6, 5)).astype(np.float32)
    assert np.array_equal(iicr.iicr(tokens, [2, 4, 8]), iicr.iicr(tokens, [2, 4, 8]))


def test_clips_without_enough_different_tokens():
    still = np.zeros((2, 3, 3, 4), np.float32)
    assert np.isnan(iicr.iicr(still, [2])).all()
    two = still.copy()
    two[..., 0], two[1, ..., 1] = 1.0, 5.0
    found = iicr.iicr(two, [2, 3])
    assert found[0] > 1e3 and np.isnan(found[1])  # two exact points: no spread but rounding
    mean = iicr.mean_iicr(np.asarray([[1.0, np.nan], [3.0, np.nan]]))
    assert mean[0] == 2.0 and np.isnan(mean[1])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="write 2 or more"):
        iicr.iicr(np.ones((1, 2, 2, 3), np.float32), [1])
    with pytest.raises(ValueError, match="not finite"):
        iicr.iicr(np.full((1, 2, 2, 3), np.nan, np.float32), [2])
