"""The identity codec: latents are pixels. For the demo, for tests, and for models in pixel space."""

from flax import nnx
from jaxtyping import Array, Float, Key, UInt32


class Pixels(nnx.Module):
    """A video is its own latent; no parameters."""

    def encode(
        self, video: Float[Array, "b t h w c"], key: Key[Array, ""] | UInt32[Array, "2"] | None = None
    ) -> Float[Array, "b t h w c"]:
        """Latents [b, t, h, w, c] of a video in [-1, 1]: the video itself. Nothing is drawn, `key` is not used."""
        return video

    def decode(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """The video in [-1, 1] of latents [b, t, h, w, c]: the latents themselves."""
        return latents

    def latent_shape(self, video_shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents of an RGB video of t frames of h x w pixels."""
        return (*video_shape, 3)
