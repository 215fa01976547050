"""SEA-RAFT S, M and L as a frozen teacher: optical flow of every two consecutive frames, and how uncertain it is.

Source: princeton-vl/SEA-RAFT core/{raft,extractor,update,layer}.py and config/eval/*.json; attributes bear its names.
Against RAFT the trunks are the first three stages of a ResNet, the first flow is read off the context, ConvNeXt blocks
stand in for the recurrent units, and the network gives, beside the flow, the parameters of a mixture of two Laplace
distributions of its error. Only the last flow is brought to full size unless all are asked for.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxalign.interop.rules import BATCH_NORM_COUNTS, Rename, Stack, Tied
from jaxalign.models.layers import Linear, layer_norm
from jaxalign.teachers import correlation, flow_layers
from jaxalign.teachers.efficientnet import BatchNorm, depthwise
from jaxalign.teachers.flow_layers import Conv, numbered

# L is M's file with more iterations.
PRESETS: dict[str, dict[str, Any]] = {
    "sea_raft_s": dict(blocks=(2, 2, 2)),
    "sea_raft_m": dict(blocks=(3, 4, 6)),
    "sea_raft_l": dict(blocks=(3, 4, 6), iterations=12),
}

RULES = (
    Stack(r"(cnet|fnet)\.layer1"),
    Stack(r"(cnet|fnet)\.(layer[23])\.rest", name=r"\1.\2", start=1),
    Stack(r"update_block\.refine"),
    Rename(r"\.layer([23])\.first\.", r".layer\1.0."),
    BATCH_NORM_COUNTS,
    # Upstream registers the shortcut's BatchNorm twice; files of the hub, which are safetensors, keep this one only.
    *(
        Tied(f"{trunk}.layer{layer}.0.downsample.1.{leaf}", f"{trunk}.layer{layer}.0.bn3.{leaf}")
        for trunk in ("cnet", "fnet")
        for layer in (2, 3)
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ),
)

WIDTH = 128  # of the hidden state and of the context
STAGES = (64, 128, 256)  # of the trunks
REFINE_BLOCKS = 2
RADIUS = 4
MAX_LOG_SCALE = 10.0  # var_max; var_min is 0, which leaves the second Laplace distribution at scale 1


@dataclasses.dataclass(frozen=True)
class SEARAFTConfig:
    """Settings of the teacher. Raises ValueError for what it cannot be."""

    blocks: tuple[int, ...] = (3, 4, 6)  # of each stage of the trunks: a ResNet-34; (2, 2, 2) is a ResNet-18
    iterations: int = 4
    # (height, width) to which frames are resized for the network; upstream halves the sides for Spring's 1080x1920.
    size: tuple[int, int] | None = None
    pairs_at_once: int | None = None  # as in RAFTConfig
    remat: bool = False  # keep only every iteration's start for a gradient with respect to the video

    def __post_init__(self):
        if len(self.blocks) != len(STAGES) or min(self.blocks) < 2:
            raise ValueError(f"sea_raft: blocks must be {len(STAGES)} numbers of at least 2, not {self.blocks}")
        flow_layers.check_settings("sea_raft", self)


class BasicBlock(nnx.Module):
    """Two convolutions of size 3 and a shortcut, which is a convolution where the shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv1 = Conv(inputs, outputs, 3, stride, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, 3, rngs=rngs)
        self.bn1 = BatchNorm(outputs, flow_layers.NORM_EPS)
        self.bn2 = BatchNorm(outputs, flow_layers.NORM_EPS)
        if stride != 1:
            self.bn3 = BatchNorm(outputs, flow_layers.NORM_EPS)
            self.downsample = numbered({0: Conv(inputs, outputs, 1, stride, rngs=rngs)})

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        if hasattr(self, "downsample"):
            x = self.bn3(getattr(self.downsample, "0")(x))
        return jax.nn.relu(x + y)


class Trunk(nnx.Module):
    """Frames, or pairs of frames, -> maps of stride 8 (ResNetFPN); equal blocks are stacked."""

    def __init__(self, inputs: int, blocks: tuple[int, ...], *, rngs: nnx.Rngs):
        self.conv1 = Conv(inputs, STAGES[0], 7, 2, rngs=rngs)
        self.bn1 = BatchNorm(STAGES[0], flow_layers.NORM_EPS)
        self.layer1 = _stacked(lambda rngs: BasicBlock(STAGES[0], STAGES[0], rngs=rngs), blocks[0], rngs)
        for i in (1, 2):
            stage = nnx.Module()
            stage.first = BasicBlock(STAGES[i - 1], STAGES[i], 2, rngs=rngs)
            stage.rest = _stacked(lambda rngs, i=i: BasicBlock(STAGES[i], STAGES[i], rngs=rngs), blocks[i] - 1, rngs)
            setattr(self, f"layer{i + 1}", stage)
        self.final_conv = Conv(STAGES[-1], 2 * WIDTH, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = jax.nn.relu(self.bn1(self.conv1(x.astype(self.conv1.kernel.dtype))))
        x = _run(self.layer1, x)
        for stage in (self.layer2, self.layer3):
            x = _run(stage.rest, stage.first(x))
        return self.final_conv(x)


class ConvNextBlock(nnx.Module):
    """Depthwise convolution, LayerNorm and MLP as a residual, then a projection to the hidden state."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.dwconv = nnx.Conv(inputs, inputs, (7, 7), feature_group_count=inputs, rngs=rngs)
        self.norm = nnx.LayerNorm(inputs, rngs=rngs)
        self.pwconv1 = Linear(inputs, 4 * outputs, rngs=rngs)
        self.pwconv2 = Linear(4 * outputs, inputs, rngs=rngs)
        self.gamma = nnx.Param(jnp.full(inputs, 1e-6))
        self.final = Conv(inputs, outputs, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        y = depthwise(x, self.dwconv.kernel[...], 1) + self.dwconv.bias[...]
        y = layer_norm(y) * self.norm.scale[...] + self.norm.bias[...]
        y = self.pwconv2(jax.nn.gelu(self.pwconv1(y), approximate=False))
        return self.final(x + self.gamma[...] * y)


class MotionEncoder(nnx.Module):
    """Flow and correlations -> features (BasicMotionEncoder)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.convc1 = Conv(correlation.LEVELS * (2 * RADIUS + 1) ** 2, 2 * WIDTH, 1, rngs=rngs)
        self.convc2 = Conv(2 * WIDTH, WIDTH + WIDTH // 2, 3, rngs=rngs)
        self.convf1 = Conv(2, WIDTH, 7, rngs=rngs)
        self.convf2 = Conv(WIDTH, WIDTH // 2, 3, rngs=rngs)
        self.conv = Conv(2 * WIDTH, WIDTH - 2, 3, rngs=rngs)  # the flow itself is appended

    def __call__(self, flow: Float[Array, "b h w 2"], seen: Float[Array, "b h w k"]) -> Float[Array, "b h w d"]:
        on_correlations, on_flow = (self.convc1, self.convc2), (self.convf1, self.convf2)
        return flow_layers.motion_features(flow, seen, on_correlations, on_flow, self.conv)


class SEARAFT(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> flow [b, t - 1, h, w, 2], fp32, in pixels of the video."""

    def __init__(self, config: SEARAFTConfig = SEARAFTConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.cnet = Trunk(6, config.blocks, rngs=rngs)
        self.init_conv = Conv(2 * WIDTH, 2 * WIDTH, 3, rngs=rngs)
        mask = Conv(2 * WIDTH, 9 * flow_layers.STRIDE**2, 1, rngs=rngs)
        self.upsample_weight = numbered({0: Conv(WIDTH, 2 * WIDTH, 3, rngs=rngs), 2: mask})
        self.flow_head = numbered({0: Conv(WIDTH, 2 * WIDTH, 3, rngs=rngs), 2: Conv(2 * WIDTH, 6, 3, rngs=rngs)})
        self.fnet = Trunk(3, config.blocks, rngs=rngs)
        self.update_block = nnx.Module()
        self.update_block.encoder = MotionEncoder(rngs=rngs)
        self.update_block.refine = _stacked(
            lambda rngs: ConvNextBlock(3 * WIDTH, WIDTH, rngs=rngs), REFINE_BLOCKS, rngs
        )

    @property
    def width(self) -> int:
        """Channels of the output: u (to the right) and v (down)."""
        return 2

    def grid(self, video: tuple[int, int, int]) -> tuple[int, int, int]:
        """(pairs, rows, columns) of the flow of a video of (frames, height, width)."""
        return video[0] - 1, video[1], video[2]

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h w 2"]:
        """Flow from every frame to the next. Raises ValueError for one frame, or frames under 128 pixels."""
        return self.flow_and_info(video)[0]

    def flow(self, first: Float[Array, "b h w 3"], second: Float[Array, "b h w 3"]) -> Float[Array, "b h w 2"]:
        """Flow from `first` to `second`."""
        return self(jnp.stack([first, second], axis=1))[:, 0]

    def flow_and_info(
        self, video: Float[Array, "b t h w 3"]
    ) -> tuple[Float[Array, "b t2 h w 2"], Float[Array, "b t2 h w 4"]]:
        """Flow and the mixture of its error: two logits of the weights, two logs of the scales, not yet clipped.

        `uncertainty` and `negative_log_likelihood` read the second.
        """
        return self._outputs(video, every=False)

    def updates(
        self, first: Float[Array, "b h w 3"], second: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "i b h w 2"], Float[Array, "i b h w 4"]]:
        """Flow and mixture of the first guess and after every iteration."""
        outputs = self._outputs(jnp.stack([first, second], axis=1), every=True)
        return tuple(jnp.moveaxis(x[:, 0], 1, 0) for x in outputs)

    def _outputs(self, video: Array, every: bool) -> tuple[Array, Array]:
        config, size = self.config, video.shape[2:4]
        outputs = flow_layers.over_pairs(
            video,
            self.fnet,
            lambda pairs: self.init_conv(self.cnet(pairs)),
            lambda maps: self._refine(maps, every),
            size=config.size,
            at_once=config.pairs_at_once,
        )
        flow, info = outputs[..., :2], outputs[..., 2:]
        if flow.shape[-3:-1] != size:  # as upstream's custom.py does it after its own resizing
            flow, info = flow_layers.resize_flow(flow, size), flow_layers.area_pool(info, size)
        return flow, info

    def _refine(self, maps: Float[Array, "n h w c"], every: bool) -> Array:
        first, second, hidden, context = jnp.split(maps, (2 * WIDTH, 4 * WIDTH, 5 * WIDTH), axis=-1)
        volumes = correlation.all_pairs(first, second)
        grid = flow_layers.positions(maps)

        def step(state, _):
            # No gradient through where the correlations are read, nor from one iteration's flow to the next.
            hidden, flow = state[0], lax.stop_gradient(state[1])
            seen = correlation.look_up(volumes, grid + flow, RADIUS)
            motion = self.update_block.encoder(flow, seen)

            def refine(hidden, block):
                return block(jnp.concatenate([hidden, context, motion], axis=-1)), None

            hidden, _ = lax.scan(refine, hidden, self.update_block.refine)
            change, info = self._heads(hidden)
            state = hidden, flow + change, info
            return state, state if every else None

        if self.config.remat:
            step = jax.checkpoint(step, prevent_cse=False)
        start = hidden, *self._heads(hidden)
        last, each = lax.scan(step, start, length=self.config.iterations)
        if not every:
            return self._upsample(last)
        each = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), start, each)
        return jnp.moveaxis(lax.map(self._upsample, each), 0, 1)

    def _heads(self, hidden: Float[Array, "n h w c"]) -> tuple[Float[Array, "n h w 2"], Float[Array, "n h w 4"]]:
        """Change of the flow, in positions, and the mixture of its error; fp32."""
        out = getattr(self.flow_head, "2")(jax.nn.relu(getattr(self.flow_head, "0")(hidden))).astype(jnp.float32)
        return out[..., :2], out[..., 2:]

    def _upsample(self, state: tuple[Array, Array, Array]) -> Float[Array, "n h w 6"]:
        hidden, flow, info = state
        mask = getattr(self.upsample_weight, "2")(jax.nn.relu(getattr(self.upsample_weight, "0")(hidden)))
        both = jnp.concatenate([flow_layers.STRIDE * flow, info], axis=-1)
        return flow_layers.upsample_convex(both, 0.25 * mask)


# ---- the mixture of Laplace distributions -------------------------------------------------------------------------


def log_scales(info: Float[Array, "*b 4"]) -> Float[Array, "*b 2"]:
    """Logs of the scales of the two Laplace distributions: the first free in [0, 10], the second 0 (var_min = 0)."""
    first = jnp.clip(info[..., 2], 0, MAX_LOG_SCALE)
    return jnp.stack([first, jnp.zeros_like(first)], axis=-1)


def uncertainty(info: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Expected log of the error's scale, at least 0 (get_heatmap in upstream's custom.py)."""
    return (jax.nn.softmax(info[..., :2], axis=-1) * log_scales(info)).sum(-1)


def negative_log_likelihood(
    flow: Float[Array, "*b 2"], info: Float[Array, "*b 4"], truth: Float[Array, "*b 2"]
) -> Float[Array, "*b 2"]:
    """−log of the mixture's density at the true u and v (SEA-RAFT's loss, `nf` in core/raft.py)."""
    scales = log_scales(info)[..., None, :]
    weights = info[..., None, :2]
    terms = weights - jnp.log(2.0) - scales - jnp.abs(truth - flow)[..., None] * jnp.exp(-scales)
    return jax.nn.logsumexp(weights, axis=-1) - jax.nn.logsumexp(terms, axis=-1)


# ---- stacks -------------------------------------------------------------------------------------------------------


def _stacked(make, count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` equal modules as one, whose leaves have them on a leading axis."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def _run(blocks: nnx.Module, x: Array) -> Array:
    return lax.scan(lambda x, block: (block(x), None), x, blocks)[0]
