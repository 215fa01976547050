"""DDPM: discrete Gaussian diffusion with ε-prediction and, optionally, a learned variance.

Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (IDDPM: learned range, hybrid loss); numbers and
defaults as in Vchitect/Latte `diffusion/__init__.py` and `diffusion/gaussian_diffusion.py`, which Align4Gen
builds on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.diffusion.process import Key, checked_prediction, discrete_timesteps, draw, mean_per_sample, per_sample

PREDICTIONS = ("epsilon", "sample")


class Tables(NamedTuple):
    """Coefficients of a chain, one entry a timestep that is kept, smallest first: fp32, made in float64."""

    timesteps: np.ndarray  # the original timestep of each entry (int32): this is what the network is told
    signal: np.ndarray  # sqrt(ᾱ): x_t = signal·x0 + noise·ε                              DDPM eq. 4
    noise: np.ndarray  # sqrt(1 − ᾱ)
    recip: np.ndarray  # sqrt(1/ᾱ): x0 = recip·x_t − recipm1·ε                            eq. 4 turned round
    recipm1: np.ndarray  # sqrt(1/ᾱ − 1)
    mean_x0: np.ndarray  # mean of q(x_{t−1} | x_t, x0) = mean_x0·x0 + mean_xt·x_t        DDPM eq. 7
    mean_xt: np.ndarray
    signal_prev: np.ndarray  # sqrt(ᾱ) of the entry before (1 before the first): DDIM eq. 12
    noise_prev: np.ndarray  # 1 − ᾱ of the entry before
    posterior: np.ndarray  # β̃, the variance of q(x_{t−1} | x_t, x0); 0 at the first entry
    log_min: np.ndarray  # log β̃, floored at the first entry: the range's lower end     IDDPM eq. 15
    log_max: np.ndarray  # log β: its upper end


@dataclass(frozen=True)
class DDPM:
    """Settings of a DDPM process; hashable, so it can be a static argument of jit.

    With learn_sigma the network gives 2c channels: the prediction and v in [−1, 1], the place of the
    log-variance between log β̃ and log β (IDDPM eq. 15). Without it sampling takes β (Latte's default) or,
    with sigma_small, β̃. Betas are linear over exactly num_train_timesteps, never rescaled for another number.
    Raises ValueError for settings that make no process.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"  # 'epsilon', or 'sample' for x0 itself
    learn_sigma: bool = True
    sigma_small: bool = False

    def __post_init__(self):
        if self.num_train_timesteps < 2:
            raise ValueError(f"DDPM: num_train_timesteps={self.num_train_timesteps}; write 2 or more (1000)")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"DDPM: betas from {self.beta_start} to {self.beta_end}; write 0 < beta_start <= beta_end < 1"
            )
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"DDPM: prediction={self.prediction!r} is not known; write one of {PREDICTIONS}")

    def tables(self, kept: np.ndarray | None = None) -> Tables:
        """Coefficients of the whole chain, or of the shorter one over the ascending timesteps `kept`.

        A shorter chain keeps ᾱ at its timesteps and takes the betas that lead there (IDDPM section 4), so
        posterior and learned range belong to the longer jumps; `timesteps` still holds the original numbers.
        """
        betas = np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, dtype=np.float64)
        kept = np.arange(self.num_train_timesteps) if kept is None else np.asarray(kept)
        alpha_bar = np.cumprod(1.0 - betas)[kept]
        previous = np.append(1.0, alpha_bar[:-1])
        betas = 1.0 - alpha_bar / previous
        posterior = betas * (1.0 - previous) / (1.0 - alpha_bar)  # 0 at the first entry, where log needs a floor
        floor = posterior[1] if len(kept) > 1 else betas[0]
        tables = Tables(
            timesteps=kept,
            signal=np.sqrt(alpha_bar),
            noise=np.sqrt(1.0 - alpha_bar),
            recip=np.sqrt(1.0 / alpha_bar),
            recipm1=np.sqrt(1.0 / alpha_bar - 1.0),
            mean_x0=betas * np.sqrt(previous) / (1.0 - alpha_bar),
            mean_xt=(1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar),
            signal_prev=np.sqrt(previous),
            noise_prev=1.0 - previous,
            posterior=posterior,
            log_min=np.log(np.append(floor, posterior[1:])),
            log_max=np.log(betas),
        )
        return Tables(tables.timesteps.astype(np.int32), *(table.astype(np.float32) for table in tables[1:]))

    def timesteps_at(self, fractions: Float[Array, "b"]) -> Int[Array, "b"]:
        """Timesteps 0 … num_train_timesteps − 1 at fractions of the process in [0, 1] (1 gives the last)."""
        return discrete_timesteps(fractions, self.num_train_timesteps)

    def noise(
        self, x0: Float[Array, "b t h w c"], eps: Float[Array, "b t h w c"], timesteps: Int[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """x_t = sqrt(ᾱ) x0 + sqrt(1 − ᾱ) ε in fp32 (DDPM eq. 4)."""
        signal, noise = (jnp.asarray(table)[timesteps] for table in self.tables()[1:3])
        return per_sample(signal) * x0.astype(jnp.float32) + per_sample(noise) * eps.astype(jnp.float32)

    def loss_at(
        self,
        x0: Float[Array, "b t h w c"],
        eps: Float[Array, "b t h w c"],
        timesteps: Int[Array, "b"],
        predict: Callable,
    ) -> tuple[Float[Array, "b"], dict[str, Float[Array, "b"]]]:
        """Loss of each sample at given noise and timesteps: no randomness, so two models can be compared.

        predict(x_t, timesteps[b] as fp32) -> prediction. The loss is the MSE of the prediction, plus, with
        learn_sigma, the variational term in bits per element, which trains the variance only (IDDPM eq. 16).
        Its weight is 1: Latte's loss type MSE, which at 1000 timesteps equals the rescaled one.
        aux: 'timesteps' as the network saw them, 'mse', and 'vb' with learn_sigma; each fp32 [b].
        """
        seen = timesteps.astype(jnp.float32)
        x_t = self.noise(x0, eps, timesteps)
        output = checked_prediction(predict(x_t, seen), x_t, self.learn_sigma)
        x0, eps = x0.astype(jnp.float32), eps.astype(jnp.float32)
        mean_output = output[..., : x0.shape[-1]]
        error = mean_output - (eps if self.prediction == "epsilon" else x0)
        mse = mean_per_sample(jnp.square(error))
        if not self.learn_sigma:
            return mse, {"timesteps": seen, "mse": mse}
        # The variational term must not pull at the mean: its error is a constant here.
        vb = self._variational_bits(x0, jax.lax.stop_gradient(error), output[..., x0.shape[-1] :], timesteps)
        return mse + vb, {"timesteps": seen, "mse": mse, "vb": vb}

    def training_loss(
        self, key: Key, x0: Float[Array, "b t h w c"], predict: Callable
    ) -> tuple[Float[Array, "b"], dict[str, Float[Array, "b"]]]:
        """`loss_at` at random noise and timesteps, uniform over all of them."""
        fractions, eps = draw(key, x0)
        return self.loss_at(x0, eps, self.timesteps_at(fractions), predict)

    def _variational_bits(self, x0, error, place, timesteps):
        """L_{t−1} of the variational bound (DDPM eq. 5), L_0 at t = 0, in bits per element; one a sample."""
        row = Tables(*(per_sample(jnp.asarray(table)[timesteps]) for table in self.tables()))
        log_variance = range_log_variance(row, place)
        # Both means of the KL share x_t, so their difference is mean_x0·(x0 − x̂0), and with ε-prediction
        # x0 − x̂0 = recipm1·(ε̂ − ε): this way no two large numbers are subtracted late in the chain.
        x0_error = row.recipm1 * error if self.prediction == "epsilon" else -error
        difference = row.mean_x0 * x0_error
        kl = 0.5 * (
            log_variance
            - row.log_min
            - 1.0
            + jnp.exp(row.log_min - log_variance)
            + jnp.square(difference) * jnp.exp(-log_variance)
        )
        # At t = 0 the posterior is a point (mean_x0 = 1, mean_xt = 0), and `difference` is x0 minus the mean.
        nll = discretised_nll(x0, difference, 0.5 * log_variance)
        nats = jnp.where(timesteps == 0, mean_per_sample(nll), mean_per_sample(kl))
        return nats / np.float32(np.log(2.0))


def range_log_variance(row: Tables, place: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """log σ² = f·log β + (1 − f)·log β̃ with f = (v + 1)/2 (IDDPM eq. 15, v in [−1, 1] as upstream has it)."""
    share = (place + 1.0) / 2.0
    return share * row.log_max + (1.0 - share) * row.log_min


def discretised_nll(
    x0: Float[Array, "b t h w c"], centred: Float[Array, "b t h w c"], log_scale: Float[Array, "b t h w c"]
) -> Float[Array, "b t h w c"]:
    """−log of the Gaussian's mass in x0's 8-bit bin (DDPM eq. 13), in nats; `centred` is x0 minus the mean.

    The outermost bins are open. Upstream uses it on VAE latents too, where the bins mean nothing but the
    gradient does. The normal CDF is the tanh approximation that upstream trains with.
    """

    def cdf(x):  # 0.5·(1 + tanh(u)) = sigmoid(2u), which does not cancel for negative x
        return jax.nn.sigmoid(2.0 * np.float32(np.sqrt(2.0 / np.pi)) * (x + 0.044715 * x**3))

    def log(x):
        return jnp.log(jnp.maximum(x, 1e-12))

    inverse_scale = jnp.exp(-log_scale)
    half_bin = 1.0 / 255.0
    # 1 − cdf(x) = cdf(−x), and a bin's mass does not depend on the side of the mean it lies on, so masses are
    # taken in the lower tail, where fp32 resolves them.
    lowest = cdf(inverse_scale * (centred + half_bin))
    highest = cdf(inverse_scale * (half_bin - centred))
    inner = cdf(inverse_scale * (half_bin - jnp.abs(centred))) - cdf(inverse_scale * (-half_bin - jnp.abs(centred)))
    return -jnp.where(x0 < -0.999, log(lowest), jnp.where(x0 > 0.999, log(highest), log(inner)))
