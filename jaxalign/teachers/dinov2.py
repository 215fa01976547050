"""DINOv2 as a frozen teacher: every frame becomes a grid of tokens, 14x14 pixels each.

Network and names: facebookresearch/dinov2, dinov2/models/vision_transformer.py, whose own files (`RULES`, `PRESETS`)
are read. Position tables are trained at 518/14 = 37 x 37 and resampled bicubically (a = -0.75). How, is part of each
published variant (dinov2/hub/backbones.py):

  dinov2_vit{s,b,l,g}14       no antialiasing; the step between samples is 37 / (n + 0.1), interpolate_offset=0.1
  dinov2_vit{s,b,l,g}14_reg   antialiasing; the step is 37 / n

(transformers' Dinov2Model leaves the offset out: away from 518 pixels its tokens differ a little from upstream's.)
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.interop.rules import Rule, Stack
from jaxalign.models import frames
from jaxalign.models import layers as shared
from jaxalign.teachers import vit
from jaxalign.teachers.resize import resize

RULES: tuple[Rule, ...] = (Stack(r"blocks"),)

# Settings of each published variant; upstream's file is dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth.
_SIZES = {
    "s": dict(width=384, depth=12, num_heads=6),
    "b": dict(width=768, depth=12, num_heads=12),
    "l": dict(width=1024, depth=24, num_heads=16),
    "g": dict(width=1536, depth=40, num_heads=24, mlp="swiglu"),
}
_REGISTERS = dict(registers=4, position_antialias=True, position_offset=0.0)
PRESETS = {f"dinov2_{name}": size for name, size in _SIZES.items()}
PRESETS |= {f"dinov2_{name}_reg": size | _REGISTERS for name, size in _SIZES.items()}


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """Settings of the teacher; the first ones come from PRESETS. Raises ValueError for what does not fit."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp: str = "gelu"  # 'swiglu' for g
    registers: int = 0
    position_antialias: bool = False
    position_offset: float = 0.1
    position_grid: int = 37  # the grid that the position table was trained on, square
    patch_size: int = 14

    size: int | Sequence[int] | None = 224  # frames are resized to it, an int to a square; None: they stay as they are
    antialias: bool = False  # of that (bicubic) resize
    layers: int | Sequence[int] | None = None  # 0-based blocks whose tokens are concatenated; None: the last block
    norm: bool = True  # patch tokens behind the final LayerNorm (x_norm_patchtokens), or raw
    # About so many frames, those of all clips together, go through the network in one step, which bounds the memory.
    frames_at_once: int | None = None  # None: as many as keep the device busy
    remat: bool = False
    attention: str = "auto"

    def __post_init__(self):
        if self.size is not None:
            size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
            object.__setattr__(self, "size", size)
            self.patches(*size)
        object.__setattr__(self, "layers", vit.checked_layers(self.layers, self.trunk.depth))
        if self.frames_at_once is not None and self.frames_at_once < 1:
            raise ValueError(f"dinov2: frames_at_once must be at least 1, not {self.frames_at_once}")

    @property
    def trunk(self) -> vit.ViTConfig:
        """The settings of the blocks."""
        hidden = 4 * self.width
        if self.mlp == "swiglu":  # upstream's SwiGLUFFNFused: two thirds, as a multiple of 8
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        return vit.ViTConfig(
            width=self.width,
            depth=self.depth,
            num_heads=self.num_heads,
            hidden=hidden,
            mlp=self.mlp,
            layer_scale=True,
            remat=self.remat,
            attention=self.attention,
        )

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of a frame; ValueError unless the patch size divides both sides."""
        p = self.patch_size
        if height % p or width % p or min(height, width) < p:
            near = tuple(max(1, round(side / p)) * p for side in (height, width))
            raise ValueError(
                f"dinov2: frames of {height}x{width} are no multiples of the patch size {p}; "
                f"set size={near} or another that is"
            )
        return height // p, width // p


class DINOv2(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> patch tokens [b, t, rows, columns, width], frame by frame."""

    def __init__(self, config: DINOv2Config = DINOv2Config(), *, rngs: nnx.Rngs):
        width, positions = config.width, config.position_grid**2 + 1
        table, blocks = jax.random.split(rngs.params())
        self.config = config
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.pos_embed = nnx.Param(vit.trunc_normal(table, (1, positions, width)))
        if config.registers:
            self.register_tokens = nnx.Param(jnp.zeros((1, config.registers, width)))
        # Of use in pre-training only; kept so that upstream's file goes out as it came in.
        self.mask_token = nnx.Param(jnp.zeros((1, width)))
        self.patch_embed = shared.PatchEmbed(config.patch_size, 3, width, rngs=rngs)
        self.blocks = vit.stacked(config.trunk, blocks)
        self.norm = shared.LayerNorm(width)

    @property
    def width(self) -> int:
        """Channels of a token: those of all `layers` together."""
        return self.config.width * len(self.config.layers)

    def grid(self, video: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens of a video of (frames, height, width); raises as the call does."""
        time, *size = video
        return time, *self.config.patches(*(self.config.size or size))

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h2 w2 d"]:
        """Patch tokens of the blocks that `config.layers` chooses, in the dtype of the weights.

        Raises ValueError for frames that the patches do not fill (size=None). Source:
        DinoVisionTransformer.get_intermediate_layers.
        """
        config = self.config
        _, rows, columns = self.grid(video.shape[1:4])
        at_once = config.frames_at_once or frames.default_at_once(rows * columns)
        positions = self._positions(rows, columns)
        return frames.over_frames(lambda x: self._tokens(x, positions), video, at_once)

    def _tokens(self, x: Float[Array, "n h w 3"], positions: Float[Array, "1 m d"]) -> Float[Array, "n h2 w2 e"]:
        config = self.config
        x = frames.normalised(x)  # rows of a resize sum to one, so its order does not matter
        x = resize(x, config.size, antialias=config.antialias) if config.size else x
        n, (rows, columns) = x.shape[0], config.patches(*x.shape[1:3])
        x = self.patch_embed(x[:, None])[:, 0]
        first = jnp.broadcast_to(self.cls_token[...], (n, 1, config.width))
        x = jnp.concatenate([first, x], axis=1) + positions.astype(x.dtype)
        if config.registers:  # these have no positions
            registers = jnp.broadcast_to(self.register_tokens[...], (n, config.registers, config.width))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        found = [out[:, 1 + config.registers :] for out in vit.run(self.blocks, x, config.layers)]
        found = [self.norm(out) for out in found] if config.norm else found
        return jnp.concatenate(found, axis=-1).reshape(n, rows, columns, self.width)

    def _positions(self, rows: int, columns: int) -> Float[Array, "1 m d"]:
        """The position table of the class token and a grid of patches (upstream's interpolate_pos_encoding)."""
        config, table, side = self.config, self.pos_embed[...].astype(jnp.float32), self.config.position_grid
        if (rows, columns) == (side, side):
            return table
        grid = resize(
            table[:, 1:].reshape(1, side, side, -1),
            (rows, columns),
            antialias=config.position_antialias,
            scale_factors=[(n + config.position_offset) / side for n in (rows, columns)],
        )
        return jnp.concatenate([table[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)
