"""V-JEPA 2 as a frozen teacher: a clip becomes tokens, two frames deep and one patch wide.

Network: facebookresearch/vjepa2 src/models/vision_transformer.py with use_rope=True (src/models/utils/modules.py,
RoPEAttention): pre-norm ViT on tubelets whose queries and keys are rotated by frame, row and column, so that it takes
clips of any size. The way in is the one of aHapBean/VideoREPA for all its video teachers, videomae.prepared, without
the final norm; upstream's own evaluation resizes to 256x256 and norms (`size=(256, 256), norm=True`).

Layouts of the weights, whose tables of names are in RULES:
    upstream      vitl.pt: names below `module.backbone.`; the trained encoder is under the key 'encoder', which
                  torch.hub takes, its moving average under 'target_encoder'
    plain         the same without that prefix
    transformers  VJEPA2Model (facebook/vjepa2-vitl-fpc64-256); the predictor is left out
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.interop.rules import Ignored, Rename, Rule, Split, Stack
from jaxalign.models import layers as shared
from jaxalign.teachers import vit
from jaxalign.teachers.videomae import TUBELET, checked_size, kept_frames, prepared

PRESETS: dict[str, dict[str, Any]] = {
    "vjepa2_l": dict(width=1024, depth=24, num_heads=16, hidden=4096),  # vitl.pt
}

# ---- names --------------------------------------------------------------------------------------------------------

_BLOCKS = Stack(r"blocks")
# A network that is built for a position table has one in its file although rotation is what counts; torch.hub drops it.
_TABLE = Ignored(r"(module\.backbone\.)?pos_embed")

RULES: dict[str, tuple[Rule, ...]] = {
    "upstream": (_BLOCKS, Rename(r"^", "module.backbone."), _TABLE),
    "plain": (_BLOCKS, _TABLE),
    "transformers": (
        _BLOCKS,
        Rename(r"^patch_embed\.", "encoder.embeddings.patch_embeddings."),
        Rename(r"^norm\.", "encoder.layernorm."),
        Rename(r"^blocks\.", "encoder.layer."),
        Split(r"(.*)\.attn\.qkv\.(.*)", tuple(rf"\1.attention.{name}.\2" for name in ("query", "key", "value"))),
        Rename(r"\.attn\.proj\.", ".attention.proj."),
        Ignored(r"predictor\..*"),
    ),
}


# ---- settings -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VJEPA2Config:
    """Settings; the first ones come from PRESETS. Raises ValueError for what does not fit together."""

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    hidden: int = 4096
    patch_size: int = 16

    size: int | Sequence[int] = (160, 240)  # frames are resized to it, an int to a square
    resize: str = "bicubic"  # or 'bilinear'; without antialiasing
    drop_first: bool | None = None  # frame 0 is left out, which causal codecs encode alone; None: where frames are odd
    layers: int | Sequence[int] | None = None  # 0-based blocks whose tokens are wanted; several: channels side by side
    norm: bool = False  # whether the final norm is applied to the tokens
    remat: bool = False
    attention: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "size", checked_size(self.size, self.patch_size, self.resize))
        object.__setattr__(self, "layers", vit.checked_layers(self.layers, self.trunk.depth))
        if (channels := self.width // self.num_heads) < 6 or channels % 2:
            raise ValueError(f"vjepa2: heads of {channels} channels have no pairs to turn on three axes")

    @property
    def trunk(self) -> vit.ViTConfig:
        """Settings of the blocks."""
        names = ("width", "depth", "num_heads", "hidden", "remat", "attention")
        return vit.ViTConfig(**{name: getattr(self, name) for name in names})


# ---- rotation -----------------------------------------------------------------------------------------------------


def rotary_table(head_dim: int, grid: tuple[int, int, int]) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Cosines and sines for every token of the grid (frames, rows, columns) in raster order, fp32.

    A third of the channels turns with the frame, the next with the row, the next with the column, each with an even
    number of channels; what is left over stays. The frequencies are [f0, f1, ..., f0, f1, ...] although channels turn
    in neighbouring pairs: upstream says that this is a slip which the trained weights rely on. Source:
    facebookresearch/vjepa2 src/models/utils/modules.py, RoPEAttention, rotate_queries_or_keys.
    """
    turned = 2 * (head_dim // 3 // 2)
    frequencies = 10000.0 ** (-np.arange(turned // 2) / (turned / 2))
    angles = []
    for axis, length in enumerate(grid):
        of_axis = np.arange(length)[:, None] * np.tile(frequencies, 2)
        shape = [1, 1, 1, turned]
        shape[axis] = length
        angles.append(of_axis.reshape(shape))

    def table(function, rest):
        parts = [jnp.broadcast_to(function(a).astype(np.float32), (*grid, turned)) for a in angles]
        parts.append(jnp.full((*grid, head_dim - 3 * turned), rest, jnp.float32))
        return jnp.concatenate(parts, axis=-1).reshape(-1, head_dim)

    return table(np.cos, 1.0), table(np.sin, 0.0)


def rotated(
    x: Float[Array, "b n heads d"], cos: Float[Array, "n d"], sin: Float[Array, "n d"]
) -> Float[Array, "b n heads d"]:
    """x · cos + x' · sin with x' = (-x1, x0, -x3, x2, ...); computed in fp32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    turned = jnp.stack([-x32[..., 1::2], x32[..., ::2]], axis=-1).reshape(x.shape)
    return (x32 * cos[:, None] + turned * sin[:, None]).astype(x.dtype)


# ---- the network --------------------------------------------------------------------------------------------------


class VJEPA2(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> tokens [b, t/2, size/patch, size/patch, width]."""

    def __init__(self, config: VJEPA2Config = VJEPA2Config(), *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = vit.TubeletEmbed(TUBELET, config.patch_size, config.width, rngs=rngs)
        self.blocks = vit.stacked(config.trunk, rngs.params())
        self.norm = shared.LayerNorm(config.width, config.trunk.eps)

    @property
    def width(self) -> int:
        """Channels of a token: those of all `layers` together."""
        return self.config.width * len(self.config.layers)

    def grid(self, video: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens of a video of (frames, height, width). Raises ValueError as a call."""
        config = self.config
        _, count = kept_frames(video[0], config.drop_first)
        return count // TUBELET, config.size[0] // config.patch_size, config.size[1] // config.patch_size

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 d"]:
        """Tokens of the blocks in `config.layers`. Raises ValueError for a number of frames that does not fit."""
        config = self.config
        x = prepared(video, config.size, method=config.resize, drop_first=config.drop_first)
        x = self.patch_embed(x)
        shape = x.shape
        cos, sin = rotary_table(config.width // config.num_heads, shape[1:4])
        found = vit.run(
            self.blocks,
            x.reshape(shape[0], -1, shape[-1]),
            config.layers,
            rotary=lambda q, k: (rotated(q, cos, sin), rotated(k, cos, sin)),
        )
        found = [self.norm(tokens) if config.norm else tokens for tokens in found]
        return jnp.concatenate(found, axis=-1).reshape(*shape[:-1], -1)
