"""Samplers: from noise to latents in `steps` calls of the network, one compiled loop each; and guidance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jaxtyping import Array, Float

from jaxalign.diffusion.ddpm import DDPM, range_log_variance
from jaxalign.diffusion.flow import RectifiedFlow
from jaxalign.diffusion.process import Key, checked_prediction, per_sample
from jaxalign.diffusion.v_prediction import VPrediction, trailing_timesteps

SPACINGS = ("ddim", "even")
Keys = jaxtyping.Key[Array, " b"]


def sample(
    process: DDPM | VPrediction | RectifiedFlow,
    predict: Callable,
    noise: Float[Array, "b t h w c"],
    *,
    sampler: str | None = None,
    steps: int = 50,
    key: Key | Keys | None = None,
    clip_denoised: bool = False,
    eta: float | int = 0.0,
    spacing: str | None = None,
) -> Float[Array, "b t h w c"]:
    """Draw latents (fp32) from standard normal noise by `steps` calls of predict(x_t, timesteps[b]).

    sampler: a name in SAMPLERS; None takes the first that fits the process (ddim for DDPM and v, euler for flow).
    key: needed where noise is drawn on the way (ddpm, dpm, or ddim with eta > 0); a key a sample makes each
    independent of the others in its batch.
    clip_denoised: clamp every estimate of x0 to [−1, 1]; for pixels, never for VAE latents.
    eta: ddim only; 0 is deterministic, 1 is DDPM's own posterior (DDIM eq. 16).
    spacing: which timesteps a shorter DDPM chain keeps, see `spaced_timesteps`; None is 'ddim' for ddim and
    'even' for ddpm. A v-prediction chain always counts down from the last timestep (trailing).
    Everything but noise and key is static under jit.
    Raises ValueError for a sampler, option or number of steps that does not fit, naming what does.
    """
    fitting = [name for name, (kinds, _) in SAMPLERS.items() if isinstance(process, kinds)]
    sampler = fitting[0] if sampler is None else sampler
    if sampler not in fitting:
        problem = "does not fit" if sampler in SAMPLERS else "is no sampler for"
        raise ValueError(
            f"sampler={sampler!r} {problem} a {type(process).__name__} process; "
            f"write {' or '.join(repr(name) for name in fitting)}"
        )
    if steps < 1:
        raise ValueError(f"sample: steps={steps}; write 1 or more (50 is usual)")
    if eta != 0.0 and sampler != "ddim":
        raise ValueError(f"sample: eta={eta} belongs to sampler='ddim' only; leave it out for {sampler!r}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"sample: eta={eta}; write a number from 0 (deterministic) to 1 (as noisy as DDPM)")
    if spacing is not None and not isinstance(process, DDPM):
        raise ValueError(f"sample: spacing={spacing!r} belongs to a DDPM process; leave it out for {sampler!r}")
    if key is None and (sampler in ("ddpm", "dpm") or eta > 0.0):
        raise ValueError(f"sample: sampler={sampler!r} with eta={eta} draws noise at every step; give a key")
    options = {
        "ddim": {"key": key, "spacing": spacing, "eta": eta},
        "ddpm": {"key": key, "spacing": spacing},
        "dpm": {"key": key},
    }
    _, run = SAMPLERS[sampler]
    noise = noise.astype(jnp.float32)
    return run(process, predict, noise, steps=steps, clip_denoised=clip_denoised, **options.get(sampler, {}))


def ddpm(process, predict, noise, *, steps, clip_denoised, key, spacing):
    """Ancestral sampling (DDPM algorithm 2) over a chain of `steps` timesteps (IDDPM section 4)."""

    def step(x, index, row):
        x0, _, rest = _denoised(process, predict, x, row, clip_denoised)
        if process.learn_sigma:
            log_variance = range_log_variance(row, rest)
        else:
            log_variance = row.log_min if process.sigma_small else row.log_max
        # The last step ends at the mean: q(x0 | x_1, x0) is a point.
        scale = jnp.where(index == steps - 1, 0.0, jnp.exp(0.5 * log_variance))
        return row.mean_x0 * x0 + row.mean_xt * x + scale * step_noise(key, index, x.shape)

    kept = spaced_timesteps(process.num_train_timesteps, steps, spacing or "even")
    return _descend(step, noise, process.tables(kept))


def ddim(process, predict, noise, *, steps, clip_denoised, key, spacing, eta):
    """DDIM (eq. 12) over a chain of `steps` timesteps. A learned variance is left out: eta sets it."""

    def step(x, index, row):
        x0, eps, _ = _denoised(process, predict, x, row, clip_denoised)
        variance = eta**2 * row.posterior
        x = row.signal_prev * x0 + jnp.sqrt(jnp.maximum(row.noise_prev - variance, 0.0)) * eps
        return x if eta == 0.0 else x + jnp.sqrt(variance) * step_noise(key, index, x.shape)

    if isinstance(process, VPrediction):
        kept = trailing_timesteps(process.num_train_timesteps, steps)
    else:
        kept = spaced_timesteps(process.num_train_timesteps, steps, spacing or "ddim")
    return _descend(step, noise, process.tables(kept))


def dpm(process, predict, noise, *, steps, clip_denoised, key):
    """DPM-Solver++ for the diffusion SDE, second order, multistep (Lu et al. 2022, appendix A, "SDE-DPM-Solver++2M").

    The first step is of first order, for nothing was seen before it, and so is a last one that ends at the data, where
    the log-SNR is infinite. Source: diffusers scheduling_dpm_cogvideox.py.
    """

    def step(state, index, row):
        x, seen_before = state
        x0, _, _ = _denoised(process, predict, x, row, clip_denoised)
        target = (1.0 + row.back) * x0 - row.back * seen_before
        x = row.keep * x + row.move * target + row.renoise * step_noise(key, index, x.shape)
        return x, x0

    kept = trailing_timesteps(process.num_train_timesteps, steps)
    return _descend(step, (noise, jnp.zeros_like(noise)), process.tables(kept))[0]


def euler(process, predict, noise, *, steps, clip_denoised):
    """Euler steps z ← z + v/steps while the time falls evenly from 1 to 0; the last call is at 1/steps."""

    def step(x, _, time):
        seen = jnp.full(x.shape[:1], time * process.timestep_scale, jnp.float32)
        velocity = checked_prediction(predict(x, seen), x, process.learn_sigma)
        if clip_denoised:  # x0 = x_t + t·v
            velocity = (jnp.clip(x + time * velocity, -1.0, 1.0) - x) / time
        return x + velocity / steps

    return _descend(step, noise, (np.arange(1, steps + 1) / steps).astype(np.float32))


# Name -> the processes it fits and the function; the first that fits a process is that process's default.
SAMPLERS = {
    "ddim": ((DDPM, VPrediction), ddim),
    "ddpm": ((DDPM,), ddpm),
    "dpm": ((VPrediction,), dpm),
    "euler": ((RectifiedFlow,), euler),
}


def guided(
    predict_with_condition: Callable,
    condition,
    null_condition,
    guidance_scale: float | int | Float[np.ndarray, "timesteps"],
) -> Callable:
    """Classifier-free guidance: turn predict(x_t, timesteps, condition) into predict(x_t, timesteps).

    out = uncond + guidance_scale · (cond − uncond) on the first c channels, from one call at twice the batch;
    further channels (a learned variance) are the conditional ones, as in Latte's forward_with_cfg. Scale 1
    calls the conditional network alone; scale 0 is the unconditional prediction. Conditions are pytrees of
    arrays with the batch first; guidance_scale is a Python number, or a NumPy table with the scale at each timestep
    (`dynamic_guidance`). Raises ValueError for a condition of None.
    """
    table = guidance_scale if isinstance(guidance_scale, np.ndarray) else None
    if table is None and guidance_scale == 1:
        return lambda x_t, timesteps: predict_with_condition(x_t, timesteps, condition)
    if condition is None or null_condition is None:
        name = guidance_scale if table is None else "a table"
        raise ValueError(
            f"guidance_scale={name} needs a condition and a null condition, but one is None; "
            "an unconditional model takes guidance_scale=1"
        )

    def in_pairs(first, second):
        # x0 x0' x1 x1' …: when the batch is split over devices, a pair stays on the device of its sample.
        return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), first, second)

    def predict(x_t, timesteps):
        both = predict_with_condition(
            in_pairs(x_t, x_t), in_pairs(timesteps, timesteps), in_pairs(condition, null_condition)
        )
        channels = x_t.shape[-1]
        conditional, unconditional = both[0::2], both[1::2]
        start = unconditional[..., :channels]
        scale = guidance_scale if table is None else per_sample(jnp.asarray(table)[timesteps.astype(jnp.int32)])
        guided_part = start + scale * (conditional[..., :channels] - start)
        return jnp.concatenate([guided_part, conditional[..., channels:]], axis=-1)

    return predict


def spaced_timesteps(num_train_timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """Return the `steps` timesteps, ascending, that a shorter chain keeps.

    'ddim': 0, s, 2s, … with the smallest whole stride s > 0 that gives this many (DDIM; Latte's "ddim50" is
    0, 20 … 980). 'even': from 0 to the last timestep by a fractional stride, rounded (IDDPM; Latte's "250");
    a single step is the last timestep, where upstream would take the first and never look at the noise.
    Raises ValueError when there are too few timesteps, no such stride, or the spacing is not known.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing={spacing!r} is not known; write one of {SPACINGS}")
    if steps > num_train_timesteps:
        raise ValueError(f"steps={steps}: there are only {num_train_timesteps} timesteps; write that many or fewer")
    if spacing == "even":
        if steps == 1:
            return np.array([num_train_timesteps - 1])
        stride = (num_train_timesteps - 1) / (steps - 1)
        # A running sum, not a product: upstream's rounding of halves depends on it.
        return np.rint(np.cumsum([0.0, *[stride] * (steps - 1)])).astype(np.int64)
    counts = {-(-num_train_timesteps // stride): stride for stride in range(num_train_timesteps - 1, 0, -1)}
    if steps not in counts:
        nearest = sorted(sorted(counts, key=lambda count: abs(count - steps))[:2])
        raise ValueError(
            f"steps={steps}: no whole stride keeps that many of {num_train_timesteps} timesteps; write "
            f"{' or '.join(str(count) for count in nearest)} steps, or spacing='even'"
        )
    return np.arange(0, num_train_timesteps, counts[steps])


def step_noise(key: Key | Keys, index: Array, shape: tuple[int, ...]) -> Array:
    """The noise of a sampler's step `index`, counted from the first call: standard normal, fp32."""
    if key.ndim and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # a key a sample
        return jax.vmap(lambda one: step_noise(one, index, shape[1:]))(key)
    return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)


def _denoised(process, predict, x, row, clip: bool):
    """Call the network; return its estimates of x0 and ε, and the channels beyond them."""
    seen = jnp.full(x.shape[:1], row.timesteps, jnp.float32)
    output = checked_prediction(predict(x, seen), x, process.learn_sigma)
    output, rest = output[..., : x.shape[-1]], output[..., x.shape[-1] :]
    if process.prediction == "v":
        x0 = row.signal * x - row.noise * output
        if not clip:
            return x0, row.noise * x + row.signal * output, rest
        x0 = jnp.clip(x0, -1.0, 1.0)
        return x0, (x - row.signal * x0) / row.noise, rest
    x0 = output if process.prediction == "sample" else row.recip * x - row.recipm1 * output
    if clip:
        x0 = jnp.clip(x0, -1.0, 1.0)
    if process.prediction == "epsilon" and not clip:
        return x0, output, rest
    return x0, (row.recip * x - x0) / row.recipm1, rest  # the ε that belongs to this x0


def _descend(step: Callable, start, rows):
    """Scan `step(x, index, row) -> x` over the rows of a table from the last to the first; x may be a pytree."""
    rows = jax.tree.map(lambda table: jnp.asarray(table[::-1]), rows)
    indices = jnp.arange(len(jax.tree.leaves(rows)[0]))
    end, _ = jax.lax.scan(lambda x, at: (step(x, *at), None), start, (indices, rows))
    return end
