"""DDIM and SDE-DPM++ 2M on the v-prediction process against diffusers' schedulers; dynamic guidance."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_denoiser import toy_denoiser

from jaxalign.diffusion import VPrediction, dynamic_guidance, guided, sample, samplers
from jaxalign.diffusion.v_prediction import trailing_timesteps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 4, 4, 5)
RNG = np.random.default_rng(7)
NOISE = RNG.standard_normal(SHAPE).astype(np.float32)
STEP_NOISE = RNG.standard_normal((50, *SHAPE)).astype(np.float32)
KINDS = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}


def theirs(name, shift, steps):
    scheduler = KINDS[name](
        snr_shift_scale=shift,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def their_chain(name, shift, steps, monkeypatch, predict):
    from diffusers.schedulers import scheduling_dpm_cogvideox

    scheduler, x, before = theirs(name, shift, steps), torch.from_numpy(NOISE), None
    for index, t in enumerate(scheduler.timesteps):
        output = predict(x, t)
        if name == "ddim":
            x = scheduler.step(output, t, x).prev_sample
            continue
        drawn = torch.from_numpy(STEP_NOISE[index])
        monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", lambda *args, drawn=drawn, **kwargs: drawn)
        last = scheduler.timesteps[index - 1] if index else None
        x, before = scheduler.step(output, before, t, last, x)
    return x.numpy()


def our_chain(predict, monkeypatch, **options):
    monkeypatch.setattr(samplers, "step_noise", lambda key, index, shape: jnp.asarray(STEP_NOISE)[index])
    key = jax.random.key(0, impl="rbg")
    process = VPrediction(snr_shift=options.pop("shift"))
    return np.asarray(jax.jit(lambda noise: sample(process, predict, noise, key=key, **options))(NOISE))


def toy(x, t):
    return toy_denoiser(jnp, x, t, False)


def close(ours, expected):
    assert np.abs(expected).max() > 0.1
    assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max()


# 30 and 7 do not divide 1000: then a step does not end where the next one begins, upstream too.
@pytest.mark.parametrize("steps", [50, 30, 7, 1])
@pytest.mark.parametrize(("name", "shift"), [("ddim", 3.0), ("dpm", 1.0)])
def test_chains_as_diffusers(name, shift, steps, monkeypatch):
    def predict(x, t):
        return toy_denoiser(torch, x, t.repeat(len(x)).float(), False)

    expected = their_chain(name, shift, steps, monkeypatch, predict)
    close(our_chain(toy, monkeypatch, shift=shift, sampler=name, steps=steps), expected)


def test_dpm_is_of_second_order_and_uses_its_noise(monkeypatch):
    ours = our_chain(toy, monkeypatch, shift=1.0, sampler="dpm", steps=7)
    first_order = VPrediction.tables
    monkeypatch.setattr(VPrediction, "tables", lambda *args: first_order(*args)._replace(back=np.zeros(7, np.float32)))
    assert np.abs(our_chain(toy, monkeypatch, shift=1.0, sampler="dpm", steps=7) - ours).max() > 1e-2
    monkeypatch.undo()
    monkeypatch.setattr(samplers, "step_noise", lambda key, index, shape: jnp.zeros(shape))
    silent = sample(VPrediction(snr_shift=1.0), toy, jnp.asarray(NOISE), sampler="dpm", steps=7, key=jax.random.key(0))
    assert np.abs(silent - ours).max() > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 49, 50, 300, 999, 1000])
def test_trailing_timesteps_as_diffusers(steps):
    np.testing.assert_array_equal(trailing_timesteps(1000, steps)[::-1], theirs("ddim", 3.0, steps).timesteps.numpy())


def test_a_gaussian_is_recovered():
    """Data N(0.4, 0.5²) in every element: its best v is affine in x_t. Both samplers draw that distribution."""
    mean, scale = 0.4, 0.5
    process = VPrediction()
    alpha_bar = process.alpha_bar()
    tables = [jnp.asarray(table, jnp.float32) for table in (np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))]

    def predict(x, t):
        signal, noise = (table[t.astype(jnp.int32)][:, None, None, None, None] for table in tables)
        # cov(v, x_t) / var(x_t), with v = signal·ε − noise·x0
        slope = signal * noise * (1 - scale**2) / (signal**2 * scale**2 + noise**2)
        return -noise * mean + slope * (x - signal * mean)

    # DDIM is of first order; DPM's last step goes to the mean of what x0 may still be, which costs some spread.
    for options, steps, tolerance in (({"sampler": "ddim"}, 200, 0.06), ({"sampler": "dpm"}, 250, 0.04)):
        draw = functools.partial(sample, process, predict, steps=steps, key=jax.random.key(1, impl="rbg"), **options)
        end = jax.jit(draw)(jax.random.normal(jax.random.key(0, impl="rbg"), (16, 2, 8, 8, 2)))
        assert abs(end.mean() - mean) < 0.03 * scale, options
        assert abs(end.std() / scale - 1) < tolerance, options


def test_dynamic_guidance_as_the_pipeline(monkeypatch):
    scales = dynamic_guidance(6.0, 50)
    for t in (999, 979, 500, 49, 19, 0):  # the pipeline's expression, in Python's float64
        expected = 1 + 6.0 * (1 - math.cos(math.pi * ((50 - t) / 50) ** 5.0)) / 2
        assert abs(scales[t] - expected) < 1e-5, t
    assert scales.shape == (1000,) and 1 <= scales.min() < 1.01 and 6.9 < scales.max() <= 7
    np.testing.assert_allclose(scales[0], 7, atol=1e-6)

    def predict(xp, x, t, shift):
        return toy_denoiser(xp, x, t, False) + shift

    def pipeline(x, t):
        times = t.repeat(len(x)).float()
        null, text = (predict(torch, x, times, shift) for shift in (0.0, 0.05))
        return null + float(scales[int(t)]) * (text - null)

    def network(x, t, shift):
        return predict(jnp, x, t, shift[:, None, None, None, None])

    expected = their_chain("ddim", 3.0, 10, monkeypatch, pipeline)
    ours = guided(network, jnp.full(2, 0.05), jnp.zeros(2), scales)
    close(our_chain(ours, monkeypatch, shift=3.0, sampler="ddim", steps=10), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ddpm"}, "'ddpm' does not fit a VPrediction process; write 'ddim' or 'dpm'"),
        ({"sampler": "dpm"}, "give a key"),
        ({"sampler": "dpm", "eta": 0.5}, "eta=0.5 belongs to sampler='ddim'"),
        ({"spacing": "even"}, "spacing='even' belongs to a DDPM process"),
        ({"steps": 1001}, "only 1000 timesteps"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        sample(VPrediction(), toy, jnp.asarray(NOISE), **options)
    assert "\n" not in str(caught.value)
