"""The probes against the answers of linear algebra on synthetic linear data."""

import numpy as np
import pytest

from jaxalign.metrics.linear_probe import pca, r_squared, ridge

RNG = np.random.default_rng(0)


def test_ridge_finds_a_line_and_its_penalty_counts_in_unit_features():
    x = RNG.normal(size=(500, 4)) * [1, 100, 0.01, 1] + [3, -2, 0, 5]
    x = np.concatenate([x, np.ones((500, 1))], axis=1)  # a feature that never varies
    y = x[:, :4] @ RNG.normal(size=(4, 2)) + [7, -1]
    fitted = ridge(x, y, strength=1e-9)
    np.testing.assert_allclose(fitted(x), y, atol=1e-4)
    assert r_squared(y, fitted(x)) > 1 - 1e-9
    np.testing.assert_allclose(ridge(x * 1000, y, strength=0.3)(x * 1000), ridge(x, y, strength=0.3)(x), rtol=1e-9)


def test_ridge_is_the_least_squares_solution_with_the_penalty_as_rows():
    x, y = RNG.normal(size=(60, 3)), RNG.normal(size=(60, 1))
    z = (x - x.mean(0)) / x.std(0)
    rows = np.concatenate([z, np.sqrt(60 * 0.2) * np.eye(3)])
    w = np.linalg.lstsq(rows, np.concatenate([y - y.mean(0), np.zeros((3, 1))]), rcond=None)[0]
    np.testing.assert_allclose(ridge(x, y, strength=0.2)(x), z @ w + y.mean(0), atol=1e-10)


def test_pca_has_the_directions_of_the_singular_values():
    x = RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6)) + 4
    found = pca(x, 3)(x)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :3] * s[:3]), atol=1e-8)


def test_r_squared_is_zero_for_the_mean_and_less_for_worse():
    y = RNG.normal(size=(50, 2))
    assert r_squared(y, np.broadcast_to(y.mean(0), y.shape)) == 0
    assert r_squared(y, y) == 1 and r_squared(y, -y) < 0


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="3 samples of 4 features"):
        ridge(np.zeros((3, 4)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="5 directions"):
        pca(np.zeros((9, 4)), 5)
