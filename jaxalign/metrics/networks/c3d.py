"""C3D on Sports-1M, fine-tuned on UCF-101: its 101 probabilities make the Inception Score of videos.

Network: Tran et al. 2015 (arXiv 1412.0767), eight 3 x 3 x 3 convolutions, five pools, three linear layers. The score's
way of the pixels is TGANv2's (pfnet-research/tgan2, tgan2/models/c3d/c3d_ucf101.py), of which StyleGAN-V's
c3d_ucf101.pt is a translation: RGB in [-1, 1] -> BGR times 128, bilinear with aligned corners to 112 x 112, minus the
training set's mean video (of 128 x 171, its rows and columns 8 to 119), plus 128. Attribute names are that file's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.interop.rules import Rename
from jaxalign.metrics.networks.resize import corners

FRAMES, SIZE, MEAN_SHAPE, OFFSET = 16, 112, (3, 16, 128, 171), 8
# (layer, its width as a multiple of the first one's), pool behind it in time and space or None
_LAYERS = (
    ("conv1a", 1, (1, 2)),
    ("conv2a", 2, (2, 2)),
    ("conv3a", 4, None),
    ("conv3b", 4, (2, 2)),
    ("conv4a", 8, None),
    ("conv4b", 8, (2, 2)),
    ("conv5a", 8, None),
    ("conv5b", 8, (2, 2)),
)

RULES = (Rename(r"^(\w+)\.weight$", r"\1/W"), Rename(r"^(\w+)\.bias$", r"\1/b"))  # Chainer's names
PRESETS = {"c3d": {}}


@dataclasses.dataclass(frozen=True)
class C3DConfig:
    """Settings of the network; published files have these."""

    width: int = 64
    hidden: int = 4096
    num_classes: int = 101


class C3D(nnx.Module):
    """video [b, 16, h, w, 3] in [-1, 1] -> logits [b, 101]."""

    def __init__(self, config: C3DConfig = C3DConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.mean = nnx.Param(jnp.zeros(MEAN_SHAPE))  # of BGR in 0..255
        inputs = 3
        for name, multiple, _ in _LAYERS:
            outputs = config.width * multiple
            setattr(self, name, nnx.Conv(inputs, outputs, (3, 3, 3), rngs=rngs))
            inputs = outputs
        self.fc6 = nnx.Linear(inputs * 4 * 4, config.hidden, rngs=rngs)
        self.fc7 = nnx.Linear(config.hidden, config.hidden, rngs=rngs)
        self.fc8 = nnx.Linear(config.hidden, config.num_classes, rngs=rngs)

    @property
    def width(self) -> int:
        """How many logits a video has."""
        return self.config.num_classes

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b d"]:
        """The logits, in fp32; `jax.nn.softmax` of them are the probabilities. Raises ValueError unless t is 16."""
        if video.shape[1] != FRAMES:
            raise ValueError(f"c3d: a clip has {FRAMES} frames, this one {video.shape[1]}")
        rows = slice(OFFSET, OFFSET + SIZE)
        mean = jnp.moveaxis(self.mean[...].astype(jnp.float32)[:, :, rows, rows], 0, -1)
        x = corners(video[..., ::-1].astype(jnp.float32) * 128, SIZE) + (128 - mean)
        x = x.astype(self.fc6.kernel.dtype)
        for name, _, pool in _LAYERS:
            x = jax.nn.relu(getattr(self, name)(x))
            if pool is not None:  # what is odd is filled up at the end: Chainer's cover_all
                window = (pool[0], pool[1], pool[1])
                x = nnx.max_pool(x, window, strides=window, padding="SAME")
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)  # fc6 counts channels first
        x = jax.nn.relu(self.fc7(jax.nn.relu(self.fc6(x))))
        return self.fc8(x).astype(jnp.float32)
