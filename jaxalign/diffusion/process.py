"""What the noise processes share: random draws, evenly spread times and the shape of a prediction."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

Key = PRNGKeyArray  # jax.random.key and the older jax.random.PRNGKey


def draw(key: Key, x0: Float[Array, "b t h w c"]) -> tuple[Float[Array, "b"], Float[Array, "b t h w c"]]:
    """Draw one time per sample, uniform in [0, 1), and standard normal noise of x0's shape, both fp32.

    The time is a fraction of the process (0 = data, 1 = noise); `process.timesteps_at` makes it a timestep.
    """
    time_key, noise_key = jax.random.split(key)
    fractions = jax.random.uniform(time_key, x0.shape[:1], jnp.float32)
    return fractions, jax.random.normal(noise_key, x0.shape, jnp.float32)


def fixed_times(count: int) -> Float[Array, "count"]:
    """Return `count` fractions spread evenly over (0, 1), the middles of equal intervals, smallest first.

    With `process.timesteps_at` and a fixed noise they make a held-out loss that has no randomness of its own.
    Raises ValueError for a count below one.
    """
    if count < 1:
        raise ValueError(f"fixed_times: count={count} gives no time to evaluate at; write 1 or more")
    return (jnp.arange(count, dtype=jnp.float32) + 0.5) / count


def discrete_timesteps(fractions: Float[Array, "b"], count: int) -> Int[Array, "b"]:
    """Timesteps 0 … count − 1 at fractions of a process in [0, 1] (1 gives the last)."""
    steps = jnp.floor(fractions.astype(jnp.float32) * count).astype(jnp.int32)
    return jnp.clip(steps, 0, count - 1)


def per_sample(values: Shaped[Array, "b"]) -> Shaped[Array, "b 1 1 1 1"]:
    """Give one value a sample the rank of a video, so that it broadcasts over it."""
    return values[:, None, None, None, None]


def mean_per_sample(values: Float[Array, "b t h w c"]) -> Float[Array, "b"]:
    """Mean over everything but the batch."""
    return jnp.mean(values, axis=(1, 2, 3, 4))


def checked_prediction(
    prediction: Float[Array, "b t h w k"], x_t: Float[Array, "b t h w c"], learn_sigma: bool
) -> Float[Array, "b t h w k"]:
    """Return the prediction in fp32 after checking its channels: c, or 2c where the variance is learned too.

    Raises ValueError when student and process disagree about `learn_sigma`: broadcasting would hide it.
    """
    expected = (*x_t.shape[:-1], x_t.shape[-1] * (2 if learn_sigma else 1))
    if prediction.shape != expected:
        raise ValueError(
            f"the network predicted {prediction.shape} for latents {x_t.shape}, where this process "
            f"(learn_sigma={learn_sigma}) needs {expected}; give model and process the same learn_sigma "
            "(always False for flow)"
        )
    return prediction.astype(jnp.float32)
