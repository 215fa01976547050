"""RAFT, small and large, as a frozen teacher: video in, optical flow of every two consecutive frames out.

Sources: princeton-vl/RAFT core/{raft,extractor,update}.py and torchvision models/optical_flow/raft.py, whose names the
attributes bear; `RULES` has the names of both projects' files. Two things are done otherwise, with the same result: the
context's part of the recurrent convolutions, which no iteration changes, is computed once, and only the last flow is
brought to full size unless all are asked for.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxalign.interop.rules import BATCH_NORM_COUNTS, Rename, Rule, Tied
from jaxalign.teachers import correlation, flow_layers
from jaxalign.teachers.efficientnet import BatchNorm
from jaxalign.teachers.flow_layers import Conv, numbered

PRESETS: dict[str, dict[str, Any]] = {"raft_small": dict(variant="small"), "raft_large": dict(variant="large")}


class Widths(NamedTuple):
    """What distinguishes the two networks."""

    encoder: tuple[int, int, int, int]  # the stem, then the three layers
    bottleneck: bool  # kind of the encoders' blocks
    features: int
    context_norm: str | None  # the feature encoder always has 'instance'
    hidden: int
    context: int
    radius: int  # of the correlations
    on_correlations: tuple[int, ...]  # widths of the motion encoder's convolutions; their sizes are 1 and 3
    on_flow: tuple[int, ...]  # likewise; 7 and 3
    motion: int
    gru: tuple[tuple[int, int], ...]  # sizes of the recurrent units' kernels
    flow_head: int
    mask: int | None  # hidden width of the upsampling mask; None: upsampling is bilinear


VARIANTS = {
    "large": Widths(
        encoder=(64, 64, 96, 128),
        bottleneck=False,
        features=256,
        context_norm="batch",
        hidden=128,
        context=128,
        radius=4,
        on_correlations=(256, 192),
        on_flow=(128, 64),
        motion=128,
        gru=((1, 5), (5, 1)),
        flow_head=256,
        mask=256,
    ),
    "small": Widths(
        encoder=(32, 32, 64, 96),
        bottleneck=True,
        features=128,
        context_norm=None,
        hidden=96,
        context=64,
        radius=3,
        on_correlations=(96,),
        on_flow=(64, 32),
        motion=82,
        gru=((3, 3),),
        flow_head=128,
        mask=None,
    ),
}


# ---- names of the weights -----------------------------------------------------------------------------------------


def _original(variant: str) -> tuple[Rule, ...]:
    """Names of princeton-vl's files, which were saved from a DataParallel module."""
    units = r".conv\2\1" if variant == "large" else r".conv\2"
    renames = (
        (r"^feature_encoder\.", "module.fnet."),
        (r"^context_encoder\.", "module.cnet."),
        (r"^(update_block|mask_predictor)\.", r"module.\1."),
        (r"^(module\.[fc]net)\.conv\.", r"\1.conv2."),
        (r"\.convnormrelu\.0\.", ".conv1."),
        (r"\.convnormrelu\.1\.", ".norm1."),
        (r"\.convnormrelu(\d)\.0\.", r".conv\1."),
        (r"\.convnormrelu(\d)\.1\.", r".norm\1."),
        (r"\.downsample\.1\.", ".norm3."),
        (r"\.motion_encoder\.", ".encoder."),
        (r"\.conv(c|f)(?:orr|low)(\d)\.0\.", r".conv\1\2."),
        (r"\.encoder\.conv\.0\.", ".encoder.conv."),
        (r"\.recurrent_block\.convgru(\d)\.conv(\w)", f".gru{units}"),
        (r"\.mask_predictor\.convrelu\.0\.", ".update_block.mask.0."),
        (r"\.mask_predictor\.conv\.", ".update_block.mask.2."),
    )
    rules = [*(Rename(pattern, to) for pattern, to in renames), BATCH_NORM_COUNTS]
    if variant == "large":
        # Upstream registers the shortcut's BatchNorm twice.
        rules += [
            Tied(f"module.cnet.layer{layer}.0.downsample.1.{leaf}", f"module.cnet.layer{layer}.0.norm3.{leaf}")
            for layer in (2, 3)
            for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ]
    return tuple(rules)


# variant -> whose file -> rules
RULES: dict[str, dict[str, tuple[Rule, ...]]] = {
    variant: {"torchvision": (BATCH_NORM_COUNTS,), "original": _original(variant)} for variant in VARIANTS
}


# ---- settings -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RAFTConfig:
    """Settings of the teacher. Raises ValueError for what it cannot be."""

    variant: str = "large"  # or 'small'
    iterations: int = 12
    size: tuple[int, int] | None = None  # (height, width) to which frames are resized for the network
    # About so many pairs of frames, those of all clips together, go through the network in one step, which bounds the
    # memory: a pair's correlations take 5.3 bytes · (h·w/64)², 155 MB at 480x720. None: as many as have 2048 positions
    # of stride 8 on CPU, 65536 elsewhere.
    pairs_at_once: int | None = None
    remat: bool = False  # keep only every iteration's start for a gradient with respect to the video

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"raft: variant {self.variant!r} is not known; write 'small' or 'large'")
        flow_layers.check_settings("raft", self)


# ---- the network --------------------------------------------------------------------------------------------------


class ConvNorm(nnx.Module):
    """A convolution and 'batch', 'instance' or no normalisation (torchvision's Conv2dNormActivation)."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, *, norm: str | None, rngs: nnx.Rngs):
        self.norm = norm
        setattr(self, "0", Conv(inputs, outputs, size, stride, rngs=rngs))
        if norm == "batch":
            setattr(self, "1", BatchNorm(outputs, flow_layers.NORM_EPS))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = getattr(self, "0")(x)
        if self.norm == "batch":
            return getattr(self, "1")(x)
        return flow_layers.instance_norm(x) if self.norm == "instance" else x


class Block(nnx.Module):
    """Two convolutions of size 3, or a bottleneck of three of sizes 1, 3 and 1, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, bottleneck: bool, norm: str | None, rngs: nnx.Rngs):
        inner = outputs // 4
        plain = ((inputs, outputs, 3, stride), (outputs, outputs, 3, 1))
        narrow = ((inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1))
        self.convolutions = 3 if bottleneck else 2
        for i, shape in enumerate(narrow if bottleneck else plain):
            setattr(self, f"convnormrelu{i + 1}", ConvNorm(*shape, norm=norm, rngs=rngs))
        if stride != 1:
            self.downsample = ConvNorm(inputs, outputs, 1, stride, norm=norm, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = x
        for i in range(self.convolutions):
            y = jax.nn.relu(getattr(self, f"convnormrelu{i + 1}")(y))
        return jax.nn.relu((self.downsample(x) if hasattr(self, "downsample") else x) + y)


class Encoder(nnx.Module):
    """Frames -> maps of stride 8 (FeatureEncoder)."""

    def __init__(self, widths: Widths, outputs: int, norm: str | None, *, rngs: nnx.Rngs):
        stem, *layers = widths.encoder
        self.convnormrelu = ConvNorm(3, stem, 7, 2, norm=norm, rngs=rngs)
        for i, (inputs, width) in enumerate(itertools.pairwise(widths.encoder)):
            settings = dict(bottleneck=widths.bottleneck, norm=norm, rngs=rngs)
            blocks = {0: Block(inputs, width, 1 if i == 0 else 2, **settings), 1: Block(width, width, 1, **settings)}
            setattr(self, f"layer{i + 1}", numbered(blocks))
        self.conv = Conv(layers[-1], outputs, 1, rngs=rngs)

    def __call__(self, frames: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 d"]:
        x = jax.nn.relu(self.convnormrelu(frames.astype(self.conv.kernel.dtype)))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = getattr(layer, "1")(getattr(layer, "0")(x))
        return self.conv(x)


class ConvGRU(nnx.Module):
    """Gated recurrent unit of convolutions over [hidden, context, motion]."""

    def __init__(self, hidden: int, context: int, motion: int, size: tuple[int, int], *, rngs: nnx.Rngs):
        self.hidden, self.context = hidden, context
        for name in ("convz", "convr", "convq"):
            setattr(self, name, Conv(hidden + context + motion, hidden, size, rngs=rngs))

    def share(self, context: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """What the context and the biases add to the update gate, the reset gate and the candidate, side by side."""
        convs = (self.convz, self.convr, self.convq)
        kernel = jnp.concatenate([conv.kernel[...] for conv in convs], axis=-1)
        bias = jnp.concatenate([conv.bias[...] for conv in convs])
        return flow_layers.convolve(context, kernel[:, :, self.hidden : self.hidden + self.context], bias)

    def __call__(
        self, hidden: Float[Array, "b h w d"], motion: Float[Array, "b h w m"], share: Float[Array, "b h w s"]
    ) -> Float[Array, "b h w d"]:
        def convolved(x, *convs):
            kernel = jnp.concatenate([conv.kernel[...] for conv in convs], axis=-1)
            kernel = jnp.delete(kernel, slice(self.hidden, self.hidden + self.context), axis=2)
            return flow_layers.convolve(jnp.concatenate([x, motion], axis=-1), kernel)

        gates = jax.nn.sigmoid(convolved(hidden, self.convz, self.convr) + share[..., : 2 * self.hidden])
        update, reset = jnp.split(gates, 2, axis=-1)
        candidate = jnp.tanh(convolved(reset * hidden, self.convq) + share[..., 2 * self.hidden :])
        return (1 - update) * hidden + update * candidate


class UpdateBlock(nnx.Module):
    """One iteration: correlations and flow -> hidden state -> change of the flow."""

    def __init__(self, widths: Widths, *, rngs: nnx.Rngs):
        side = 2 * widths.radius + 1
        seen = (correlation.LEVELS * side**2, *widths.on_correlations)
        moved = (2, *widths.on_flow)
        self.motion_encoder = encoder = nnx.Module()
        self.stages = len(widths.on_correlations), len(widths.on_flow)
        for name, channels, first in (("convcorr", seen, 1), ("convflow", moved, 7)):
            for i, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
                conv = Conv(inputs, outputs, first if i == 0 else 3, rngs=rngs)
                setattr(encoder, f"{name}{i + 1}", numbered({0: conv}))
        # the flow itself is appended
        encoder.conv = numbered({0: Conv(seen[-1] + moved[-1], widths.motion - 2, 3, rngs=rngs)})
        self.recurrent_block = nnx.Module()
        self.units = len(widths.gru)
        for i, size in enumerate(widths.gru):
            unit = ConvGRU(widths.hidden, widths.context, widths.motion, size, rngs=rngs)
            setattr(self.recurrent_block, f"convgru{i + 1}", unit)
        self.flow_head = nnx.Module()
        self.flow_head.conv1 = Conv(widths.hidden, widths.flow_head, 3, rngs=rngs)
        self.flow_head.conv2 = Conv(widths.flow_head, 2, 3, rngs=rngs)

    def shares(self, context: Float[Array, "b h w c"]) -> list[Float[Array, "b h w s"]]:
        """The context's part in every recurrent unit."""
        return [getattr(self.recurrent_block, f"convgru{i + 1}").share(context) for i in range(self.units)]

    def __call__(
        self,
        hidden: Float[Array, "b h w d"],
        shares: list[Float[Array, "b h w s"]],
        correlations: Float[Array, "b h w k"],
        flow: Float[Array, "b h w 2"],
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b h w 2"]]:
        encoder = self.motion_encoder
        seen, moved = (
            [getattr(getattr(encoder, f"{name}{i + 1}"), "0") for i in range(count)]
            for name, count in zip(("convcorr", "convflow"), self.stages, strict=True)
        )
        motion = flow_layers.motion_features(flow, correlations, seen, moved, getattr(encoder.conv, "0"))
        for i, share in enumerate(shares):
            hidden = getattr(self.recurrent_block, f"convgru{i + 1}")(hidden, motion, share)
        return hidden, self.flow_head.conv2(jax.nn.relu(self.flow_head.conv1(hidden)))


class RAFT(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> flow [b, t - 1, h, w, 2], fp32, in pixels of the video."""

    def __init__(self, config: RAFTConfig = RAFTConfig(), *, rngs: nnx.Rngs):
        self.config, self.widths = config, (widths := VARIANTS[config.variant])
        self.feature_encoder = Encoder(widths, widths.features, "instance", rngs=rngs)
        self.context_encoder = Encoder(widths, widths.hidden + widths.context, widths.context_norm, rngs=rngs)
        self.update_block = UpdateBlock(widths, rngs=rngs)
        if widths.mask:
            self.mask_predictor = nnx.Module()
            self.mask_predictor.convrelu = numbered({0: Conv(widths.hidden, widths.mask, 3, rngs=rngs)})
            self.mask_predictor.conv = Conv(widths.mask, 9 * flow_layers.STRIDE**2, 1, rngs=rngs)

    @property
    def width(self) -> int:
        """Channels of the output: u (to the right) and v (down)."""
        return 2

    def grid(self, video: tuple[int, int, int]) -> tuple[int, int, int]:
        """(pairs, rows, columns) of the flow of a video of (frames, height, width)."""
        return video[0] - 1, video[1], video[2]

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h w 2"]:
        """Flow from every frame to the next. Raises ValueError for one frame, or frames under 128 pixels."""
        return self._flow(video, every=False)

    def flow(self, first: Float[Array, "b h w 3"], second: Float[Array, "b h w 3"]) -> Float[Array, "b h w 2"]:
        """Flow from `first` to `second`."""
        return self(jnp.stack([first, second], axis=1))[:, 0]

    def updates(self, first: Float[Array, "b h w 3"], second: Float[Array, "b h w 3"]) -> Float[Array, "i b h w 2"]:
        """Flow after every iteration."""
        return jnp.moveaxis(self._flow(jnp.stack([first, second], axis=1), every=True)[:, 0], 1, 0)

    def _flow(self, video: Array, every: bool) -> Array:
        config = self.config
        flow = flow_layers.over_pairs(
            video,
            self.feature_encoder,
            lambda pairs: self.context_encoder(pairs[..., :3]),
            lambda maps: self._refine(maps, every),
            size=config.size,
            at_once=config.pairs_at_once,
        )
        return flow_layers.resize_flow(flow, video.shape[2:4])

    def _refine(self, maps: Float[Array, "n h w c"], every: bool) -> Array:
        widths = self.widths
        first, second, context = jnp.split(maps, (widths.features, 2 * widths.features), axis=-1)
        volumes = correlation.all_pairs(first, second)
        hidden = jnp.tanh(context[..., : widths.hidden])
        shares = self.update_block.shares(jax.nn.relu(context[..., widths.hidden :]))
        grid = flow_layers.positions(maps)

        def step(carry, _):
            # No gradient through where the correlations are read, nor from one iteration's flow to the next.
            hidden, flow = carry[0], lax.stop_gradient(carry[1])
            correlations = correlation.look_up(volumes, grid + flow, widths.radius)
            hidden, change = self.update_block(hidden, shares, correlations, flow)
            carry = hidden, flow + change.astype(jnp.float32)
            return carry, carry if every else None

        if self.config.remat:
            step = jax.checkpoint(step, prevent_cse=False)
        start = hidden, jnp.zeros((*maps.shape[:3], 2), jnp.float32)
        last, each = lax.scan(step, start, length=self.config.iterations)
        return jnp.moveaxis(lax.map(self._upsample, each), 0, 1) if every else self._upsample(last)

    def _upsample(self, state: tuple[Array, Array]) -> Float[Array, "n h w 2"]:
        hidden, flow = state
        flow = flow_layers.STRIDE * flow
        if not self.widths.mask:
            return flow_layers.upsample_bilinear(flow)
        mask = self.mask_predictor.conv(jax.nn.relu(getattr(self.mask_predictor.convrelu, "0")(hidden)))
        return flow_layers.upsample_convex(flow, 0.25 * mask)
