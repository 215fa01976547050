"""Inception Score and CLIP's scores against direct computations and torch-fidelity."""

import numpy as np
import pytest

from jaxalign.metrics.clip_scores import temporal_consistency, text_similarity
from jaxalign.metrics.inception_score import inception_score, probabilities


def logits(count=120, classes=17):
    return np.random.default_rng(0).normal(0, 2, (count, classes))


def test_inception_score_is_its_definition():
    p = probabilities(logits())
    scores = []
    for k in range(5):
        part = p[k * 24 : (k + 1) * 24]
        scores.append(np.exp(np.mean([np.sum(row * np.log(row / part.mean(0))) for row in part])))
    mean, deviation = inception_score(p, splits=5)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12) and deviation == pytest.approx(np.std(scores), rel=1e-9)


def test_inception_score_equals_torch_fidelity():
    module, torch = pytest.importorskip("torch_fidelity.metric_isc"), pytest.importorskip("torch")
    x = logits(103)  # splits of unequal size
    theirs = module.isc_features_to_metric(torch.from_numpy(x), splits=10, shuffle=False)
    mean, deviation = inception_score(probabilities(x))
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)


def test_inception_score_of_known_answers():
    assert inception_score(np.eye(8).repeat(2, 0), splits=1) == (pytest.approx(8), 0)  # zeros are no trouble
    assert inception_score(np.full((8, 4), 0.25), splits=2)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="needs 10 samples or more; there are 8"):
        inception_score(np.eye(8))
    with pytest.raises(ValueError, match="must sum to 1"):
        inception_score(logits())


def test_clip_scores_are_their_definitions():
    rng = np.random.default_rng(1)
    frames, texts = rng.normal(0, 3, (2, 5, 6)).astype(np.float32), rng.normal(0, 1, (2, 6)).astype(np.float32)

    def cos(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    consistency = temporal_consistency(frames)
    similarity = text_similarity(frames, texts)
    assert consistency.dtype == similarity.dtype == np.float64
    for x, text, found, said in zip(frames.astype(np.float64), texts, consistency, similarity, strict=True):
        pairs = [(cos(x[0], x[k]) + cos(x[k - 1], x[k])) / 2 for k in range(1, 5)]
        assert found == pytest.approx(np.mean(pairs), rel=1e-6)
        assert said == pytest.approx(np.mean([cos(one, text) for one in x]), rel=1e-6)
    still = np.repeat(frames[:, :1], 4, axis=1)
    np.testing.assert_allclose(temporal_consistency(still), 1)
    with pytest.raises(ValueError, match="at least two frames"):
        temporal_consistency(frames[:, :1])
