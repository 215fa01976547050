"""Samplers against Latte's golden chains, diffusers' schedulers and Gaussian data; guidance."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_denoiser import toy_denoiser

from jaxalign.diffusion import DDPM, PROCESSES, SAMPLERS, RectifiedFlow, guided, sample, samplers

HERE = pathlib.Path(__file__).parent
GOLDEN = np.load(HERE / "golden_chains.npz")
CHAINS = {  # name in the golden file -> process, options of `sample`
    "ddim50": (DDPM(), {"sampler": "ddim", "steps": 50}),
    "ddim50_eta": (DDPM(), {"sampler": "ddim", "steps": 50, "eta": 0.7}),
    "ddim_even": (DDPM(), {"sampler": "ddim", "steps": 12, "spacing": "even"}),
    "ddpm_learned": (DDPM(), {"sampler": "ddpm", "steps": 50}),
    "ddpm_clip": (DDPM(), {"sampler": "ddpm", "steps": 50, "clip_denoised": True}),
    "ddpm_large": (DDPM(learn_sigma=False), {"sampler": "ddpm", "steps": 50}),
    "ddpm_small": (DDPM(learn_sigma=False, sigma_small=True), {"sampler": "ddpm", "steps": 50}),
    "ddpm_sample": (DDPM(prediction="sample"), {"sampler": "ddpm", "steps": 50}),
}


def _key(seed):
    """Keys whose generator compiles three times as fast as the default one; the samplers take any."""
    return jax.random.key(seed, impl="rbg")


@functools.cache  # one function a process, so that jit knows it again
def _toy(process):
    return lambda x, t: toy_denoiser(jnp, x, t, process.learn_sigma)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _compiled(process, predict, noise, key, options):
    return sample(process, predict, noise, key=key, **dict(options))


def _draw(process, noise, key=None, predict=None, **options):
    return np.asarray(_compiled(process, predict or _toy(process), noise, key, tuple(sorted(options.items()))))


@pytest.fixture
def golden_noise(monkeypatch):
    """Let every sampler step take its noise from the golden file."""
    drawn = jnp.asarray(GOLDEN["step_noise"])
    monkeypatch.setattr(samplers, "step_noise", lambda key, index, shape: drawn[index])
    _compiled.clear_cache()  # jit does not see that a global changed
    yield jnp.asarray(GOLDEN["noise"])
    _compiled.clear_cache()


def _assert_close(ours, theirs, tolerance=1e-5):
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("name", CHAINS)
def test_chains_as_latte(name, golden_noise):
    process, options = CHAINS[name]
    _assert_close(_draw(process, golden_noise, _key(0), **options), GOLDEN[name])


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_spacings_as_latte(spacing):
    golden = np.load(HERE / "golden_spacings.npz")
    np.testing.assert_array_equal(samplers.spaced_timesteps(1000, 50, spacing), golden[f"{spacing}_50"])
    for steps, digest in zip(range(2, 1001), golden[spacing], strict=True):
        if digest:
            kept = samplers.spaced_timesteps(1000, steps, spacing)
            assert len(kept) == steps and np.sum(kept * np.arange(1, steps + 1)) == digest
        else:
            with pytest.raises(ValueError, match=f"steps={steps}: no whole stride"):
                samplers.spaced_timesteps(1000, steps, spacing)


def test_a_single_step_starts_from_noise():
    """One call at the last timestep, one jump to its estimate of x0."""
    noise = jnp.asarray(GOLDEN["noise"])
    process = DDPM(prediction="sample", learn_sigma=False)
    end = _draw(process, noise, sampler="ddim", steps=1, spacing="even")
    np.testing.assert_allclose(end, toy_denoiser(jnp, noise, jnp.full(2, 999.0), False), atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_as_diffusers(eta, golden_noise):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="leading")
    theirs.set_timesteps(50)
    x = torch.tensor(GOLDEN["noise"])
    for index, t in enumerate(theirs.timesteps):
        output = toy_denoiser(torch, x, t.repeat(len(x)).float(), False)
        step_noise = torch.tensor(GOLDEN["step_noise"][index]) if eta else None
        x = theirs.step(output, t, x, eta=eta, variance_noise=step_noise).prev_sample
    process = DDPM(learn_sigma=False)
    ours = _draw(process, golden_noise, _key(0), sampler="ddim", steps=50, eta=eta)
    _assert_close(ours, x.numpy(), 2e-4)  # their tables are made in fp32


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_as_diffusers(variance, golden_noise, monkeypatch):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    def channels_first(video):
        return video.permute(0, 4, 1, 2, 3)

    theirs = diffusers.DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="leading", variance_type=variance
    )
    theirs.set_timesteps(50)
    process = DDPM(learn_sigma=variance == "learned_range", sigma_small=variance == "fixed_small")
    queue = iter(channels_first(step) for step in torch.tensor(GOLDEN["step_noise"]))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(queue))
    x = torch.tensor(GOLDEN["noise"])
    for t in theirs.timesteps:
        output = toy_denoiser(torch, x, t.repeat(len(x)).float(), process.learn_sigma)
        x = theirs.step(channels_first(output), t, channels_first(x)).prev_sample.permute(0, 2, 3, 4, 1)
    ours = _draw(process, golden_noise, _key(0), sampler="ddpm", steps=50, spacing="ddim")
    _assert_close(ours, x.numpy(), 2e-4)  # their tables are made in fp32


def test_euler_as_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
    x = torch.tensor(GOLDEN["noise"])
    for t in theirs.timesteps:
        x = theirs.step(-toy_denoiser(torch, x, t.repeat(len(x)).float(), False), t, x).prev_sample
    ours = _draw(RectifiedFlow(), jnp.asarray(GOLDEN["noise"]), sampler="euler", steps=20)
    _assert_close(ours, x.numpy())


def test_euler_clips_the_estimate_of_x0():
    """The last step lands on the last estimate of x0: clamped, it is inside [−1, 1]; else far outside."""
    noise = jnp.asarray(GOLDEN["noise"])
    bounds = [np.abs(_draw(RectifiedFlow(), noise, steps=8, clip_denoised=clip)).max() for clip in (True, False)]
    assert bounds[0] <= 1 + 1e-6 and bounds[1] > 2


# Data x0 ~ N(MEAN, SCALE²) in every element: the best prediction is affine in x_t, and known.
MEAN, SCALE = 0.4, 0.5
GAUSSIAN_SHAPE = (64, 4, 16, 16, 2)


def _gaussian_epsilon(kept=None):
    """E[ε | x_t], and, where a chain is given, the v that makes its learned variance the true one."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    variance = alpha_bar * SCALE**2 + 1 - alpha_bar  # of x_t
    place = np.zeros(1000)
    if kept is not None:
        now, before = alpha_bar[kept], np.append(1.0, alpha_bar[kept[:-1]])
        # x_{t−1} = a·x0 + s·ε' and x_t = r·x_{t−1} + sqrt(1 − r²)·ε'': condition one Gaussian on the other.
        ratio, spread = now / before, before * SCALE**2 + 1 - before
        truth = spread - ratio * spread**2 / (ratio * spread + 1 - ratio)
        beta = 1 - ratio
        small = beta * (1 - before) / (1 - now)
        small[0] = small[1]
        place[kept] = 2 * np.log(truth / small) / np.log(beta / small) - 1
        assert np.all(np.abs(place[kept[1:]]) <= 1)  # the true variance lies in the range, as it should
    tables = [jnp.asarray(table, jnp.float32) for table in (alpha_bar, variance, place)]

    def predict(x, t):
        a, var, v = (table[t.astype(jnp.int32)][:, None, None, None, None] for table in tables)
        eps = jnp.sqrt(1 - a) / var * (x - jnp.sqrt(a) * MEAN)
        return eps if kept is None else jnp.concatenate([eps, jnp.broadcast_to(v, x.shape)], axis=-1)

    return predict


def _gaussian_velocity(x, t):
    t = (t / 1000)[:, None, None, None, None]
    return MEAN + ((1 - t) * SCALE**2 - t) / ((1 - t) ** 2 * SCALE**2 + t**2) * (x - (1 - t) * MEAN)


@pytest.mark.parametrize(
    ("process", "options", "tolerance"),
    [
        # A learned variance makes every jump of the chain exact, however long: only sampling error is left.
        (DDPM(), {"sampler": "ddpm", "steps": 10}, 0.01),
        # A fixed one is right in the limit of many steps: the large one from above, the small from below.
        (DDPM(learn_sigma=False), {"sampler": "ddpm", "steps": 250}, 0.02),
        (DDPM(learn_sigma=False), {"sampler": "ddim", "steps": 250}, 0.02),
        (RectifiedFlow(), {"sampler": "euler", "steps": 100}, 0.02),
    ],
)
def test_a_gaussian_is_recovered(process, options, tolerance):
    if isinstance(process, RectifiedFlow):
        predict = _gaussian_velocity
    else:
        kept = samplers.spaced_timesteps(1000, options["steps"], "even") if process.learn_sigma else None
        predict = _gaussian_epsilon(kept)
    noise = jax.random.normal(jax.random.key(0), GAUSSIAN_SHAPE)
    if options["steps"] == 250 and options["sampler"] == "ddpm":
        noise = noise[:16]  # normal draws take the time, a minute for all; these leave the mean to half a per cent
    end = _draw(process, noise, _key(1), predict, **options)
    assert abs(end.mean() - MEAN) < tolerance * SCALE
    assert abs(end.std() / SCALE - 1) < tolerance
    skew, kurtosis = (np.mean(((end - end.mean()) / end.std()) ** power) for power in (3, 4))
    assert abs(skew) < 0.05 and abs(kurtosis - 3) < 0.1
    assert np.allclose(end.mean(axis=(0, 2, 3)), MEAN, atol=0.03)  # every frame and channel


def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance():
    process = DDPM(learn_sigma=False, sigma_small=True)
    noise, key = jnp.asarray(GOLDEN["noise"]), _key(5)
    options = {"steps": 50, "spacing": "ddim"}
    _assert_close(
        _draw(process, noise, key, sampler="ddim", eta=1.0, **options),
        _draw(process, noise, key, sampler="ddpm", **options),
        1e-4,
    )


@pytest.mark.parametrize(
    ("name", "eta", "random"),
    [("ddim", 0, False), ("ddim", 0.5, True), ("ddpm", 0, True), ("dpm", 0, True), ("euler", 0, False)],
)
def test_keys_decide_what_is_random(name, eta, random):
    process = SAMPLERS[name][0][0]()
    noise = jnp.asarray(GOLDEN["noise"])
    options = {"sampler": name, "steps": 5, "eta": eta}
    first, again, other = (_draw(process, noise, _key(seed), **options) for seed in (1, 1, 2))
    assert first.shape == noise.shape and first.dtype == np.float32 and np.all(np.isfinite(first))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) == random
    if not random:
        np.testing.assert_array_equal(first, _draw(process, noise, None, **options))


def test_the_default_key_and_low_precision_noise():
    """Without jit, with a threefry key, from bf16 noise: an fp32 chain."""
    noise = jnp.asarray(GOLDEN["noise"]).astype(jnp.bfloat16)
    end = sample(DDPM(), _toy(DDPM()), noise, sampler="ddpm", steps=3, key=jax.random.key(0))
    assert end.dtype == jnp.float32 and np.all(np.isfinite(end))


def test_every_process_has_a_sampler_of_its_own():
    noise = jnp.asarray(GOLDEN["noise"])
    for name, default in (("ddpm", "ddim"), ("v", "ddim"), ("flow", "euler")):
        process = PROCESSES[name]()
        np.testing.assert_array_equal(_draw(process, noise, steps=4), _draw(process, noise, steps=4, sampler=default))


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        (DDPM(), {"sampler": "euler"}, "'euler' does not fit a DDPM process; write 'ddim' or 'ddpm'"),
        (RectifiedFlow(), {"sampler": "ddim"}, "'ddim' does not fit a RectifiedFlow process; write 'euler'"),
        (DDPM(), {"sampler": "dpm"}, "'dpm' does not fit a DDPM process; write 'ddim' or 'ddpm'"),
        (DDPM(), {"sampler": "heun"}, "'heun' is no sampler for a DDPM process; write 'ddim' or 'ddpm'"),
        (DDPM(), {"steps": 0}, "steps=0"),
        (DDPM(), {"sampler": "ddpm"}, "give a key"),
        (DDPM(), {"eta": 0.5}, "give a key"),
        (DDPM(), {"eta": 1.5}, "eta=1.5"),
        (DDPM(), {"sampler": "ddpm", "eta": 0.5}, "eta=0.5 belongs to sampler='ddim'"),
        (DDPM(), {"spacing": "trailing"}, "'trailing' is not known"),
        (DDPM(), {"steps": 1001}, "only 1000 timesteps"),
        (DDPM(), {"steps": 60}, "write 59 or 63 steps, or spacing='even'"),
        (RectifiedFlow(), {"spacing": "even"}, "belongs to a DDPM process"),
    ],
)
def test_what_does_not_fit_is_refused(process, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        sample(process, _toy(process), jnp.asarray(GOLDEN["noise"]), **options)
    assert "\n" not in str(caught.value)


def _conditional_network(sizes):
    """A network of 3 + 2 output channels a condition shifts; notes the batch sizes that it is called with."""

    def predict(x, timesteps, condition):
        sizes.append(len(x))
        shift = (condition["label"] * timesteps / 1000)[:, None, None, None, None]
        return jnp.concatenate([jnp.sin(x + shift), jnp.cos(x[..., :2] + shift)], axis=-1)

    return predict


def test_guidance():
    sizes = []
    network = _conditional_network(sizes)
    x = jnp.asarray(GOLDEN["noise"])
    timesteps = jnp.array([300.0, 700.0])
    condition, null = {"label": jnp.array([2, 5])}, {"label": jnp.array([9, 9])}
    conditional, unconditional = network(x, timesteps, condition), network(x, timesteps, null)
    sizes.clear()
    one, zero, four = (guided(network, condition, null, scale)(x, timesteps) for scale in (1, 0.0, 4.0))
    assert sizes == [2, 4, 4]  # scale 1 does no work twice, the others make one call
    np.testing.assert_array_equal(one, conditional)
    np.testing.assert_allclose(zero[..., :3], unconditional[..., :3], atol=1e-6)
    np.testing.assert_allclose(four[..., :3], (4 * conditional - 3 * unconditional)[..., :3], atol=1e-5)
    for out in (zero, four):
        np.testing.assert_allclose(out[..., 3:], conditional[..., 3:], atol=1e-6)
    near_one = guided(network, condition, null, 1.0 + 1e-6)(x, timesteps)
    np.testing.assert_allclose(near_one, one, atol=1e-5)
    with pytest.raises(ValueError, match="guidance_scale=2"):
        guided(network, None, None, 2.0)


def test_guided_sampling_moves_towards_the_condition():
    """Labels are means of Gaussians: guidance w moves the mean from the null label's to w times as far."""
    process = RectifiedFlow()

    def network(x, t, label):
        t = (t / 1000)[:, None, None, None, None]
        mean = label[:, None, None, None, None]
        return mean + ((1 - t) * SCALE**2 - t) / ((1 - t) ** 2 * SCALE**2 + t**2) * (x - (1 - t) * mean)

    noise = jax.random.normal(jax.random.key(0), (2, 4, 16, 16, 2))
    label, null = jnp.array([1.0, -1.0]), jnp.zeros(2)
    ends = [
        _draw(process, noise, predict=guided(network, label, null, scale), steps=50).mean(axis=(1, 2, 3, 4))
        for scale in (0.0, 1.0, 3.0)
    ]
    # The velocity is affine in the mean, so guidance w is exactly a Gaussian around w · label.
    np.testing.assert_allclose(ends, [[0, 0], [1, -1], [3, -3]], atol=0.1)
