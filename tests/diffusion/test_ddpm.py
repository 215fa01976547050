"""DDPM: tables and noise against diffusers, losses and gradients against Latte's, the variational term."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_denoiser import toy_denoiser

from jaxalign.diffusion import DDPM

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden_losses.npz")
SETTINGS = {
    "epsilon_learned": {},
    "epsilon_fixed": {"learn_sigma": False},
    "sample_learned": {"prediction": "sample"},
}
BATCH = tuple(jnp.asarray(GOLDEN[name]) for name in ("x0", "eps", "timesteps"))


def _close(ours, theirs, tolerance):
    """Per sample, relative to its largest value: timesteps differ by orders of magnitude."""
    ours, theirs = (np.asarray(values).reshape(len(values), -1) for values in (ours, theirs))
    scale = np.abs(theirs).max(axis=1, keepdims=True)
    assert np.all(scale > 0)
    assert np.max(np.abs(ours - theirs) / scale) < tolerance


def _on_output(process):
    """Loss and aux as functions of the network's output, and the toy network's output."""
    x0, eps, timesteps = BATCH

    @jax.jit
    def network(x0, eps):
        return toy_denoiser(jnp, process.noise(x0, eps, timesteps), timesteps * 1.0, process.learn_sigma)

    output = network(x0, eps)
    return lambda output: process.loss_at(x0, eps, timesteps, lambda x, t: output), output


def _gradient(function, output, term):
    return jax.jit(jax.grad(lambda output: jnp.sum(term(*function(output)))))(output)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_as_latte(name):
    function, output = _on_output(DDPM(**SETTINGS[name]))
    loss, aux = jax.jit(function)(output)
    gradient = _gradient(function, output, lambda loss, aux: loss)
    ours = {"loss": loss, "gradient": gradient, "mse": aux["mse"]} | ({"vb": aux["vb"]} if "vb" in aux else {})
    theirs = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN if key.startswith(name + "/")}
    assert set(ours) == set(theirs)
    for term, expected in theirs.items():
        if term == "vb":
            # Late in the chain it is what is left of terms near 1 that cancel: compare those absolutely.
            np.testing.assert_allclose(ours[term], expected, rtol=2e-5, atol=2e-8)
        else:
            _close(ours[term], expected, 2e-5)


def test_the_variational_term_trains_the_variance_and_not_the_mean():
    function, output = _on_output(DDPM())
    channels = GOLDEN["x0"].shape[-1]
    of_vb = _gradient(function, output, lambda loss, aux: aux["vb"])
    of_mse = _gradient(function, output, lambda loss, aux: aux["mse"])
    of_loss = _gradient(function, output, lambda loss, aux: loss)
    assert np.all(np.asarray(of_vb[..., :channels]) == 0)
    assert np.all(np.abs(of_vb[..., channels:]).max(axis=(1, 2, 3, 4)) > 0)
    np.testing.assert_array_equal(of_loss[..., :channels], of_mse[..., :channels])
    np.testing.assert_array_equal(of_loss[..., channels:], of_vb[..., channels:])


def test_the_variational_term_is_zero_at_the_posterior_itself():
    x0, eps, _ = BATCH
    timesteps = jnp.array([1, 2, 10, 100, 500, 999])
    exact = jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1)  # the true noise, and log β̃

    @jax.jit
    def vb(output):
        return DDPM().loss_at(x0, eps, timesteps, lambda x, t: output)[1]["vb"]

    np.testing.assert_allclose(vb(exact), 0.0, atol=1e-6)
    wide = jnp.concatenate([eps, jnp.ones_like(eps)], axis=-1)  # the true noise, and log β
    tables = DDPM().tables()
    gap = (tables.log_max - tables.log_min)[np.asarray(timesteps)]  # of two Gaussians with one mean
    np.testing.assert_allclose(vb(wide), 0.5 * (gap - 1 + np.exp(-gap)) / np.log(2), rtol=1e-2, atol=1e-6)


def test_the_decoder_term_counts_the_mass_of_all_bins():
    """At t = 0 the 256 bins cover the line, so exp(−NLL) over every grey value sums to one."""
    grey = np.linspace(-1, 1, 256, dtype=np.float32)
    x0 = jnp.asarray(grey.reshape(256, 1, 1, 1, 1))
    timesteps = jnp.zeros(256, jnp.int32)
    mean = 0.3  # the same prediction for every grey value: x̂0 = mean means x0 − x̂0 = x0 − mean
    process = DDPM(prediction="sample")
    place = jnp.full_like(x0, 1.0)
    prediction = jnp.concatenate([jnp.full_like(x0, mean), place], axis=-1)
    _, aux = jax.jit(lambda x0, eps: process.loss_at(x0, eps, timesteps, lambda x, t: prediction))(x0, 0 * x0)
    mass = 2.0 ** -np.asarray(aux["vb"], np.float64)
    np.testing.assert_allclose(mass.sum(), 1.0, atol=1e-4)
    assert abs(grey[mass.argmax()] - mean) < 1 / 255


def test_noise_and_tables_as_diffusers():
    torch = pytest.importorskip("torch")
    schedulers = pytest.importorskip("diffusers")
    theirs = schedulers.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    x0, eps, timesteps = BATCH
    noisy = theirs.add_noise(
        *(torch.from_numpy(np.array(values)) for values in (x0, eps)),
        torch.from_numpy(np.array(timesteps)).long(),
    )
    ours = jax.jit(DDPM().noise)(x0, eps, timesteps)
    np.testing.assert_allclose(ours, noisy.numpy(), atol=1e-5)  # its tables are made in fp32
    tables = DDPM().tables()
    np.testing.assert_allclose(tables.signal**2, theirs.alphas_cumprod.numpy(), rtol=2e-5)
    np.testing.assert_allclose(tables.signal**2 + tables.noise**2, 1.0, rtol=1e-6)
    assert all(table.dtype == np.float32 and np.all(np.isfinite(table)) for table in tables[1:])


def test_a_shorter_chain_keeps_the_noise_levels():
    kept = np.array([0, 250, 500, 999])
    full, short = DDPM().tables(), DDPM().tables(kept)
    np.testing.assert_array_equal(short.signal, full.signal[kept])
    np.testing.assert_array_equal(short.timesteps, kept)
    np.testing.assert_array_equal(short.signal_prev, np.append(np.float32(1), full.signal[kept[:-1]]))
    assert all(np.all(np.isfinite(table)) for table in DDPM().tables(np.array([999])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_timesteps": 1}, "num_train_timesteps=1"),
        ({"beta_start": 0.1, "beta_end": 0.01}, "beta_start <= beta_end"),
        ({"prediction": "velocity"}, "'velocity' is not known"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DDPM(**settings)
