"""What frozen networks do with frames around the network: normalise pixels, bound the memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1


def normalised(
    video: Float[Array, "*batch 3"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Array, "*batch 3"]:
    """RGB in [-1, 1] -> [0, 1] -> (x - mean) / std, in fp32 (torchvision's Normalize)."""
    return (video.astype(jnp.float32) * 0.5 + (0.5 - jnp.array(mean))) / jnp.array(std)


def over_frames(
    function: Callable[[Any], Any], video: Float[Array, "b t h w c"], at_once: int
) -> Float[Array, "b t *out"]:
    """function([n, h, w, c]) -> [n, ...] on all frames, about `at_once` of all clips together in one step.

    The loop runs over time and takes the same frames of all clips in each step: the batch axis may be sharded, and
    cutting along it would move clips between devices.
    """
    b, t = video.shape[:2]
    steps = -(-t // max(1, min(t, at_once // b)))
    frames = -(-t // steps)
    if steps * frames > t:  # the last step is filled up with repeats of the last frame
        video = jnp.take(video, jnp.minimum(jnp.arange(steps * frames), t - 1), axis=1)
    video = jnp.moveaxis(video.reshape(b, steps, frames, *video.shape[2:]), 1, 0)

    def step(clips):
        out = function(clips.reshape(b * frames, *clips.shape[2:]))
        return out.reshape(b, frames, *out.shape[1:])

    out = step(video[0])[None] if steps == 1 else lax.map(step, video)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(b, steps * frames, *out.shape[3:])[:, :t]


def default_at_once(tokens: int) -> int:
    """How many frames of so many tokens go through a ViT in one step where nobody says it: enough to keep it busy."""
    return max(1, (2048 if jax.default_backend() == "cpu" else 32768) // tokens)
