"""Rectified flow: the path, the sign of its velocity and what the network is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.diffusion import RectifiedFlow

SHAPE = (3, 2, 2, 2, 4)


def _batch():
    x0, eps = (jax.random.normal(jax.random.key(seed), SHAPE) for seed in (0, 1))
    return x0, eps, jnp.array([0.0, 0.3, 1.0])


def test_the_path_runs_from_data_to_noise():
    x0, eps, times = _batch()
    x_t = RectifiedFlow().noise(x0, eps, times)
    np.testing.assert_array_equal(x_t[0], x0[0])
    np.testing.assert_allclose(x_t[1], 0.7 * x0[1] + 0.3 * eps[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(x_t[2], eps[2])


def test_the_velocity_points_to_the_data():
    """v = −dx/dt: its loss is zero, and one step of length t along it from x_t ends at x0."""
    process = RectifiedFlow()
    x0, eps, times = _batch()
    _, slope = jax.jvp(lambda times: process.noise(x0, eps, times), (times,), (jnp.ones_like(times),))
    loss, _ = process.loss_at(x0, eps, times, lambda x, t: -slope)
    np.testing.assert_allclose(loss, 0.0, atol=1e-12)
    end = process.noise(x0, eps, times) - times[:, None, None, None, None] * slope
    np.testing.assert_allclose(end, x0, atol=1e-6)
    wrong, _ = process.loss_at(x0, eps, times, lambda x, t: slope)
    np.testing.assert_allclose(wrong, 4 * np.mean(np.square(x0 - eps), axis=(1, 2, 3, 4)), rtol=1e-5)


def test_the_network_sees_scaled_times():
    x0, eps, times = _batch()
    seen = []
    for process in (RectifiedFlow(), RectifiedFlow(timestep_scale=1.0)):
        _, aux = process.loss_at(x0, eps, times, lambda x, t: (seen.append(t), x)[1])
        np.testing.assert_array_equal(aux["timesteps"], seen[-1])
    np.testing.assert_allclose(seen[0], [0.0, 300.0, 1000.0])
    np.testing.assert_allclose(seen[1], times)
    with pytest.raises(ValueError, match="timestep_scale=0"):
        RectifiedFlow(timestep_scale=0.0)
