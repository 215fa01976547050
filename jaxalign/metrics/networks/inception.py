"""Inception-v3 of the original FID: 2,048 features of an image, and the 1,008 logits of the image Inception Score.

Network: Szegedy et al. 2015 (arXiv 1512.00567) as TensorFlow published it on 2015-12-05, which torchvision's differs
from in three places: average pools do not count their padding, the last block's pool takes the maximum, and images are
resized as TensorFlow 1 did. Attribute names are those of torchvision, pytorch-fid and torch-fidelity, whose two files
hold the same state dict. The pixels' way is torch-fidelity's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.interop.rules import BATCH_NORM_COUNTS
from jaxalign.metrics.networks.resize import tensorflow1
from jaxalign.teachers.efficientnet import BatchNorm

SIZE, WIDTH, CLASSES = 299, 2048, 1008
EPS = 1e-3

RULES = (BATCH_NORM_COUNTS,)
PRESETS = {"inception": {}}


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """The network has no settings."""


class Conv(nnx.Module):
    """Convolution, BatchNorm, ReLU. Without stride inside a block the size stays; with stride there is no padding."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], rngs: nnx.Rngs, stride=1, padding=None):
        padding = padding or ("SAME" if stride == 1 else "VALID")
        self.conv = nnx.Conv(inputs, outputs, kernel, strides=stride, padding=padding, use_bias=False, rngs=rngs)
        self.bn = BatchNorm(outputs, EPS)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return jax.nn.relu(self.bn(self.conv(x)))


class Block(nnx.Module):
    """Convolutions by upstream's names, given as (name, inputs, outputs, kernel[, stride])."""

    def __init__(self, rngs: nnx.Rngs, *convolutions: tuple):
        for name, inputs, outputs, kernel, *stride in convolutions:
            kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
            setattr(self, name, Conv(inputs, outputs, kernel, rngs, *stride))

    def chain(self, x: Array, *names: str) -> Array:
        """x through the convolutions of these names, one behind the other."""
        for name in names:
            x = getattr(self, name)(x)
        return x


def _average(x: Array) -> Array:
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def _maximum(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def _halve(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


class A(Block):
    """35 x 35: two 3 x 3 or one 5 x 5 behind a 1 x 1."""

    def __init__(self, inputs: int, pool: int, rngs: nnx.Rngs):
        super().__init__(
            rngs,
            ("branch1x1", inputs, 64, 1),
            *(("branch5x5_1", inputs, 48, 1), ("branch5x5_2", 48, 64, 5)),
            *(("branch3x3dbl_1", inputs, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3)),
            ("branch_pool", inputs, pool, 1),
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        parts = [
            self.branch1x1(x),
            self.chain(x, "branch5x5_1", "branch5x5_2"),
            self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            self.branch_pool(_average(x)),
        ]
        return jnp.concatenate(parts, -1)


class B(Block):
    """35 x 35 -> 17 x 17."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        super().__init__(
            rngs,
            ("branch3x3", inputs, 384, 3, 2),
            *(("branch3x3dbl_1", inputs, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3, 2)),
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return jnp.concatenate([self.branch3x3(x), double, _halve(x)], -1)


class C(Block):
    """17 x 17: a 7 x 7 as 1 x 7 and 7 x 1, once and twice."""

    def __init__(self, inputs: int, c: int, rngs: nnx.Rngs):
        row, column = (1, 7), (7, 1)
        super().__init__(
            rngs,
            ("branch1x1", inputs, 192, 1),
            *(("branch7x7_1", inputs, c, 1), ("branch7x7_2", c, c, row), ("branch7x7_3", c, 192, column)),
            *(("branch7x7dbl_1", inputs, c, 1), ("branch7x7dbl_2", c, c, column), ("branch7x7dbl_3", c, c, row)),
            *(("branch7x7dbl_4", c, c, column), ("branch7x7dbl_5", c, 192, row)),
            ("branch_pool", inputs, 192, 1),
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        parts = [
            self.branch1x1(x),
            self.chain(x, *(f"branch7x7_{i}" for i in (1, 2, 3))),
            self.chain(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            self.branch_pool(_average(x)),
        ]
        return jnp.concatenate(parts, -1)


class D(Block):
    """17 x 17 -> 8 x 8."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        super().__init__(
            rngs,
            *(("branch3x3_1", inputs, 192, 1), ("branch3x3_2", 192, 320, 3, 2)),
            *(("branch7x7x3_1", inputs, 192, 1), ("branch7x7x3_2", 192, 192, (1, 7))),
            *(("branch7x7x3_3", 192, 192, (7, 1)), ("branch7x7x3_4", 192, 192, 3, 2)),
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        seven = self.chain(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
        return jnp.concatenate([self.chain(x, "branch3x3_1", "branch3x3_2"), seven, _halve(x)], -1)


class E(Block):
    """8 x 8: a 3 x 3 as 1 x 3 beside 3 x 1. `maximum` is how the last block pools."""

    def __init__(self, inputs: int, maximum: bool, rngs: nnx.Rngs):
        row, column = (1, 3), (3, 1)
        super().__init__(
            rngs,
            ("branch1x1", inputs, 320, 1),
            *(("branch3x3_1", inputs, 384, 1), ("branch3x3_2a", 384, 384, row), ("branch3x3_2b", 384, 384, column)),
            *(("branch3x3dbl_1", inputs, 448, 1), ("branch3x3dbl_2", 448, 384, 3)),
            *(("branch3x3dbl_3a", 384, 384, row), ("branch3x3dbl_3b", 384, 384, column)),
            ("branch_pool", inputs, 192, 1),
        )
        self.maximum = maximum

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        single, double = self.branch3x3_1(x), self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = _maximum(x) if self.maximum else _average(x)
        parts = [
            self.branch1x1(x),
            *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(pooled),
        ]
        return jnp.concatenate(parts, -1)


class Inception(nnx.Module):
    """images [b, h, w, 3] in [-1, 1] -> features [b, 2048], the mean of the last block's 8 x 8 ('pool3')."""

    def __init__(self, config: InceptionConfig = InceptionConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), rngs, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), rngs, padding="VALID")
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3), rngs)
        self.Conv2d_3b_1x1 = Conv(64, 80, (1, 1), rngs)
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), rngs, padding="VALID")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32, rngs), A(256, 64, rngs), A(288, 64, rngs)
        self.Mixed_6a = B(288, rngs)
        self.Mixed_6b, self.Mixed_6c = C(768, 128, rngs), C(768, 160, rngs)
        self.Mixed_6d, self.Mixed_6e = C(768, 160, rngs), C(768, 192, rngs)
        self.Mixed_7a = D(768, rngs)
        self.Mixed_7b, self.Mixed_7c = E(1280, False, rngs), E(2048, True, rngs)
        self.fc = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    @property
    def width(self) -> int:
        """How many features an image has."""
        return WIDTH

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """The features, in fp32.

        Source: torch-fidelity's feature '2048'; it sees whole numbers 0..255, so quantise what was generated.
        """
        x = (tensorflow1((images.astype(jnp.float32) + 1) * 127.5, SIZE) - 128) / 128
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x.astype(self.fc.kernel.dtype)))
        x = _halve(self.Conv2d_2b_3x3(x))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x.astype(jnp.float32).mean((1, 2))

    def logits(self, images: Float[Array, "b h w 3"], *, biased: bool = True) -> Float[Array, "b 1008"]:
        """Class scores; without bias they are what torch-fidelity's Inception Score of images takes."""
        return self.classify(self(images), biased=biased)

    def classify(self, features: Float[Array, "b 2048"], *, biased: bool = True) -> Float[Array, "b 1008"]:
        """Class scores of features that are there already: one pass for FID and Inception Score."""
        x = features @ self.fc.kernel[...].astype(jnp.float32)
        return x + self.fc.bias[...].astype(jnp.float32) if biased else x
