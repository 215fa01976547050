"""V-DiT: Latte (Vchitect/Latte, models/latte.py), a video diffusion transformer of spatial and temporal blocks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from jaxalign.interop.rules import Fixed, Rule, Stack
from jaxalign.models import attention as attention_lib
from jaxalign.models import layers, positions
from jaxalign.models import taps as taps_lib
from jaxalign.models.placement import keep_rows

PRESETS = {
    "S": dict(width=384, depth=12, num_heads=6),
    "B": dict(width=768, depth=12, num_heads=12),
    "L": dict(width=1024, depth=24, num_heads=16),
    "XL": dict(width=1152, depth=28, num_heads=16),
    "demo": dict(width=128, depth=8, num_heads=4),
}

# Path regex -> sharding; first match wins. The leading axis of `blocks` (the pairs) is scanned and stays whole.
# Over `tensor`: columns of qkv, fc1 and adaLN, rows of proj and fc2 (Megatron); `fsdp` takes the other axis.
SHARDING_RULES = [
    (
        r"blocks\.[01]\.(attn\.qkv|mlp\.fc1|adaLN_modulation\.1)\.kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (r"blocks\.[01]\.(attn\.proj|mlp\.fc2)\.kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks\.[01]\.(attn\.qkv|mlp\.fc1|adaLN_modulation\.1)\.bias", PartitionSpec(None, "tensor")),
    (r"blocks\.[01]\.(attn\.proj|mlp\.fc2)\.bias", PartitionSpec(None, None)),
    (r"x_embedder\.proj\.kernel", PartitionSpec(None, None, None, "fsdp")),
    (r"t_embedder\.mlp\.0\.kernel", PartitionSpec("fsdp", "tensor")),
    (r"t_embedder\.mlp\.2\.kernel", PartitionSpec("tensor", "fsdp")),
    (r"y_embedder\.embedding_table\.embedding", PartitionSpec(None, "fsdp")),
    (r"final_layer\.adaLN_modulation\.1\.kernel", PartitionSpec("fsdp", "tensor")),
    (r"final_layer\.linear\.kernel", PartitionSpec("fsdp", None)),
    (r".*", PartitionSpec()),  # the other biases
]


@dataclasses.dataclass(frozen=True)
class VDiTConfig:
    """Static settings of a V-DiT; `input_size` in latent pixels. Raises ValueError for sizes that do not fit."""

    input_size: tuple[int, int]  # height, width
    num_frames: int
    patch_size: int
    in_channels: int
    width: int
    depth: int  # spatial and temporal blocks together
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 0  # 0: unconditional; otherwise label num_classes is the null label
    learn_sigma: bool = False  # predict twice the channels: the noise and what interpolates its variance
    remat: bool = False  # keep only each pair's input for the gradient and compute the rest again
    attention: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "input_size", tuple(self.input_size))  # a config file may give a list
        h, w = self.input_size
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"model.depth counts spatial and temporal blocks and must be even, got {self.depth}")
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"model.width must be divisible by num_heads {self.num_heads} and by 4, got {self.width}")
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(
                f"model.patch_size {self.patch_size} does not divide latents of {h}x{w}; choose another size or patch"
            )
        attention_lib.check_implementation(self.attention)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (time, height, width)."""
        return (self.num_frames, self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size)

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels * (2 if self.learn_sigma else 1)


def weight_rules(config: VDiTConfig) -> list[Rule]:
    """What the engine in interop must know beyond attribute names to read and write Latte's state dict.

    Upstream keeps both position tables in its state dict; here they are computed, so they are checked on import and
    written on export.
    """
    _, h, w = config.grid
    return [
        Stack(r"blocks", children=2),
        Fixed("pos_embed", lambda: positions.sincos_2d(config.width, h, w)[None]),
        Fixed("temp_embed", lambda: _frame_positions(config)[None]),
    ]


def _frame_positions(config: VDiTConfig) -> Float[np.ndarray, "t d"]:
    return positions.sincos_1d(config.width, np.arange(config.num_frames))


class Attention(nnx.Module):
    """adaLN and self-attention over one axis of tokens [b, t, n, d]: 'space' mixes n, 'time' mixes t."""

    def __init__(self, config: VDiTConfig, axis: str, *, rngs: nnx.Rngs):
        self.axis, self.num_heads, self.implementation = axis, config.num_heads, config.attention
        self.qkv = layers.Linear(config.width, 3 * config.width, kernel_init=layers.xavier, rngs=rngs)
        self.proj = layers.Linear(config.width, config.width, kernel_init=layers.xavier, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
    ) -> Float[Array, "b t n d"]:
        qkv = layers.adaln_linear(x, shift, scale, self.qkv)
        qkv = qkv.swapaxes(1, 2) if self.axis == "time" else qkv
        b, rows, mixed, channels = qkv.shape
        qkv = qkv.reshape(b * rows, mixed, 3, self.num_heads, channels // (3 * self.num_heads))
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        out = attention_lib.attention(q, k, v, implementation=self.implementation)
        out = out.reshape(b, rows, mixed, channels // 3)
        return self.proj(out.swapaxes(1, 2) if self.axis == "time" else out)


class Block(nnx.Module):
    """Transformer block with adaLN-Zero (Latte TransformerBlock)."""

    def __init__(self, config: VDiTConfig, axis: str, *, rngs: nnx.Rngs):
        self.attn = Attention(config, axis, rngs=rngs)
        self.mlp = layers.Mlp(config.width, int(config.width * config.mlp_ratio), rngs=rngs)
        self.adaLN_modulation = layers.Modulation(config.width, 6, rngs=rngs)

    def __call__(self, x: Float[Array, "b t n d"], c: Float[Array, "b d"]) -> Float[Array, "b t n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)
        x = x + layers.per_sample(gate1) * self.attn(x, shift1, scale1)
        return x + layers.per_sample(gate2) * self.mlp(x, shift2, scale2)


class Pair(nnx.Module):
    """A spatial block '0' and a temporal block '1': the unit that is stacked and scanned."""

    def __init__(self, config: VDiTConfig, *, rngs: nnx.Rngs):
        setattr(self, "0", Block(config, "space", rngs=rngs))
        setattr(self, "1", Block(config, "time", rngs=rngs))


class FinalLayer(nnx.Module):
    """adaLN and the zero-initialised Linear from a token to its patch (Latte FinalLayer)."""

    def __init__(self, config: VDiTConfig, *, rngs: nnx.Rngs):
        size = config.patch_size**2 * config.out_channels
        self.linear = layers.Linear(config.width, size, kernel_init=layers.zeros, rngs=rngs)
        self.adaLN_modulation = layers.Modulation(config.width, 2, rngs=rngs)

    def __call__(self, x: Float[Array, "b t n d"], c: Float[Array, "b d"]) -> Float[Array, "b t n out"]:
        shift, scale = self.adaLN_modulation(c)
        return layers.adaln_linear(x, shift, scale, self.linear)


class VDiT(nnx.Module):
    """Latte with its blocks stacked by pairs and scanned. `VDiT(config, rngs=nnx.Rngs(seed))`."""

    def __init__(self, config: VDiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.x_embedder = layers.PatchEmbed(config.patch_size, config.in_channels, config.width, rngs=rngs)
        self.t_embedder = layers.TimestepEmbedder(config.width, rngs=rngs)
        if config.num_classes:
            self.y_embedder = layers.LabelEmbedder(config.num_classes, config.width, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.depth // 2)
        self.blocks = jax.vmap(lambda key: Pair(config, rngs=nnx.Rngs(key)))(keys)
        self.final_layer = FinalLayer(config, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        timesteps: Shaped[Array, "b"],
        condition: Int[Array, "b"] | None = None,
        *,
        taps: Sequence[Any] = (),
    ) -> tuple[Float[Array, "b t h w o"], dict[int, Float[Array, "b t i j d"]]]:
        """Prediction (fp32) for noisy latents at timesteps 0..1000 (fractions allowed), and the tapped tokens.

        taps: 0-based block indices in any order: 2i is the output of pair i's spatial block, 2i+1 of its temporal one;
        the dictionary has one entry for each. condition: labels, num_classes being the null label.
        Raises ValueError for a tap that is no block, latents that are not the config's shape, a missing or needless
        condition. Source: Latte models/latte.py, Latte.forward.
        """
        config = self.config
        taps = taps_lib.checked(taps, config.depth)
        _check_inputs(config, latents.shape, condition)
        b, (t, h, w), pairs = latents.shape[0], config.grid, config.depth // 2

        x = self.x_embedder(latents)
        x = x + positions.sincos_2d(config.width, h, w).astype(x.dtype)
        c = self.t_embedder(timesteps)
        if config.num_classes:
            c = c + self.y_embedder(condition)
        frame_positions = _frame_positions(config)[:, None].astype(x.dtype)

        def run_block(block, x):
            # At both ends, for the scan's gradient runs through it the other way.
            return keep_rows(block(keep_rows(x), c))

        def run_pair(carry, inputs):
            pair, is_first = inputs
            middle = run_block(getattr(pair, "0"), carry[0])
            # Latte adds the time positions once, before the first temporal block.
            x = run_block(getattr(pair, "1"), middle + is_first * frame_positions)
            return (x, middle), None

        if config.remat:
            run_pair = jax.checkpoint(run_pair, prevent_cse=False)
        # The scan is cut behind every tapped pair. The spatial block's output travels in the carry, so one cut gives
        # both taps of its pair, and the tokens of no other layer are kept.
        cuts = sorted({tap // 2 + 1 for tap in taps} | {pairs})
        is_first = (jnp.arange(pairs) == 0).astype(x.dtype)
        carry, tokens = (x, x), {}
        for segment, cut in zip(taps_lib.split((self.blocks, is_first), cuts), cuts, strict=True):
            carry, _ = jax.lax.scan(run_pair, carry, segment)
            tokens |= {2 * cut - 2: carry[1], 2 * cut - 1: carry[0]}

        out = self.final_layer(carry[0], c).astype(jnp.float32)
        tapped = {tap: tokens[tap].reshape(b, t, h, w, config.width) for tap in taps}
        return unpatchify(out.reshape(b, t, h, w, -1), config.patch_size), tapped


def unpatchify(x: Float[Array, "b t i j pixels"], patch_size: int) -> Float[Array, "b t h w c"]:
    """Tokens that hold (row, column, channel) of their patch -> video (Latte.unpatchify)."""
    b, t, i, j, pixels = x.shape
    p, c = patch_size, pixels // patch_size**2
    return x.reshape(b, t, i, j, p, p, c).transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t, i * p, j * p, c)


def _check_inputs(config: VDiTConfig, shape: tuple[int, ...], condition: Any) -> None:
    expected = (config.num_frames, *config.input_size, config.in_channels)
    if shape[1:] != expected:
        raise ValueError(f"latents have [t, h, w, c] = {shape[1:]}, but the model's config says {expected}")
    if config.num_classes and condition is None:
        null = config.num_classes
        raise ValueError(f"this model is class-conditional: pass labels [b], {null} meaning no label")
    if not config.num_classes and condition is not None:
        raise ValueError("this model is unconditional (num_classes=0): pass condition=None")
