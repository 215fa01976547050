"""The Fréchet distance against the public formulas, streaming, singular covariances."""

import time

import numpy as np
import pytest
import scipy.linalg

from jaxalign.metrics import frechet


def cloud(seed, count, width, shift=0.0):
    """Correlated features with a spectrum that falls, as networks have."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((width, width)) * np.linspace(1.0, 0.05, width)
    return rng.standard_normal((count, width)) @ mixing.T + shift


def by_square_root(x, y):
    """The formula as pytorch-fid, cd-fvd and torch-fidelity have it."""
    product = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    product = product[0] if isinstance(product, tuple) else product
    shift = x.mean(0) - y.mean(0)
    return shift @ shift + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * np.trace(product.real)


def test_equals_the_matrix_square_root():
    x, y = cloud(0, 400, 48), cloud(1, 300, 48, shift=0.3)
    found = frechet.frechet_distance(frechet.moments(x), frechet.moments(y))
    assert found == pytest.approx(by_square_root(x, y), rel=1e-9)


def test_equals_torch_fidelity():
    module = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = cloud(4, 200, 32), cloud(5, 150, 32, shift=0.1)
    stats = [{"mu": f.mean(0), "sigma": np.cov(f, rowvar=False)} for f in (x, y)]
    expected = module.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet.frechet_distance(frechet.moments(x), frechet.moments(y)) == pytest.approx(expected, rel=1e-6)


def test_streaming_is_the_whole():
    x = cloud(6, 257, 24, shift=1000.0)  # far from zero: sums of squares would lose seven digits
    whole = frechet.moments(x)
    parts = [frechet.moments(x[a:b]) for a, b in ((0, 1), (1, 100), (100, 101), (101, 257))]
    found = frechet.merge_all(parts)
    assert found.count == 257
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, whole.covariance, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(whole.covariance, np.cov(x.T), rtol=1e-10, atol=1e-10)
    assert frechet.frechet_distance(found, whole) < 1e-9


def test_gaussians_whose_distance_is_known():
    """Diagonal covariances: Σ (√a - √b)²."""
    a, b = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 4.0])
    one, other = (frechet.Moments(10, np.zeros(3), np.diag(v)) for v in (a, b))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet.frechet_distance(one, other) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("count", [3, 20, 64])
def test_fewer_features_than_channels(count):
    """Rank count - 1 of 64: the distance from itself is zero, and a shift is its square, without residues."""
    x = cloud(7, count, 64)
    m = frechet.moments(x)
    assert frechet.frechet_distance(m, m) <= 1e-9 * np.trace(m.covariance)
    moved = frechet.moments(x + 0.5)
    assert frechet.frechet_distance(m, moved) == pytest.approx(64 * 0.25, rel=1e-9)


def test_nearly_singular():
    """Sixteen decades of eigenvalues, rotated: against the closed form of commuting covariances."""
    rng = np.random.default_rng(8)
    q, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    a, b = np.logspace(0, -16, 40), np.logspace(0.5, -15, 40)
    one, other = (frechet.Moments(100, np.zeros(40), (q * v) @ q.T) for v in (a, b))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)


def test_refusals():
    x = cloud(9, 10, 4)
    with pytest.raises(ValueError, match="width 4 and 3"):
        frechet.frechet_distance(frechet.moments(x), frechet.moments(x[:, :3]))
    with pytest.raises(ValueError, match="width 4 and 3"):
        frechet.merge(frechet.moments(x), frechet.moments(x[:, :3]))
    with pytest.raises(ValueError, match="at least two"):
        frechet.frechet_distance(frechet.moments(x[:1]), frechet.moments(x))
    with pytest.raises(ValueError, match="1 of 10 features are not finite"):
        frechet.moments(np.where(np.arange(10)[:, None] == 3, np.nan, x))
    with pytest.raises(ValueError, match="no features"):
        frechet.merge_all([])


def test_advice_names_the_number():
    assert frechet.advice(401, 400) is None
    assert "401" in frechet.advice(400, 400) and "400 features" in frechet.advice(400, 400)


@pytest.mark.slow
def test_the_papers_size():
    x, y = cloud(10, 2048, 1024), cloud(11, 2048, 1024, shift=0.1)
    a, b = frechet.moments(x), frechet.moments(y)
    begin = time.perf_counter()
    found = frechet.frechet_distance(a, b)
    assert time.perf_counter() - begin < 30
    assert found == pytest.approx(by_square_root(x, y), rel=1e-6)
