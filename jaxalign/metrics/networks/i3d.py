"""I3D on Kinetics-400 (RGB): its 400 logits are the features of the classic FVD.

Network: Inception-v1 inflated to 3-D, Carreira and Zisserman 2017 (arXiv 1705.07750); convolutions and pools with
TensorFlow's 'SAME' padding, BatchNorm without a learned scale in the original (PyTorch files hold ones). Attribute
names are those of hassony2/kinetics_i3d_pytorch, whose scripted version i3d_torchscript.pt StyleGAN-V checked against
the hub's network of the FVD paper (universome/fvd-comparison: logits agree to 3e-4, in that graph eps is 1e-3).
piergiaj/pytorch-i3d names the same leaves otherwise. cd-fvd runs the hub's weights with eps 1e-5 (preset `i3d_cdfvd`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.interop.rules import BATCH_NORM_COUNTS, Rename
from jaxalign.teachers.efficientnet import BatchNorm
from jaxalign.teachers.resize import resize

# widths of a mixed block: 1x1 | 1x1, 3x3 | 1x1, 3x3 | 1x1 behind the pool
_MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
# (window, stride) in time and space of the pool in front of a block
_POOLS = {"mixed_3b": ((1, 3), (1, 2)), "mixed_4b": ((3, 3), (2, 2)), "mixed_5b": ((2, 2), (2, 2))}
SIZE = 224
MIN_FRAMES = 9  # an eighth of the frames, rounded up, must fill the last pool's two

RULES = {
    "torchscript": (BATCH_NORM_COUNTS,),
    "pytorch_i3d": (
        Rename(r"^conv3d_0c_1x1\.", "logits."),
        Rename(r"^conv3d_", "Conv3d_"),
        Rename(r"^mixed_", "Mixed_"),
        Rename(r"\bbranch_0\.", "b0."),
        Rename(r"\bbranch_(\d)\.0\.", r"b\1a."),
        Rename(r"\bbranch_(\d)\.1\.", r"b\1b."),
        Rename(r"\.batch3d\.", ".bn."),
        BATCH_NORM_COUNTS,
    ),
}
PRESETS = {"i3d": {}, "i3d_cdfvd": {"epsilon": 1e-5}}


@dataclasses.dataclass(frozen=True)
class I3DConfig:
    """Settings of the network."""

    epsilon: float = 1e-3  # of BatchNorm
    num_classes: int = 400


class Unit(nnx.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, epsilon: float, rngs: nnx.Rngs):
        shape, strides = (kernel,) * 3, (stride,) * 3
        self.conv3d = nnx.Conv(inputs, outputs, shape, strides=strides, padding="SAME", use_bias=False, rngs=rngs)
        self.batch3d = BatchNorm(outputs, epsilon)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        return jax.nn.relu(self.batch3d(self.conv3d(x)))


class Branch(nnx.Module):
    """Units one behind the other under upstream's indices; a pool has an index and no leaves."""

    def __init__(self, units: dict[str, Unit]):
        for index, unit in units.items():
            setattr(self, index, unit)


class Mixed(nnx.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, widths: tuple[int, ...], epsilon: float, rngs: nnx.Rngs):
        a, b, c, d, e, f = widths

        def unit(inputs, outputs, kernel):
            return Unit(inputs, outputs, kernel, 1, epsilon, rngs)

        self.branch_0 = unit(inputs, a, 1)
        self.branch_1 = Branch({"0": unit(inputs, b, 1), "1": unit(b, c, 3)})
        self.branch_2 = Branch({"0": unit(inputs, d, 1), "1": unit(d, e, 3)})
        self.branch_3 = Branch({"1": unit(inputs, f, 1)})

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        def run(branch, x):
            return getattr(branch, "1")(getattr(branch, "0")(x))

        pooled = _max_pool(x, (3, 3), (1, 1))
        parts = [self.branch_0(x), run(self.branch_1, x), run(self.branch_2, x), getattr(self.branch_3, "1")(pooled)]
        return jnp.concatenate(parts, -1)


def _max_pool(x: Array, window: tuple[int, int], stride: tuple[int, int]) -> Array:
    """'SAME' max pool; PyTorch's ports pad with zeros, which is the same behind a ReLU."""
    (wt, ws), (st, ss) = window, stride
    return nnx.max_pool(x, (wt, ws, ws), strides=(st, ss, ss), padding="SAME")


class Logits(nnx.Module):
    """The classifier: a convolution with a bias and nothing behind it."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.conv3d = nnx.Conv(inputs, outputs, (1, 1, 1), rngs=rngs)


class I3D(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> logits [b, 400]; published FVDs take 16 frames."""

    def __init__(self, config: I3DConfig = I3DConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.conv3d_1a_7x7 = Unit(3, 64, 7, 2, config.epsilon, rngs)
        self.conv3d_2b_1x1 = Unit(64, 64, 1, 1, config.epsilon, rngs)
        self.conv3d_2c_3x3 = Unit(64, 192, 3, 1, config.epsilon, rngs)
        width = 192
        for name, widths in _MIXED.items():
            setattr(self, name, Mixed(width, widths, config.epsilon, rngs))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.conv3d_0c_1x1 = Logits(width, config.num_classes, rngs)

    @property
    def width(self) -> int:
        """How many features a video has."""
        return self.config.num_classes

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b d"]:
        """The logits, in fp32. Frames of another size are resized to 224 x 224 (bilinear, PyTorch's, not antialiased).

        Raises ValueError for fewer than 9 frames. Source: StyleGAN-V's detector with rescale and resize, cd-fvd's
        `preprocess_i3d`; both see whole numbers 0..255, so quantise what was generated.
        """
        if video.shape[1] < MIN_FRAMES:
            raise ValueError(f"i3d: a clip needs at least {MIN_FRAMES} frames, this one has {video.shape[1]}")
        x = resize(video.astype(jnp.float32), (SIZE, SIZE), method="linear")
        x = self.features(x.astype(self.conv3d_1a_7x7.conv3d.kernel.dtype))
        x = nnx.avg_pool(x, (2, 7, 7))
        return self.conv3d_0c_1x1.conv3d(x).astype(jnp.float32).mean((1, 2, 3))

    def features(self, x: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 d"]:
        """What stands in front of the last pool: an eighth of the frames, 1/32 of the rows and columns, 1,024 wide."""
        x = _max_pool(self.conv3d_1a_7x7(x), (1, 3), (1, 2))
        x = self.conv3d_2c_3x3(self.conv3d_2b_1x1(x))
        for name in _MIXED:
            if name in _POOLS:
                x = _max_pool(x, *_POOLS[name])
            x = getattr(self, name)(x)
        return x
