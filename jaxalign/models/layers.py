"""Pieces that the diffusion transformers share; attributes bear the names of the public PyTorch modules.

Tokens are [b, t, n, d]: sample, frame, position, channel. All compute in the dtype of the parameters, norms in fp32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

xavier = nnx.initializers.xavier_uniform()
small_normal = nnx.initializers.normal(stddev=0.02)
zeros = nnx.initializers.zeros_init()


# ---- functions ----------------------------------------------------------------------------------------------------


def layer_norm(x: Float[Array, "*batch d"], eps: float = 1e-6) -> Float[Array, "*batch d"]:
    """LayerNorm without affine parameters over the last axis; computed in fp32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def per_sample(vector: Float[Array, "b d"]) -> Float[Array, "b 1 1 d"]:
    """One vector a sample, with axes put in so that it broadcasts over frames and positions."""
    return vector[:, None, None, :]


def timestep_frequencies(
    timesteps: Shaped[Array, "b"], num_channels: int = 256, max_period: float = 10000.0
) -> Float[Array, "b channels"]:
    """[cos | sin] of timestep · max_period^(-2i / num_channels), fp32; timesteps 0..1000, fractions allowed.

    Raises ValueError for an odd number of channels. Source: Latte models/latte.py, TimestepEmbedder.
    """
    if num_channels % 2:
        raise ValueError(f"timestep frequencies come in pairs of cos and sin; {num_channels} channels are odd")
    half = num_channels // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half, dtype=np.float32) / half).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def recompute(function):
    """Keeps a cheap elementwise function's inputs for the gradient instead of all that it makes on its way.

    The linear map at its end is not computed again, for its gradient needs its input only. A step of the demo takes
    0.8 instead of 1.6 GB and 0.81 of the time on one CPU core. It needs no barrier against common subexpressions
    where the blocks are scanned, because forward and backward are separate loops.
    """
    return jax.checkpoint(function, prevent_cse=False)


def adaln_linear(
    x: Float[Array, "b t n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"], linear: nnx.Module
) -> Float[Array, "b t n out"]:
    """linear(LayerNorm(x) · (1 + scale) + shift), shift and scale one a sample (Latte models/latte.py, modulate)."""

    def modulated(x, shift, scale, linear):
        return linear(layer_norm(x) * (1 + per_sample(scale)) + per_sample(shift))

    return recompute(modulated)(x, shift, scale, linear)


def gelu_linear(x: Float[Array, "*batch hidden"], linear: nnx.Module) -> Float[Array, "*batch d"]:
    """linear(GELU(x)) with the tanh form of GELU."""
    return recompute(lambda x, linear: linear(jax.nn.gelu(x, approximate=True)))(x, linear)


# ---- modules ------------------------------------------------------------------------------------------------------


class Linear(nnx.Linear):
    """x @ kernel + bias over the last axis."""

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch out"]:
        kernel, bias = self.kernel[...], self.bias[...]
        # XLA's CPU backend copies both operands of a weight gradient that is summed over more than one axis: flat
        # tokens take 0.79 of the time of a step of the demo. With several devices merging the axes could undo a
        # sharding of the inner ones, so there they are left alone.
        if jax.default_backend() == "cpu" and jax.device_count() == 1:
            return (x.reshape(-1, x.shape[-1]) @ kernel + bias).reshape(*x.shape[:-1], kernel.shape[-1])
        return x @ kernel + bias


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias over the last axis, in fp32; the result has the input's dtype."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        normed = layer_norm(x.astype(jnp.float32), self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class TimestepEmbedder(nnx.Module):
    """Timesteps [b] -> vectors [b, width]: frequencies, Linear, SiLU, Linear (Latte TimestepEmbedder)."""

    def __init__(self, width: int, *, num_frequencies: int = 256, rngs: nnx.Rngs):
        self.num_frequencies = num_frequencies
        self.mlp = nnx.Module()
        # Upstream's Sequential has the SiLU at index 1.
        setattr(self.mlp, "0", Linear(num_frequencies, width, kernel_init=small_normal, rngs=rngs))
        setattr(self.mlp, "2", Linear(width, width, kernel_init=small_normal, rngs=rngs))

    def __call__(self, timesteps: Shaped[Array, "b"]) -> Float[Array, "b d"]:
        first, second = getattr(self.mlp, "0"), getattr(self.mlp, "2")
        frequencies = timestep_frequencies(timesteps, self.num_frequencies)
        return second(jax.nn.silu(first(frequencies.astype(first.kernel.dtype))))


class LabelEmbedder(nnx.Module):
    """Labels [b] -> vectors [b, width]; the last row is the null label of guidance (Latte LabelEmbedder)."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.embedding_table = nnx.Embed(num_classes + 1, width, embedding_init=small_normal, rngs=rngs)

    def __call__(self, labels: Int[Array, "b"]) -> Float[Array, "b d"]:
        # nnx.Embed would answer in the dtype that the table was made with. A label out of range gives NaN.
        return jnp.take(self.embedding_table.embedding[...], labels, axis=0)


class PatchEmbed(nnx.Module):
    """Patches of every frame -> tokens: [b, t, h, w, c] -> [b, t, h/p * w/p, width] (timm PatchEmbed)."""

    def __init__(self, patch_size: int, in_channels: int, width: int, *, rngs: nnx.Rngs):
        def flat_xavier(key, shape, dtype, *_):  # upstream draws this convolution's weights as those of a Linear
            return xavier(key, (np.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)

        size = (patch_size, patch_size)
        self.proj = nnx.Conv(in_channels, width, size, strides=size, kernel_init=flat_xavier, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t n d"]:
        # A convolution whose stride is its size is one matmul, which every backend does well.
        kernel = self.proj.kernel[...]
        p, _, c, width = kernel.shape
        b, t, h, w, _ = x.shape
        patches = x.reshape(b, t, h // p, p, w // p, p, c).transpose(0, 1, 2, 4, 3, 5, 6)
        patches = patches.reshape(b, t, (h // p) * (w // p), p * p * c).astype(kernel.dtype)
        return patches @ kernel.reshape(p * p * c, width) + self.proj.bias[...]


class Mlp(nnx.Module):
    """adaLN, Linear, GELU, Linear; normalisation and shift are inside so that they can be recomputed (timm Mlp)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, hidden, kernel_init=xavier, rngs=rngs)
        self.fc2 = Linear(hidden, width, kernel_init=xavier, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
    ) -> Float[Array, "b t n d"]:
        return gelu_linear(adaln_linear(x, shift, scale, self.fc1), self.fc2)


class Modulation(nnx.Module):
    """SiLU and a zero-initialised Linear: condition [b, width] -> `num_vectors` shifts, scales, gates [b, width]."""

    def __init__(self, width: int, num_vectors: int, *, rngs: nnx.Rngs):
        self.num_vectors = num_vectors
        setattr(self, "1", Linear(width, num_vectors * width, kernel_init=zeros, rngs=rngs))

    def __call__(self, condition: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        return jnp.split(getattr(self, "1")(jax.nn.silu(condition)), self.num_vectors, axis=-1)
