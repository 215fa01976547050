"""The v-prediction process: tables, noise and loss against diffusers' CogVideoX schedulers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_denoiser import toy_denoiser

from jaxalign.diffusion import PROCESSES, VPrediction

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TIMESTEPS = np.array([0, 1, 250, 500, 998, 999])
SHAPE = (len(TIMESTEPS), 3, 4, 4, 5)
SETTINGS = {"2b": VPrediction(), "5b": VPrediction(snr_shift=1.0), "no_rescale": VPrediction(zero_terminal_snr=False)}


def theirs(process, kind=diffusers.CogVideoXDDIMScheduler):
    """diffusers' scheduler as the published folders configure it."""
    return kind(
        snr_shift_scale=process.snr_shift,
        rescale_betas_zero_snr=process.zero_terminal_snr,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def batch():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("name", SETTINGS)
def test_noise_levels_and_noise_as_diffusers(name):
    process = SETTINGS[name]
    scheduler = theirs(process)
    np.testing.assert_allclose(process.alpha_bar(), scheduler.alphas_cumprod.numpy(), rtol=1e-9)
    x0, eps = batch()
    noisy = scheduler.add_noise(torch.from_numpy(x0), torch.from_numpy(eps), torch.from_numpy(TIMESTEPS))
    ours = jax.jit(process.noise)(x0, eps, jnp.asarray(TIMESTEPS))
    np.testing.assert_allclose(ours, noisy.numpy(), atol=2e-5)  # their 1 − ᾱ is taken in fp32
    if process.zero_terminal_snr:
        np.testing.assert_array_equal(ours[-1], eps[-1])  # nothing is left of the data
    tables = process.tables()
    assert all(table.dtype == np.float32 and np.all(np.isfinite(table)) for table in tables[1:])


def test_the_shift_divides_the_signal_to_noise_ratio():
    plain, shifted = (VPrediction(snr_shift=s, zero_terminal_snr=False).alpha_bar() for s in (1.0, 3.0))
    np.testing.assert_allclose(shifted / (1 - shifted), plain / (1 - plain) / 3, rtol=1e-9)


def test_loss_is_the_weighted_error_of_x0():
    """Upstream's training loss, from its own get_velocity: mean((x̂0 − x0)²) / (1 − ᾱ)."""
    process, scheduler = PROCESSES["v"](), theirs(VPrediction())
    x0, eps = batch()

    @jax.jit
    def run(x0, eps):
        network = lambda x, t: toy_denoiser(jnp, x, t, False)  # noqa: E731
        return process.loss_at(x0, eps, jnp.asarray(TIMESTEPS), network)

    loss, aux = run(x0, eps)
    t = torch.from_numpy(TIMESTEPS)
    noisy = scheduler.add_noise(torch.from_numpy(x0), torch.from_numpy(eps), t)
    output = toy_denoiser(torch, noisy, t.float(), False)
    # With the prediction as "sample" and x_t as "noise" it gives x̂0; upstream's trainers call it so.
    estimate = scheduler.get_velocity(output, noisy, t)
    weight = 1 / (1 - scheduler.alphas_cumprod[t].float())
    expected = (weight[:, None, None, None, None] * (estimate - torch.from_numpy(x0)) ** 2).mean((1, 2, 3, 4))
    assert expected.min() > 0.1
    # At timestep 0 the weight is 2,000 or so, and their x̂0 carries the rounding of fp32 with it.
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-4)
    np.testing.assert_array_equal(aux["timesteps"], TIMESTEPS)
    np.testing.assert_array_equal(aux["mse"], loss)
    # The exact v of noise and data has no loss.
    signal, noise = (table[TIMESTEPS][:, None, None, None, None] for table in process.tables()[1:3])
    exact = jnp.asarray(signal * eps - noise * x0)
    nothing, _ = jax.jit(lambda *data: process.loss_at(*data, jnp.asarray(TIMESTEPS), lambda x, t: exact))(x0, eps)
    np.testing.assert_allclose(nothing, 0.0, atol=1e-10)


def test_training_draws_every_timestep_and_gives_one_loss_a_sample():
    process = VPrediction(num_train_timesteps=10)
    x0 = jnp.asarray(batch()[0])
    key = jax.random.key(3, impl="rbg")
    loss, aux = jax.jit(lambda key: process.training_loss(key, x0, lambda x, t: 0.1 * x))(key)
    assert loss.shape == (len(x0),) and loss.min() > 0
    np.testing.assert_array_equal(process.timesteps_at(jnp.linspace(0, 1, 11)), [*range(10), 9])
    assert np.all((np.asarray(aux["timesteps"]) >= 0) & (np.asarray(aux["timesteps"]) <= 9))
    with pytest.raises(ValueError, match="same learn_sigma"):
        process.training_loss(key, x0, lambda x, t: x[..., :2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_timesteps": 1}, "num_train_timesteps=1"),
        ({"beta_start": 0.1, "beta_end": 0.01}, "beta_start <= beta_end"),
        ({"snr_shift": 0.0}, "snr_shift=0.0; write a positive number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VPrediction(**settings)
