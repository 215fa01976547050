"""The process of CogVideoX: DDPM's chain with its signal-to-noise ratio shifted, down to pure noise, and v-prediction.

Sources: Salimans & Ho 2022 (v), Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed" (zero
terminal SNR, trailing timesteps); numbers and order of the steps as in diffusers' scheduling_ddim_cogvideox.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxalign.diffusion.process import Key, checked_prediction, discrete_timesteps, draw, mean_per_sample, per_sample


class Tables(NamedTuple):
    """Coefficients of a chain, one entry a timestep that is kept, smallest first: fp32, made in float64."""

    timesteps: np.ndarray  # the original timestep of each entry (int32): this is what the network is told
    signal: np.ndarray  # sqrt(ᾱ): x_t = signal·x0 + noise·ε
    noise: np.ndarray  # sqrt(1 − ᾱ); 1 at the last timestep, where nothing of x0 is left
    signal_prev: np.ndarray  # sqrt(ᾱ) where the step from this entry ends (1 when it ends at the data)
    noise_prev: np.ndarray  # 1 − ᾱ there
    posterior: np.ndarray  # variance of q(x_prev | x_t, x0)
    keep: np.ndarray  # DPM++: x_prev = keep·x_t + move·D + renoise·ε, D being x0 or its extrapolation
    move: np.ndarray
    renoise: np.ndarray
    back: np.ndarray  # D = (1 + back)·x0 − back·(x0 of the entry that was visited before); 0 where there is none


@dataclass(frozen=True)
class VPrediction:
    """Settings of a v-prediction process; hashable, so it can be a static argument of jit.

    The betas' square roots are linear; then ᾱ ← ᾱ / (s + (1 − s)ᾱ) with s = `snr_shift` (3 for CogVideoX-2B, 1 for
    5B), which divides the signal-to-noise ratio by s; then sqrt(ᾱ) is moved and stretched so that it ends at zero.
    Raises ValueError for settings that make no process.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift: float | int = 3.0
    zero_terminal_snr: bool = True
    learn_sigma: ClassVar[bool] = False
    prediction: ClassVar[str] = "v"

    def __post_init__(self):
        if self.num_train_timesteps < 2:
            raise ValueError(f"VPrediction: num_train_timesteps={self.num_train_timesteps}; write 2 or more (1000)")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"VPrediction: betas from {self.beta_start} to {self.beta_end}; write 0 < beta_start <= beta_end < 1"
            )
        if not self.snr_shift > 0:
            raise ValueError(f"VPrediction: snr_shift={self.snr_shift}; write a positive number (1.0 for no shift)")

    def alpha_bar(self) -> Float[np.ndarray, "timesteps"]:
        """ᾱ of every timestep, float64: the share of the data in the variance of x_t."""
        ends = self.beta_start**0.5, self.beta_end**0.5
        alpha_bar = np.cumprod(1.0 - np.linspace(*ends, self.num_train_timesteps, dtype=np.float64) ** 2)
        alpha_bar = alpha_bar / (self.snr_shift + (1.0 - self.snr_shift) * alpha_bar)
        if self.zero_terminal_snr:  # Lin et al., algorithm 1
            root = np.sqrt(alpha_bar)
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alpha_bar

    def tables(self, kept: np.ndarray | None = None) -> Tables:
        """Coefficients of the whole chain, or of the shorter one over the ascending timesteps `kept`.

        A step from timestep t ends at t − ⌊num_train_timesteps / len(kept)⌋, or at the data when that is negative.
        That is upstream's rule: where the number of steps does not divide the timesteps, it may be one off the
        timestep that the network is told next.
        """
        alpha_bar = self.alpha_bar()
        kept = np.arange(self.num_train_timesteps) if kept is None else np.asarray(kept)
        ends = kept - self.num_train_timesteps // len(kept)
        now, previous = alpha_bar[kept], np.where(ends < 0, 1.0, alpha_bar[np.maximum(ends, 0)])
        with np.errstate(divide="ignore", invalid="ignore"):  # infinite at pure noise and at the data
            log_snr, log_snr_prev = (0.5 * np.log(a / (1.0 - a)) for a in (now, previous))
            step = log_snr_prev - log_snr  # h of DPM-Solver++
            before = log_snr - np.append(log_snr[1:], np.nan)  # the same of the visit before, at a later timestep
            back = np.where(np.isnan(before) | (ends < 0), 0.0, step / (2.0 * before))
        tables = Tables(
            timesteps=kept,
            signal=np.sqrt(now),
            noise=np.sqrt(1.0 - now),
            signal_prev=np.sqrt(previous),
            noise_prev=1.0 - previous,
            posterior=(1.0 - previous) / (1.0 - now) * (1.0 - now / previous),
            keep=np.sqrt((1.0 - previous) / (1.0 - now)) * np.exp(-step),
            move=-np.expm1(-2.0 * step) * np.sqrt(previous),
            renoise=np.sqrt((1.0 - previous) * -np.expm1(-2.0 * step)),
            back=back,
        )
        return Tables(tables.timesteps.astype(np.int32), *(table.astype(np.float32) for table in tables[1:]))

    def timesteps_at(self, fractions: Float[Array, "b"]) -> Int[Array, "b"]:
        """Timesteps 0 … num_train_timesteps − 1 at fractions of the process in [0, 1] (1 gives the last)."""
        return discrete_timesteps(fractions, self.num_train_timesteps)

    def noise(
        self, x0: Float[Array, "b t h w c"], eps: Float[Array, "b t h w c"], timesteps: Int[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """x_t = sqrt(ᾱ) x0 + sqrt(1 − ᾱ) ε in fp32."""
        signal, noise = self._levels(timesteps)
        return signal * x0.astype(jnp.float32) + noise * eps.astype(jnp.float32)

    def loss_at(
        self,
        x0: Float[Array, "b t h w c"],
        eps: Float[Array, "b t h w c"],
        timesteps: Int[Array, "b"],
        predict: Callable,
    ) -> tuple[Float[Array, "b"], dict[str, Float[Array, "b"]]]:
        """MSE of v = sqrt(ᾱ) ε − sqrt(1 − ᾱ) x0 of each sample at given noise and timesteps: no randomness.

        predict(x_t, timesteps[b] as fp32) -> v. x̂0 = sqrt(ᾱ) x_t − sqrt(1 − ᾱ) v̂, so x̂0 − x0 is the error of v
        times −sqrt(1 − ᾱ), and the error of x0 weighted by 1/(1 − ᾱ), upstream's loss, is this one.
        aux: 'timesteps' as the network saw them and 'mse' (the loss itself); each fp32 [b].
        """
        seen = timesteps.astype(jnp.float32)
        x_t = self.noise(x0, eps, timesteps)
        v = checked_prediction(predict(x_t, seen), x_t, self.learn_sigma)
        signal, noise = self._levels(timesteps)
        target = signal * eps.astype(jnp.float32) - noise * x0.astype(jnp.float32)
        mse = mean_per_sample(jnp.square(v - target))
        return mse, {"timesteps": seen, "mse": mse}

    def training_loss(
        self, key: Key, x0: Float[Array, "b t h w c"], predict: Callable
    ) -> tuple[Float[Array, "b"], dict[str, Float[Array, "b"]]]:
        """`loss_at` at random noise and timesteps, uniform over all of them."""
        fractions, eps = draw(key, x0)
        return self.loss_at(x0, eps, self.timesteps_at(fractions), predict)

    def _levels(self, timesteps: Int[Array, "b"]) -> tuple[Shaped[Array, "b 1 1 1 1"], Shaped[Array, "b 1 1 1 1"]]:
        alpha_bar = self.alpha_bar()
        levels = (np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar))
        signal, noise = (per_sample(jnp.asarray(level, jnp.float32)[timesteps]) for level in levels)
        return signal, noise


def trailing_timesteps(num_train_timesteps: int, steps: int) -> np.ndarray:
    """The `steps` timesteps, ascending, that a chain keeps when it counts down from the last one in equal strides.

    1000 and 50 give 19, 39 … 999, so that the first call sees pure noise (Lin et al. 2024, table 2, "trailing").
    Raises ValueError when there are too few timesteps.
    """
    if steps > num_train_timesteps:
        raise ValueError(f"steps={steps}: there are only {num_train_timesteps} timesteps; write that many or fewer")
    # Rounding of halves and the running difference are upstream's (diffusers set_timesteps).
    kept = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / steps))[:steps].astype(np.int64) - 1
    return kept[::-1]


def dynamic_guidance(
    guidance_scale: float | int, steps: int, num_train_timesteps: int = 1000
) -> Float[np.ndarray, "timesteps"]:
    """Guidance scale at each timestep, for `guided`: 1 + g·(1 − cos(π((N − t)/N)⁵))/2, t the timestep, N the steps.

    With the timestep (0 … 999) where one would expect the step, as upstream's pipeline has it, the scale jumps between
    1 and 1 + g until t falls below N. Computed in float64: the argument of the cosine reaches millions.
    Source: diffusers pipeline_cogvideox.py, use_dynamic_cfg.
    """
    place = (steps - np.arange(num_train_timesteps, dtype=np.float64)) / steps
    return (1.0 + guidance_scale * (1.0 - np.cos(np.pi * place**5)) / 2.0).astype(np.float32)
