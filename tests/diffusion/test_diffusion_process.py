"""What noise processes have in common, for a task or an evaluation that does not know which it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_denoiser import toy_denoiser

from jaxalign.diffusion import DDPM, PROCESSES, RectifiedFlow, fixed_times
from jaxalign.diffusion.process import draw

SHAPE = (4, 2, 3, 2, 3)


def _key(seed):
    """Keys whose generator compiles three times as fast as the default one; the processes take any."""
    return jax.random.key(seed, impl="rbg")


def _predict(process):
    return lambda x, t: toy_denoiser(jnp, x, t, process.learn_sigma)


def test_fixed_times_are_even_and_reach_neither_end():
    times = np.asarray(fixed_times(4))
    np.testing.assert_allclose(times, [0.125, 0.375, 0.625, 0.875])
    with pytest.raises(ValueError, match="count=0"):
        fixed_times(0)


@pytest.mark.parametrize("name", PROCESSES)
def test_one_interface(name):
    process = PROCESSES[name]()
    x0 = jax.random.normal(_key(0), SHAPE)
    eps = jax.random.normal(_key(1), SHAPE)
    timesteps = process.timesteps_at(fixed_times(SHAPE[0]))

    @jax.jit
    def evaluate(x0, eps):
        return process.loss_at(x0, eps, timesteps, _predict(process))

    loss, aux = evaluate(x0, eps)
    again, _ = evaluate(x0, eps)
    assert loss.shape == aux["mse"].shape == SHAPE[:1] and loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, again)
    np.testing.assert_allclose(aux["timesteps"], [125, 375, 625, 875])  # one scale for every process
    assert np.all(np.asarray(aux["mse"]) > 0)
    assert hash(process) == hash(PROCESSES[name]())  # can be a static argument of jit


@pytest.mark.parametrize("name", PROCESSES)
def test_training_loss_is_loss_at_a_random_draw(name):
    process = PROCESSES[name]()
    x0 = jax.random.normal(_key(0), SHAPE)
    key = _key(7)

    @jax.jit
    def training_loss(key):
        return process.training_loss(key, x0, _predict(process))

    @jax.jit
    def by_hand(key):
        fractions, eps = draw(key, x0)
        return process.loss_at(x0, eps, process.timesteps_at(fractions), _predict(process))

    loss, aux = training_loss(key)
    np.testing.assert_array_equal(loss, by_hand(key)[0])
    np.testing.assert_array_equal(loss, training_loss(key)[0])
    other, other_aux = training_loss(_key(8))
    assert np.all(np.asarray(loss) != np.asarray(other))
    assert np.all(np.asarray(aux["timesteps"]) != np.asarray(other_aux["timesteps"]))
    assert len(set(np.asarray(aux["timesteps"]).tolist())) == SHAPE[0]  # each sample has its own


@pytest.mark.parametrize("name", PROCESSES)
def test_low_precision_latents_meet_an_fp32_loss(name):
    process = PROCESSES[name]()
    x0 = jax.random.normal(_key(0), SHAPE)

    def predict(x_t, timesteps):
        assert x_t.dtype == timesteps.dtype == jnp.float32
        return toy_denoiser(jnp, x_t, timesteps, process.learn_sigma).astype(jnp.bfloat16)

    timesteps = process.timesteps_at(fixed_times(SHAPE[0]))
    loss, aux = jax.jit(lambda x: process.loss_at(x, x[::-1], timesteps, predict))(x0.astype(jnp.bfloat16))
    exact, _ = jax.jit(lambda x: process.loss_at(x, x[::-1], timesteps, _predict(process)))(x0)
    assert loss.dtype == aux["mse"].dtype == jnp.float32
    np.testing.assert_allclose(loss, exact, rtol=0.1)


def test_times_are_uniform():
    x0 = jnp.zeros((20000, 1, 1, 1, 1))
    fractions, _ = draw(jax.random.key(3), x0)
    timesteps = np.asarray(DDPM().timesteps_at(fractions))
    assert timesteps.min() == 0 and timesteps.max() == 999
    counts = np.bincount(timesteps // 100, minlength=10)
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
    np.testing.assert_array_equal(DDPM().timesteps_at(jnp.array([0.0, 0.9995, 1.0])), [0, 999, 999])
    times = np.asarray(RectifiedFlow().timesteps_at(fractions))
    assert times.min() >= 0 and times.max() < 1 and abs(times.mean() - 0.5) < 0.01


@pytest.mark.parametrize("name", PROCESSES)
def test_a_prediction_with_the_wrong_channels_is_refused(name):
    process = PROCESSES[name]()

    def wrong(x, t):
        return toy_denoiser(jnp, x, t, not process.learn_sigma)

    with pytest.raises(ValueError, match="same learn_sigma"):
        jax.eval_shape(lambda x0: process.training_loss(_key(0), x0, wrong), jnp.ones(SHAPE))
