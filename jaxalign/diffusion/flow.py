"""Rectified flow: a straight path between data and noise, and its constant velocity as the target.

Sources: Liu et al. 2022; Align4Gen's flow objective. The velocity points from noise to data,
v = x0 − ε = −dx/dt: the opposite of Wan's and of diffusers' flow-matching schedulers, which predict ε − x0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.diffusion.process import Key, checked_prediction, draw, mean_per_sample, per_sample


@dataclass(frozen=True)
class RectifiedFlow:
    """Settings of a rectified flow; hashable, so it can be a static argument of jit.

    Its timesteps are times in [0, 1], 0 = data, 1 = noise; the network is told time · timestep_scale, which
    puts it on the scale that timestep embeddings are made for. Raises ValueError for a scale that is not
    positive.
    """

    timestep_scale: float | int = 1000.0
    learn_sigma: ClassVar[bool] = False  # a velocity has no variance to learn; the student reads it from here

    def __post_init__(self):
        if not self.timestep_scale > 0:
            raise ValueError(f"RectifiedFlow: timestep_scale={self.timestep_scale}; write a positive number (1000.0)")

    def timesteps_at(self, fractions: Float[Array, "b"]) -> Float[Array, "b"]:
        """Times at fractions of the process in [0, 1]: the fractions themselves, in fp32."""
        return fractions.astype(jnp.float32)

    def noise(
        self, x0: Float[Array, "b t h w c"], eps: Float[Array, "b t h w c"], timesteps: Float[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """x_t = (1 − t) x0 + t ε in fp32."""
        time = per_sample(timesteps.astype(jnp.float32))
        return (1.0 - time) * x0.astype(jnp.float32) + time * eps.astype(jnp.float32)

    def loss_at(
        self,
        x0: Float[Array, "b t h w c"],
        eps: Float[Array, "b t h w c"],
        timesteps: Float[Array, "b"],
        predict: Callable,
    ) -> tuple[Float[Array, "b"], dict[str, Float[Array, "b"]]]:
        """MSE of the velocity of each sample at given noise and times in [0, 1]: no randomness.

        predict(x_t, time · timestep_scale [b]) -> velocity.
        aux: 'timesteps' as the network saw them and 'mse' (the loss itself); each fp32 [b].
        """
        seen = timesteps.astype(jnp.float32) * self.timestep_scale
        x_t = self.noise(x0, eps, timesteps)
        velocity = checked_prediction(predict(x_t, seen), x_t, self.learn_sigma)
        target = x0.astype(jnp.float32) - eps.astype(jnp.float32)
        mse = mean_per_sample(jnp.square(velocity - target))
        return mse, {"timesteps": seen, "mse": mse}

    def training_loss(
        self, key: Key, x0: Float[Array, "b t h w c"], predict: Callable
    ) -> tuple[Float[Array, "b"], dict[str, Float[Array, "b"]]]:
        """`loss_at` at random noise and times, uniform in [0, 1)."""
        fractions, eps = draw(key, x0)
        return self.loss_at(x0, eps, self.timesteps_at(fractions), predict)
