"""The KL autoencoder of Stable Diffusion, frame by frame: 8 x 8 pixels become one latent (diffusers AutoencoderKL)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.codecs.layers import AnyKey, Conv, GroupNorm, Numbered, posterior, repeated
from jaxalign.interop.rules import Rename, Rule
from jaxalign.models import attention as attention_lib
from jaxalign.models.frames import over_frames
from jaxalign.models.layers import Linear

# By how the attention's Linears are called; files older than diffusers 0.17, Stable Diffusion's among them, have the
# second layout.
RULES: dict[str, tuple[Rule, ...]] = {
    "to_q": (),
    "query": tuple(
        Rename(rf"\.attentions\.0\.{ours}\.", f".attentions.0.{theirs}.")
        for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), (r"to_out\.0", "proj_attn"))
    ),
}

PRESETS = {"sd_kl": dict(scale=0.18215)}


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Static settings; diffusers' names in brackets where they differ."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # (block_out_channels)
    latent_channels: int = 4
    blocks: int = 2  # (layers_per_block) ResNet blocks a resolution; the decoder has one more
    groups: int = 32  # (norm_num_groups)
    quant_conv: bool = True  # (use_quant_conv) a 1 x 1 convolution on the moments
    post_quant_conv: bool = True  # (use_post_quant_conv) and one on the latents
    scale: float = 0.18215  # (scaling_factor) latents are (posterior - shift) · scale
    shift: float = 0.0  # (shift_factor)
    # About so many frames, those of all clips together, go through the network in one step, which bounds the memory.
    frames_at_once: int | None = None  # None: 4 frames of 256 x 256 on CPU, 32 elsewhere, more of smaller ones
    attention: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))  # a config file may give a list
        if self.frames_at_once is not None and self.frames_at_once < 1:
            raise ValueError(f"kl: frames_at_once must be at least 1, not {self.frames_at_once}")
        attention_lib.check_implementation(self.attention)

    @property
    def side_factor(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.widths) - 1)


def settings_from(upstream: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `KLConfig` from diffusers' vae/config.json. Raises ValueError for what this module is not."""
    odd = [name for name in ("latents_mean", "latents_std") if upstream.get(name) is not None]
    kinds = {*upstream.get("down_block_types", ()), *upstream.get("up_block_types", ())}
    odd += sorted(kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"})
    odd += [] if upstream.get("mid_block_add_attention", True) else ["mid_block_add_attention"]
    odd += [] if upstream.get("act_fn", "silu") == "silu" else ["act_fn"]
    if odd:
        raise ValueError(f"vae/config.json: {odd[0]} is not what Stable Diffusion's autoencoders have")
    names = dict(
        widths="block_out_channels",
        latent_channels="latent_channels",
        blocks="layers_per_block",
        groups="norm_num_groups",
        quant_conv="use_quant_conv",
        post_quant_conv="use_post_quant_conv",
        scale="scaling_factor",
        shift="shift_factor",
    )
    found = {ours: upstream[theirs] for ours, theirs in names.items() if upstream.get(theirs) is not None}
    return found | ({"widths": tuple(found["widths"])} if "widths" in found else {})


# ---- modules ------------------------------------------------------------------------------------------------------


class ResnetBlock(nnx.Module):
    """Twice GroupNorm, SiLU, 3 x 3 convolution, and the shortcut (ResnetBlock2D)."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups)
        self.conv1 = Conv(inputs, outputs, (3, 3), rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups)
        self.conv2 = Conv(outputs, outputs, (3, 3), rngs=rngs)
        self.widens = inputs != outputs
        if self.widens:
            self.conv_shortcut = Conv(inputs, outputs, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if self.widens else x)


class Attention(nnx.Module):
    """GroupNorm and self-attention with one head over the places of a frame, added to what came in (Attention)."""

    def __init__(self, width: int, config: KLConfig, *, rngs: nnx.Rngs):
        self.implementation = config.attention
        self.group_norm = GroupNorm(width, config.groups)
        self.to_q, self.to_k, self.to_v, out = (Linear(width, width, rngs=rngs) for _ in range(4))
        self.to_out = Numbered([out])

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        n, h, w, c = x.shape
        flat = self.group_norm(x).reshape(n, h * w, c)
        q, k, v = (linear(flat)[:, :, None] for linear in (self.to_q, self.to_k, self.to_v))
        mixed = attention_lib.attention(q, k, v, implementation=self.implementation)[:, :, 0]
        (out,) = self.to_out
        return x + out(mixed).reshape(x.shape)


class Middle(nnx.Module):
    """ResNet block, attention, ResNet block (UNetMidBlock2D)."""

    def __init__(self, width: int, config: KLConfig, *, rngs: nnx.Rngs):
        self.resnets = Numbered([ResnetBlock(width, width, config.groups, rngs=rngs) for _ in range(2)])
        self.attentions = Numbered([Attention(width, config, rngs=rngs)])

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        (before, after), (attention,) = self.resnets, self.attentions
        return after(attention(before(x)))


class Step(nnx.Module):
    """From one resolution to the next: a convolution behind the doubling, or one that halves."""

    def __init__(self, width: int, *, up: bool, rngs: nnx.Rngs):
        self.up = up
        how = dict() if up else dict(stride=2, padding=((0, 1), (0, 1)))
        self.conv = Conv(width, width, (3, 3), **how, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        return self.conv(repeated(x, (2, 2)) if self.up else x)


class Level(nnx.Module):
    """ResNet blocks at one resolution and, except at the last, the step to the next."""

    def __init__(self, inputs: int, width: int, blocks: int, config: KLConfig, *, step: str, rngs: nnx.Rngs):
        sizes = [inputs, *[width] * (blocks - 1)]
        self.resnets = Numbered([ResnetBlock(size, width, config.groups, rngs=rngs) for size in sizes])
        self.step = step
        if step:
            setattr(self, step, Numbered([Step(width, up=step == "upsamplers", rngs=rngs)]))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        for part in (*self.resnets, *(getattr(self, self.step) if self.step else ())):
            x = part(x)
        return x


class Encoder(nnx.Module):
    """Frames -> moments before the quantising convolution."""

    def __init__(self, config: KLConfig, *, rngs: nnx.Rngs):
        first, *_, last = config.widths
        self.conv_in = Conv(3, first, (3, 3), rngs=rngs)
        steps = ["downsamplers"] * (len(config.widths) - 1) + [""]
        pairs = zip((first, *config.widths), config.widths, steps, strict=False)
        self.down_blocks = Numbered([Level(a, b, config.blocks, config, step=step, rngs=rngs) for a, b, step in pairs])
        self.mid_block = Middle(last, config, rngs=rngs)
        self.conv_norm_out = GroupNorm(last, config.groups)
        self.conv_out = Conv(last, 2 * config.latent_channels, (3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n h2 w2 z"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents -> frames."""

    def __init__(self, config: KLConfig, *, rngs: nnx.Rngs):
        widths = config.widths[::-1]
        first, *_, last = widths
        self.conv_in = Conv(config.latent_channels, first, (3, 3), rngs=rngs)
        self.mid_block = Middle(first, config, rngs=rngs)
        steps = ["upsamplers"] * (len(widths) - 1) + [""]
        pairs = zip((first, *widths), widths, steps, strict=False)
        self.up_blocks = Numbered(
            [Level(a, b, config.blocks + 1, config, step=step, rngs=rngs) for a, b, step in pairs]
        )
        self.conv_norm_out = GroupNorm(last, config.groups)
        self.conv_out = Conv(last, 3, (3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "n h w z"]) -> Float[Array, "n h2 w2 3"]:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class KL(nnx.Module):
    """Video [b, t, h, w, 3] in [-1, 1] <-> latents [b, t, h/8, w/8, c]. `KL(config, rngs=nnx.Rngs(seed))`."""

    def __init__(self, config: KLConfig = KLConfig(), *, rngs: nnx.Rngs):
        self.config, channels = config, config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        if config.quant_conv:
            self.quant_conv = Conv(2 * channels, 2 * channels, (1, 1), rngs=rngs)
        if config.post_quant_conv:
            self.post_quant_conv = Conv(channels, channels, (1, 1), rngs=rngs)

    def latent_shape(self, video_shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents of a video of t frames of h x w pixels; ValueError for sizes that do not fit."""
        (t, h, w), side = video_shape, self.config.side_factor
        if h % side or w % side or min(h, w) < side:
            near = "x".join(str(max(1, round(length / side)) * side) for length in (h, w))
            raise ValueError(f"frames of {h}x{w} are no multiples of the codec's {side}; the nearest size is {near}")
        return t, h // side, w // side, self.config.latent_channels

    def moments(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h2 w2 z"]:
        """[mean | log variance] of the latents, not scaled, in the dtype of the weights: what `sample` takes.

        Raises ValueError as `latent_shape`. Source: diffusers AutoencoderKL._encode.
        """
        self.latent_shape(video.shape[1:4])

        def encode(x):
            x = self.encoder(x)
            return self.quant_conv(x) if self.config.quant_conv else x

        return over_frames(encode, video.astype(self._dtype), self._at_once(*video.shape[2:4]))

    def sample(self, moments: Float[Array, "b t h w z"], key: AnyKey | None = None) -> Float[Array, "b t h w c"]:
        """Scaled latents (fp32) drawn from moments; key None: their mean."""
        return (posterior(moments, key) - self.config.shift) * self.config.scale

    def encode(self, video: Float[Array, "b t h w 3"], key: AnyKey | None = None) -> Float[Array, "b t h2 w2 c"]:
        """Scaled latents (fp32) of a video in [-1, 1], drawn from the posterior with `key`; key None: its mean."""
        return self.sample(self.moments(video), key)

    def decode(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 3"]:
        """The video of scaled latents, in the dtype of the weights: about in [-1, 1], not clipped.

        Source: diffusers AutoencoderKL._decode.
        """
        latents = latents.astype(jnp.float32) / self.config.scale + self.config.shift

        def decode(x):
            return self.decoder(self.post_quant_conv(x) if self.config.post_quant_conv else x)

        side = self.config.side_factor
        at_once = self._at_once(*(side * length for length in latents.shape[2:4]))
        return over_frames(decode, latents.astype(self._dtype), at_once)

    @property
    def _dtype(self):
        return self.encoder.conv_in.kernel.dtype

    def _at_once(self, height: int, width: int) -> int:
        pixels = (4 if jax.default_backend() == "cpu" else 32) * 256**2
        return self.config.frames_at_once or max(1, pixels // (height * width))
