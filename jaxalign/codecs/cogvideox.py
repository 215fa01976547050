"""CogVideoX's causal 3-D VAE: 4 x 8 x 8 pixels become one latent of 16 channels (diffusers AutoencoderKLCogVideoX).

A convolution in time sees its own frame and the two before it, so a long video goes through in chunks: 8 frames (2
latents) at a time, the first chunk with the remainder, and each convolution hands its last two input frames on. The
chunks are part of what the network computes, not only of how: GroupNorm takes its statistics over one chunk. With
`tiling` frames are cut into overlapping tiles too: that bounds the memory and changes the result a little.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxalign.codecs.layers import AnyKey, Conv, GroupNorm, Numbered, posterior, repeated, tiled
from jaxalign.interop.rules import Rule

RULES: tuple[Rule, ...] = ()  # attributes bear upstream's names

PRESETS = {"cogvideox_2b": dict(scale=1.15258426), "cogvideox_5b": dict(scale=0.7)}

FRAMES_AT_ONCE, LATENTS_AT_ONCE = 8, 2  # what the network was trained with

# The frames that a causal convolution hands on, nested as the modules are; None for the first chunk.
Tails = Any


@dataclasses.dataclass(frozen=True)
class CogVideoXVAEConfig:
    """Static settings; upstream's names in brackets where they differ. Raises ValueError for what does not fit."""

    widths: tuple[int, ...] = (128, 256, 256, 512)  # (block_out_channels)
    latent_channels: int = 16
    blocks: int = 3  # (layers_per_block) ResNet blocks a resolution; the decoder has one more
    groups: int = 32  # (norm_num_groups)
    eps: float = 1e-6  # (norm_eps) of the GroupNorms that are not spatial
    time_factor: int = 4  # (temporal_compression_ratio)
    scale: float = 1.15258426  # (scaling_factor) latents are the posterior times this: 0.7 for 5B

    tiling: bool = False  # frames larger than one tile go through tile by tile
    tile: tuple[int, int] = (240, 360)  # rows, columns of pixels: half of (sample_height, sample_width)
    overlap: tuple[float, float] = (1 / 6, 1 / 5)  # of a tile
    remat: bool = False  # for a gradient keep only every ResNet block's input

    def __post_init__(self):
        for name in ("widths", "tile", "overlap"):  # a config file may give a list
            object.__setattr__(self, name, tuple(getattr(self, name)))
        side = self.side_factor
        if self.time_factor not in (1, 2, 4, 8) or self.time_factor > side:
            raise ValueError(f"time_factor {self.time_factor} must be a power of two of at most {side}")
        stride = self._stride(self.tile)
        if self.tiling and any(length % side for length in (*self.tile, *stride)):
            raise ValueError(f"tile {self.tile} and its steps {stride} must be multiples of {side}; (240, 360) is fine")

    @property
    def side_factor(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.widths) - 1)

    def _stride(self, tile: tuple[int, int]) -> tuple[int, ...]:
        return tuple(int(length * (1 - overlap)) for length, overlap in zip(tile, self.overlap, strict=True))

    def tiles(self, *, of_latents: bool) -> dict[str, Any]:
        """Arguments of `layers.tiled`: of the decoder, which is given latents, or of the encoder."""
        small = tuple(length // self.side_factor for length in self.tile)
        given, made = (small, self.tile) if of_latents else (self.tile, small)
        blend = [int(length * overlap) for length, overlap in zip(made, self.overlap, strict=True)]
        keep = [length - extent for length, extent in zip(made, blend, strict=True)]
        return dict(tile=given, stride=self._stride(given), blend=tuple(blend), keep=tuple(keep))


def settings_from(upstream: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `CogVideoXVAEConfig` from diffusers' vae/config.json.

    Raises ValueError for an autoencoder that this module is not.
    """
    odd = [name for name in ("use_quant_conv", "use_post_quant_conv") if upstream.get(name)]
    odd += [name for name in ("shift_factor", "latents_mean", "latents_std") if upstream.get(name) is not None]
    if odd or upstream.get("act_fn", "silu") != "silu":
        raise ValueError(f"vae/config.json: {(odd or ['act_fn'])[0]} is not what CogVideoX's published VAEs have")
    names = dict(
        widths="block_out_channels",
        latent_channels="latent_channels",
        blocks="layers_per_block",
        groups="norm_num_groups",
        eps="norm_eps",
        time_factor="temporal_compression_ratio",
        scale="scaling_factor",
    )
    found = {ours: upstream[theirs] for ours, theirs in names.items() if theirs in upstream}
    kinds = dict(widths=tuple, time_factor=int)  # JSON has lists, and upstream's default is a float
    found |= {name: kind(found[name]) for name, kind in kinds.items() if name in found}
    if "sample_height" in upstream and "sample_width" in upstream:
        found["tile"] = (upstream["sample_height"] // 2, upstream["sample_width"] // 2)
    return found


# ---- modules ------------------------------------------------------------------------------------------------------


class CausalConv(nnx.Module):
    """3 x 3 x 3 convolution over the frames up to the present one (CogVideoXCausalConv3d)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, (3, 3, 3), padding=((0, 0), (1, 1), (1, 1)), rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t h w c"], tail: Float[Array, "b 2 h w c"] | None
    ) -> tuple[Float[Array, "b t h w d"], Float[Array, "b 2 h w c"]]:
        # Before the first frame there is the first frame.
        before = jnp.concatenate([x[:, :1], x[:, :1]], axis=1) if tail is None else tail
        x = jnp.concatenate([before, x], axis=1)
        return self.conv(x), x[:, -2:]


class Pointwise(nnx.Module):
    """1 x 1 x 1 convolution under upstream's name for a causal one, which this kernel has no need to be."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, (1, 1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        return self.conv(x)


class SpatialNorm(nnx.Module):
    """GroupNorm whose scale and shift are maps of the latents, brought to x's size (CogVideoXSpatialNorm3D)."""

    def __init__(self, width: int, latent_channels: int, groups: int, *, rngs: nnx.Rngs):
        self.norm_layer = GroupNorm(width, groups)
        self.conv_y = Pointwise(latent_channels, width, rngs=rngs)
        self.conv_b = Pointwise(latent_channels, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t h w c"], latents: Float[Array, "b t2 h2 w2 z"]
    ) -> Float[Array, "b t h w c"]:
        # Upstream enlarges the latents first; a pointwise map commutes with that and costs 1/256 before it.
        scale, shift = (_enlarged(conv(latents), x.shape[1:4]) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


def _enlarged(x: Float[Array, "b t h w c"], shape: tuple[int, int, int]) -> Float[Array, "b t2 h2 w2 c"]:
    """Nearest-neighbour enlargement; of an odd number of frames the first stays one frame."""
    t, (rows, columns) = shape[0], (shape[1] // x.shape[2], shape[2] // x.shape[3])
    if t > 1 and t % 2:
        first = repeated(x[:, :1], (1, rows, columns))
        return jnp.concatenate([first, repeated(x[:, 1:], ((t - 1) // (x.shape[1] - 1), rows, columns))], axis=1)
    return repeated(x, (t // x.shape[1], rows, columns))


class ResnetBlock(nnx.Module):
    """Twice norm, SiLU, causal convolution, and the shortcut (CogVideoXResnetBlock3D)."""

    def __init__(self, inputs: int, outputs: int, config: CogVideoXVAEConfig, *, spatial: bool, rngs: nnx.Rngs):
        self.spatial = spatial
        if spatial:
            self.norm1 = SpatialNorm(inputs, config.latent_channels, config.groups, rngs=rngs)
            self.norm2 = SpatialNorm(outputs, config.latent_channels, config.groups, rngs=rngs)
        else:
            self.norm1 = GroupNorm(inputs, config.groups, config.eps)
            self.norm2 = GroupNorm(outputs, config.groups, config.eps)
        self.conv1 = CausalConv(inputs, outputs, rngs=rngs)
        self.conv2 = CausalConv(outputs, outputs, rngs=rngs)
        self.widens = inputs != outputs
        if self.widens:
            self.conv_shortcut = Conv(inputs, outputs, (1, 1, 1), rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t h w c"], latents: Float[Array, "b t2 h2 w2 z"] | None, tails: Tails
    ) -> tuple[Float[Array, "b t h w d"], Tails]:
        given = (latents,) if self.spatial else ()
        first, second = tails or (None, None)
        y, first = self.conv1(jax.nn.silu(self.norm1(x, *given)), first)
        y, second = self.conv2(jax.nn.silu(self.norm2(y, *given)), second)
        return y + (self.conv_shortcut(x) if self.widens else x), (first, second)


class Downsample(nnx.Module):
    """Pairs of frames averaged, then half the rows and columns (CogVideoXDownsample3D)."""

    def __init__(self, width: int, *, in_time: bool, rngs: nnx.Rngs):
        self.in_time = in_time
        self.conv = Conv(width, width, (3, 3), stride=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 c"]:
        if self.in_time and x.shape[1] > 1:
            odd = x.shape[1] % 2  # then the first frame stays alone
            pairs = x[:, odd:]
            pairs = pairs.reshape(x.shape[0], -1, 2, *x.shape[2:]).mean(axis=2)
            x = jnp.concatenate([x[:, :1], pairs], axis=1) if odd else pairs
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling of rows and columns, and of frames, then a convolution (CogVideoXUpsample3D)."""

    def __init__(self, width: int, *, in_time: bool, rngs: nnx.Rngs):
        self.in_time = in_time
        self.conv = Conv(width, width, (3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 c"]:
        _, t, h, w, _ = x.shape
        frames = t if not self.in_time or t == 1 else 2 * t - t % 2
        return self.conv(_enlarged(x, (frames, 2 * h, 2 * w)) if frames != t else repeated(x, (1, 2, 2)))


class Level(nnx.Module):
    """ResNet blocks at one resolution and, where there is one, the step to the next."""

    def __init__(self, resnets: list[ResnetBlock], *, down: Downsample | None = None, up: Upsample | None = None):
        self.resnets = Numbered(resnets)
        self.down, self.up = down is not None, up is not None
        if self.down:
            self.downsamplers = Numbered([down])
        if self.up:
            self.upsamplers = Numbered([up])

    def __call__(self, x: Array, latents: Array | None, tails: Tails, *, remat: bool) -> tuple[Array, Tails]:
        def run(resnet, x, latents, tails):
            return resnet(x, latents, tails)

        run = jax.checkpoint(run) if remat else run
        tails, new = tails or (None,) * self.resnets.count, []
        for resnet, tail in zip(self.resnets, tails, strict=True):
            x, tail = run(resnet, x, latents, tail)
            new.append(tail)
        for step in self.downsamplers if self.down else self.upsamplers if self.up else ():
            x = step(x)
        return x, tuple(new)


class Encoder(nnx.Module):
    """A chunk of frames -> [mean | log variance] of its latents (CogVideoXEncoder3D)."""

    def __init__(self, config: CogVideoXVAEConfig, *, rngs: nnx.Rngs):
        self.config, levels = config, []
        inputs, halvings = config.widths[0], int(math.log2(config.time_factor))
        self.conv_in = CausalConv(3, inputs, rngs=rngs)
        for i, width in enumerate(config.widths):
            sizes = [inputs, *[width] * config.blocks]
            last = i == len(config.widths) - 1
            down = None if last else Downsample(width, in_time=i < halvings, rngs=rngs)
            levels.append(Level(_resnets(sizes, config, spatial=False, rngs=rngs), down=down))
            inputs = width
        self.down_blocks = Numbered(levels)
        self.mid_block = Level(_resnets([inputs] * 3, config, spatial=False, rngs=rngs))
        self.norm_out = GroupNorm(inputs, config.groups)
        self.conv_out = CausalConv(inputs, 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w 3"], tails: Tails) -> tuple[Float[Array, "b t2 h2 w2 z"], Tails]:
        levels = [*self.down_blocks, self.mid_block]
        first, between, last = tails or (None, (None,) * len(levels), None)
        x, first = self.conv_in(x, first)
        x, between = _through(levels, x, None, between, self.config.remat)
        x, last = self.conv_out(jax.nn.silu(self.norm_out(x)), last)
        return x, (first, between, last)


class Decoder(nnx.Module):
    """A chunk of latents -> its frames; every norm looks at the latents again (CogVideoXDecoder3D)."""

    def __init__(self, config: CogVideoXVAEConfig, *, rngs: nnx.Rngs):
        self.config, levels = config, []
        inputs, doublings = config.widths[-1], int(math.log2(config.time_factor))
        self.conv_in = CausalConv(config.latent_channels, inputs, rngs=rngs)
        self.mid_block = Level(_resnets([inputs] * 3, config, spatial=True, rngs=rngs))
        for i, width in enumerate(reversed(config.widths)):
            sizes = [inputs, *[width] * (config.blocks + 1)]
            last = i == len(config.widths) - 1
            up = None if last else Upsample(width, in_time=i < doublings, rngs=rngs)
            levels.append(Level(_resnets(sizes, config, spatial=True, rngs=rngs), up=up))
            inputs = width
        self.up_blocks = Numbered(levels)
        self.norm_out = SpatialNorm(inputs, config.latent_channels, config.groups, rngs=rngs)
        self.conv_out = CausalConv(inputs, 3, rngs=rngs)

    def __call__(self, latents: Float[Array, "b t h w z"], tails: Tails) -> tuple[Float[Array, "b t2 h2 w2 3"], Tails]:
        levels = [self.mid_block, *self.up_blocks]
        first, between, last = tails or (None, (None,) * len(levels), None)
        x, first = self.conv_in(latents, first)
        x, between = _through(levels, x, latents, between, self.config.remat)
        x, last = self.conv_out(jax.nn.silu(self.norm_out(x, latents)), last)
        return x, (first, between, last)


def _resnets(sizes: list[int], config: CogVideoXVAEConfig, *, spatial: bool, rngs: nnx.Rngs) -> list[ResnetBlock]:
    return [ResnetBlock(a, b, config, spatial=spatial, rngs=rngs) for a, b in itertools.pairwise(sizes)]


def _through(levels: list[Level], x: Array, latents: Array | None, tails: Tails, remat: bool) -> tuple[Array, Tails]:
    new = []
    for level, tail in zip(levels, tails, strict=True):
        x, tail = level(x, latents, tail, remat=remat)
        new.append(tail)
    return x, tuple(new)


def _in_chunks(step: Callable[[Any, Tails], tuple[Any, Tails]], x: Float[Array, "b t h w c"], size: int) -> Array:
    """`step(chunk, tails) -> (out, tails)` along time: chunks of `size` frames, what is over goes with the first."""
    b, t, *rest = x.shape
    first = min(t, size + t % size)
    out, tails = step(x[:, :first], None)
    if first == t:
        return out
    chunks = jnp.moveaxis(x[:, first:].reshape(b, -1, size, *rest), 1, 0)
    _, outs = lax.scan(lambda tails, chunk: step(chunk, tails)[::-1], tails, chunks)
    outs = jnp.moveaxis(outs, 0, 1)
    return jnp.concatenate([out, outs.reshape(b, -1, *outs.shape[3:])], axis=1)


class CogVideoXVAE(nnx.Module):
    """Video [b, t, h, w, 3] in [-1, 1] <-> latents. `CogVideoXVAE(config, rngs=nnx.Rngs(seed))`."""

    def __init__(self, config: CogVideoXVAEConfig = CogVideoXVAEConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def latent_shape(self, video_shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents of a video of t frames of h x w pixels.

        Raises ValueError for sizes that do not fit, and for frame counts that would not come back: upstream's chunks
        want 8k frames, or 8k + 1 of which the first is a latent of its own.
        """
        (t, h, w), side = video_shape, self.config.side_factor
        if h % side or w % side or min(h, w) < side:
            near = "x".join(str(max(1, round(length / side)) * side) for length in (h, w))
            raise ValueError(f"frames of {h}x{w} are no multiples of the codec's {side}; the nearest size is {near}")
        if t < 1 or t % FRAMES_AT_ONCE > 1:
            below = t - t % FRAMES_AT_ONCE
            fit = " or ".join(str(n) for n in (below, below + 1, below + FRAMES_AT_ONCE) if n > 0)
            raise ValueError(f"{t} frames: this codec takes 1, 8k or 8k + 1 of them; write {fit}")
        return -(-t // self.config.time_factor), h // side, w // side, self.config.latent_channels

    def moments(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 z"]:
        """[mean | log variance] of the latents, not scaled, in the dtype of the weights: what `sample` takes.

        Raises ValueError as `latent_shape`. Source: AutoencoderKLCogVideoX._encode, tiled_encode.
        """
        self.latent_shape(video.shape[1:4])
        return self._run(self.encoder, video, FRAMES_AT_ONCE, of_latents=False)

    def sample(self, moments: Float[Array, "b t h w z"], key: AnyKey | None = None) -> Float[Array, "b t h w c"]:
        """Scaled latents (fp32) drawn from moments; key None: their mean."""
        return posterior(moments, key) * self.config.scale

    def encode(self, video: Float[Array, "b t h w 3"], key: AnyKey | None = None) -> Float[Array, "b t2 h2 w2 c"]:
        """Scaled latents (fp32) of a video in [-1, 1], drawn from the posterior with `key`; key None: its mean."""
        return self.sample(self.moments(video), key)

    def decode(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 3"]:
        """The video of scaled latents, in the dtype of the weights: about in [-1, 1], not clipped.

        t latents are 4t frames, 4t - 3 for an odd t. Source: AutoencoderKLCogVideoX._decode, tiled_decode.
        """
        latents = latents.astype(jnp.float32) / self.config.scale
        return self._run(self.decoder, latents, LATENTS_AT_ONCE, of_latents=True)

    def _run(self, network: Encoder | Decoder, x: Array, size: int, *, of_latents: bool) -> Array:
        x = x.astype(network.conv_in.conv.kernel.dtype)
        tiles = self.config.tiles(of_latents=of_latents)
        if self.config.tiling and any(n > tile for n, tile in zip(x.shape[2:4], tiles["tile"], strict=True)):
            return tiled(lambda x: _in_chunks(network, x, size), x, **tiles)
        return _in_chunks(network, x, size)
