"""The frozen pre-norm ViT that DINOv2, VideoMAE and V-JEPA 2 share: blocks, run up to the layers that are asked for.

Attributes bear the names of facebookresearch/dinov2 (norm1, attn.qkv, attn.proj, ls1.gamma, norm2, mlp.fc1, mlp.fc2,
ls2.gamma; mlp.w12, mlp.w3 for SwiGLU) and, with biases on q and v alone, of BEiT's descendants (attn.q_bias,
attn.v_bias). A teacher makes `self.blocks = vit.stacked(config, key)`, whose leaves have the blocks on their leading
axis (interop rule `Stack(r"blocks")`), and calls `vit.run(self.blocks, tokens, layers)`.
"""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxalign.models import attention as attention_lib
from jaxalign.models import layers as shared

# Rotates queries and keys [b, n, heads, d] by their positions, which it knows.
Rotary = Callable[[Any, Any], tuple[Any, Any]]

trunc_normal = nnx.initializers.truncated_normal(stddev=0.02)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Static settings of the trunk. Raises ValueError for settings that do not fit together."""

    width: int
    depth: int
    num_heads: int
    hidden: int  # channels inside the MLP; for SwiGLU those that are left after the gate
    mlp: str = "gelu"  # 'gelu' (exact, with erf) or 'swiglu'
    qkv_bias: str = "full"  # 'full'; 'qv': none for k, upstream keeps q_bias and v_bias; 'none'
    layer_scale: bool = False
    eps: float = 1e-6  # of the LayerNorms
    remat: bool = False  # keep only every block's input for a gradient with respect to the video
    attention: str = "auto"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        for name, known in (("mlp", ("gelu", "swiglu")), ("qkv_bias", ("full", "qv", "none"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; write one of {', '.join(known)}")
        attention_lib.check_implementation(self.attention)


# ---- modules ------------------------------------------------------------------------------------------------------


class LayerScale(nnx.Module):
    """One factor a channel; `gamma` as in facebookresearch/dinov2 layers/layer_scale.py."""

    def __init__(self, width: int):
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return x * self.gamma[...]


class Attention(nnx.Module):
    """Self-attention over all tokens."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.num_heads, self.implementation = config.num_heads, config.attention
        self.qkv = nnx.Linear(width, 3 * width, use_bias=config.qkv_bias == "full", kernel_init=trunc_normal, rngs=rngs)
        if config.qkv_bias == "qv":
            self.q_bias = nnx.Param(jnp.zeros(width))
            self.v_bias = nnx.Param(jnp.zeros(width))
        self.qkv_bias = config.qkv_bias
        self.proj = shared.Linear(width, width, kernel_init=trunc_normal, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], rotary: Rotary | None = None) -> Float[Array, "b n d"]:
        b, n, width = x.shape
        qkv = x @ self.qkv.kernel[...]
        if self.qkv_bias == "full":
            qkv = qkv + self.qkv.bias[...]
        elif self.qkv_bias == "qv":
            q_bias, v_bias = self.q_bias[...], self.v_bias[...]
            qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
        qkv = qkv.reshape(b, n, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if rotary is not None:
            q, k = rotary(q, k)
        mixed = attention_lib.attention(q, k, v, implementation=self.implementation)
        return self.proj(mixed.reshape(b, n, width))


class Mlp(nnx.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.fc1 = shared.Linear(config.width, config.hidden, kernel_init=trunc_normal, rngs=rngs)
        self.fc2 = shared.Linear(config.hidden, config.width, kernel_init=trunc_normal, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(_gelu(self.fc1(x)))


class SwiGLU(nnx.Module):
    """w3(silu(x1) · x2) with [x1, x2] = w12(x) (facebookresearch/dinov2 layers/swiglu_ffn.py)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.w12 = shared.Linear(config.width, 2 * config.hidden, kernel_init=trunc_normal, rngs=rngs)
        self.w3 = shared.Linear(config.hidden, config.width, kernel_init=trunc_normal, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(gate) * value)


class Block(nnx.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.norm1 = shared.LayerNorm(config.width, config.eps)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = shared.LayerNorm(config.width, config.eps)
        self.mlp = (SwiGLU if config.mlp == "swiglu" else Mlp)(config, rngs=rngs)
        if config.layer_scale:
            self.ls1 = LayerScale(config.width)
            self.ls2 = LayerScale(config.width)

    def __call__(self, x: Float[Array, "b n d"], rotary: Rotary | None = None) -> Float[Array, "b n d"]:
        scaled = self.config.layer_scale
        change = self.attn(self.norm1(x), rotary)
        x = x + (self.ls1(change) if scaled else change)
        change = self.mlp(self.norm2(x))
        return x + (self.ls2(change) if scaled else change)


class TubeletEmbed(nnx.Module):
    """Tubelets -> tokens: [b, t, h, w, c] -> [b, t/tubelet, h/p, w/p, width]; upstream's `proj` is a Conv3d."""

    def __init__(self, tubelet: int, patch_size: int, width: int, *, channels: int = 3, rngs: nnx.Rngs):
        size = (tubelet, patch_size, patch_size)
        self.proj = nnx.Conv(channels, width, size, strides=size, kernel_init=trunc_normal, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        # A convolution whose stride is its size is one matmul, which every backend does well.
        kernel = self.proj.kernel[...]
        u, p, q, c, width = kernel.shape
        b, t, h, w, _ = x.shape
        x = x.reshape(b, t // u, u, h // p, p, w // q, q, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        x = x.reshape(b, t // u, h // p, w // q, u * p * q * c).astype(kernel.dtype)
        return x @ kernel.reshape(-1, width) + self.proj.bias[...]


# ---- functions ----------------------------------------------------------------------------------------------------


def stacked(config: ViTConfig, key: Array) -> Block:
    """All blocks of the trunk as one Block whose leaves have them on a leading axis."""
    return jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(jax.random.split(key, config.depth))


def run(
    blocks: Block, x: Float[Array, "b n d"], layers: Sequence[int], *, rotary: Rotary | None = None
) -> list[Float[Array, "b n d"]]:
    """Outputs of the blocks with these 0-based indices, in their order; blocks behind the last of them do not run.

    `blocks` as `stacked` makes them; `layers` as `checked_layers` returns them, repetitions allowed; `rotary(q, k)`
    turns queries and keys [b, n, heads, d] before every attention.
    """

    def step(x, index):
        # One block is looked up at a time: slices of the stacks would be copies of the weights.
        block = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), blocks)
        return block(x, rotary), None

    if blocks.config.remat:
        step = jax.checkpoint(step, prevent_cse=False)
    found, start = {}, 0
    for layer in sorted(set(layers)):
        x, _ = lax.scan(step, x, jnp.arange(start, layer + 1))
        found[layer], start = x, layer + 1
    return [found[layer] for layer in layers]


def checked_layers(layers: Any, depth: int) -> tuple[int, ...]:
    """One layer or several as 0-based indices: None is the last block, negative ones count from the end.

    Raises ValueError for one that is no block of a trunk of `depth`, or for none at all.
    """
    if layers is None:
        return (depth - 1,)
    wanted = layers if isinstance(layers, Sequence) else (layers,)
    for layer in wanted:
        whole = isinstance(layer, numbers.Integral) and not isinstance(layer, bool)
        if not whole or not -depth <= layer < depth:
            raise ValueError(f"layers: {layer!r} is no block here; write whole numbers from 0 to {depth - 1}")
    if not wanted:
        raise ValueError(f"layers is empty; write None for the last block or whole numbers from 0 to {depth - 1}")
    return tuple(int(layer) % depth for layer in wanted)


def _gelu(x: Array) -> Array:
    # In fp32: erf in half precision loses what distinguishes exact GELU. erfc, which jax.nn.gelu takes, costs more.
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + lax.erf(x32 * 0.5**0.5))).astype(x.dtype)
