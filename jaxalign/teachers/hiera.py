"""SAM2.1's image encoder as a frozen teacher: a Hiera trunk of four stages and the FPN neck on top of it.

Source: facebookresearch/sam2, sam2/modeling/backbones/{hieradet,image_encoder,utils}.py, sam2/configs/sam2.1/*.yaml.
Attributes bear upstream's names without the prefix `image_encoder.`; the MLP is the ViTs' (fc1, fc2). Upstream's file
holds all of SAM2 under 'model'; what is not the image encoder is passed over.

Blocks attend within windows, a few to the whole frame. The first block of every later stage doubles the width and
takes the maximum of its queries over 2x2 tokens. Consecutive blocks of equal shapes and windows are one stack, named
after its first block: `trunk.blocks.6` holds upstream's blocks 6 to 11 in B+.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxalign.interop.rules import Ignored, Rename, Stack, Transpose
from jaxalign.models import attention as attention_lib
from jaxalign.models import frames, layers
from jaxalign.teachers import vit
from jaxalign.teachers.resize import resize

PRESETS: dict[str, dict[str, Any]] = {
    "sam21_hiera_t": dict(width=96, num_heads=1, stages=(1, 2, 7, 2), global_blocks=(5, 7, 9), background=7),
    "sam21_hiera_s": dict(width=96, num_heads=1, stages=(1, 2, 11, 2), global_blocks=(7, 10, 13), background=7),
    "sam21_hiera_bplus": dict(width=112, num_heads=2, stages=(2, 3, 16, 3), global_blocks=(12, 16, 20), background=14),
    "sam21_hiera_l": dict(
        width=144, num_heads=2, stages=(2, 6, 36, 4), global_blocks=(23, 33, 43), background=7, windows=(8, 4, 16, 8)
    ),
}

_MAX_BLOCKS = 64  # L has 48
RULES = (
    # A stack bears the number of its first block, which depends on the preset; rules for the others match nothing. The
    # prefix is put on here so that they do not match what one of them made.
    *(Stack(rf"trunk\.blocks\.{n}", name="image_encoder.trunk.blocks", start=n) for n in range(_MAX_BLOCKS)),
    Rename(r"\.mlp\.fc1\.", ".mlp.layers.0."),
    Rename(r"\.mlp\.fc2\.", ".mlp.layers.1."),
    Rename(r"^(?!image_encoder\.)", "image_encoder."),
    Transpose(r"image_encoder\.trunk\.pos_embed(_window)?", (0, 3, 1, 2)),
    # The rest of SAM2: memory, prompts, masks and object pointers.
    Ignored(
        r"(memory_attention|memory_encoder|sam_prompt_encoder|sam_mask_decoder|obj_ptr_proj|obj_ptr_tpos_proj"
        r"|mask_downsample)\..*"
    ),
    Ignored(r"maskmem_tpos_enc|no_mem_embed|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial"),
)

PATCH_STRIDE, POOL = 4, 2


@dataclasses.dataclass(frozen=True)
class HieraConfig:
    """Settings of the teacher; the defaults of the network are B+'s. Raises ValueError for what does not fit."""

    # Frames are resized to it, an int to a square; None: they are as they are. Multiples of 32 (`unit`).
    size: int | Sequence[int] | None = 1024
    level: int = 2  # 0, 1, 2, 3: the tokens' stride is 4, 8, 16, 32
    output: str = "fpn"  # 'fpn': the neck's map, 256 channels at every level; 'trunk': the stage's output
    # About so many frames, those of all clips together, go through the network in one step, which bounds the memory.
    # None: as many as have 2^20 pixels (one of 1024x1024) on CPU, 2^24 elsewhere.
    frames_at_once: int | None = None
    remat: bool = False  # keep only every block's input for a gradient with respect to the video
    attention: str = "auto"
    # the network
    width: int = 112  # of the first stage; every further one has twice the last one's
    num_heads: int = 2  # likewise
    stages: tuple[int, ...] = (2, 3, 16, 3)  # blocks
    global_blocks: tuple[int, ...] = (12, 16, 20)  # those that attend to the whole frame
    windows: tuple[int, ...] = (8, 4, 14, 7)  # one side in tokens, for each stage
    background: int = 14  # side of the position table that is resized to the frame
    fpn_width: int = 256
    top_down: tuple[int, ...] = (2, 3)  # levels to which the next coarser one is added

    def __post_init__(self):
        if len(self.windows) != len(self.stages):
            raise ValueError(f"hiera: windows {self.windows} must be one for each of the {len(self.stages)} stages")
        if not 0 <= self.level < len(self.stages):
            raise ValueError(f"hiera: level must be 0 to {len(self.stages) - 1} (stride 4 to {self.strides[-1]})")
        if self.output not in ("fpn", "trunk"):
            raise ValueError(f"hiera: output {self.output!r} is not known; write 'fpn' or 'trunk'")
        if self.frames_at_once is not None and self.frames_at_once < 1:
            raise ValueError(f"hiera: frames_at_once must be at least 1, not {self.frames_at_once}")
        if self.size is not None:
            size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
            object.__setattr__(self, "size", size)
            self.sides(size)
        attention_lib.check_implementation(self.attention)
        for run in runs(self):
            if run.pools and (run.window == 0 or run.window % POOL):
                raise ValueError(
                    f"hiera: block {run.start} pools its queries inside windows: their side must be even, and it "
                    "must not be one of global_blocks"
                )

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from token to token, for each level."""
        return tuple(PATCH_STRIDE * POOL**level for level in range(len(self.stages)))

    @property
    def unit(self) -> int:
        """Sides must be multiples of this, so that pooling comes out even and the window positions can be tiled."""
        return math.lcm(self.strides[-1], PATCH_STRIDE * self.windows[0])

    def sides(self, frame: Sequence[int]) -> tuple[int, int]:
        """(height, width) that the network sees of a frame; ValueError unless they are multiples of `unit`."""
        height, width = self.size or frame
        if height % self.unit or width % self.unit or min(height, width) < self.unit:
            near = tuple(max(1, round(side / self.unit)) * self.unit for side in (height, width))
            raise ValueError(
                f"hiera: frames of {height}x{width} are no multiples of {self.unit}; set size={near} or another that is"
            )
        return height, width


class Run(NamedTuple):
    """Consecutive blocks of equal shapes and windows."""

    start: int  # the first one's number
    count: int
    stage: int
    inputs: int
    outputs: int
    num_heads: int
    window: int  # 0: the whole frame

    @property
    def pools(self) -> bool:
        """Whether this is the block that leads into a new stage."""
        return self.inputs != self.outputs


def runs(config: HieraConfig) -> list[Run]:
    """The trunk's blocks, grouped. Source: hieradet.py, Hiera.__init__."""
    blocks = []
    for stage, depth in enumerate(config.stages):
        for i in range(depth):
            before = stage - 1 if stage and i == 0 else stage  # a leading block has the windows of the stage before
            window = 0 if len(blocks) in config.global_blocks else config.windows[before]
            widths = (config.width * 2**before, config.width * 2**stage)
            blocks.append((stage, *widths, config.num_heads * 2**stage, window))
    found, start = [], 0
    for block, equal in itertools.groupby(blocks):
        count = len(list(equal))
        found.append(Run(start, count, *block))
        start += count
    return found


# ---- the trunk ----------------------------------------------------------------------------------------------------


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Maximum over 2x2 tokens; both sides even."""
    n, h, w, c = x.shape
    return x.reshape(n, h // POOL, POOL, w // POOL, POOL, c).max((2, 4))


def partition(x: Float[Array, "n h w c"], window: int) -> Float[Array, "m window window c"]:
    """Windows of all frames, row by row; zeros are put in at the right and below (utils.py, window_partition)."""
    n, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % window), (0, -w % window), (0, 0)))
    x = x.reshape(n, x.shape[1] // window, window, x.shape[2] // window, window, c)
    return x.swapaxes(2, 3).reshape(-1, window, window, c)


def unpartition(x: Float[Array, "m window window c"], h: int, w: int) -> Float[Array, "n {h} {w} c"]:
    """Frames of h x w tokens from their windows, without what was put in (utils.py, window_unpartition)."""
    window, c = x.shape[2:]
    rows, columns = -(-h // window), -(-w // window)
    x = x.reshape(-1, rows, columns, window, window, c).swapaxes(2, 3)
    return x.reshape(-1, rows * window, columns * window, c)[:, :h, :w]


class Attention(nnx.Module):
    """Attention inside windows, queries pooled where the stage begins (hieradet.py, MultiScaleAttention)."""

    def __init__(self, run: Run, implementation: str, *, rngs: nnx.Rngs):
        self.window, self.pools, self.num_heads = run.window, run.pools, run.num_heads
        self.implementation = implementation
        self.qkv = layers.Linear(run.inputs, 3 * run.outputs, kernel_init=vit.trunc_normal, rngs=rngs)
        self.proj = layers.Linear(run.outputs, run.outputs, kernel_init=vit.trunc_normal, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        _, h, w, _ = x.shape
        # Tokens put in to fill the last windows are zeros here, not behind qkv, and upstream attends to them.
        x = partition(x, self.window) if self.window else x
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        if self.pools:
            q, h, w = max_pool(q), h // POOL, w // POOL
        m, shape, head = q.shape[0], q.shape, q.shape[-1] // self.num_heads
        q, k, v = (y.reshape(m, -1, self.num_heads, head) for y in (q, k, v))
        x = attention_lib.attention(q, k, v, implementation=self.implementation).reshape(shape)
        return self.proj(unpartition(x, h, w) if self.window else x)


class Block(nnx.Module):
    """shortcut + attn(norm1(x)), then x + mlp(norm2(x)) (hieradet.py, MultiScaleBlock)."""

    def __init__(self, run: Run, implementation: str, *, rngs: nnx.Rngs):
        mlp = vit.ViTConfig(width=run.outputs, depth=run.count, num_heads=run.num_heads, hidden=4 * run.outputs)
        self.norm1 = layers.LayerNorm(run.inputs)
        self.attn = Attention(run, implementation, rngs=rngs)
        self.norm2 = layers.LayerNorm(run.outputs)
        self.mlp = vit.Mlp(mlp, rngs=rngs)
        if run.pools:
            self.proj = layers.Linear(run.inputs, run.outputs, kernel_init=vit.trunc_normal, rngs=rngs)
        self.pools = run.pools

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        normed = self.norm1(x)
        x = (max_pool(self.proj(normed)) if self.pools else x) + self.attn(normed)
        n, h, w, d = x.shape
        return x + self.mlp(self.norm2(x).reshape(n, h * w, d)).reshape(n, h, w, d)


class Trunk(nnx.Module):
    """Frames [n, h, w, 3] -> the outputs of the stages (hieradet.py, Hiera)."""

    def __init__(self, config: HieraConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = nnx.Module()
        self.patch_embed.proj = nnx.Conv(3, config.width, (7, 7), strides=PATCH_STRIDE, padding=3, rngs=rngs)
        sides = {"pos_embed": config.background, "pos_embed_window": config.windows[0]}
        for name, side in sides.items():
            setattr(self, name, nnx.Param(vit.trunc_normal(rngs.params(), (1, side, side, config.width))))
        self.blocks = nnx.Module()
        for run in runs(config):
            stack = jax.vmap(lambda key, run=run: Block(run, config.attention, rngs=nnx.Rngs(key)))
            setattr(self.blocks, str(run.start), stack(jax.random.split(rngs.params(), run.count)))

    def __call__(self, x: Float[Array, "n h w 3"]) -> list[Float[Array, "n _h _w _d"]]:
        x = self.patch_embed.proj(x)
        x = x + self.positions(*x.shape[1:3])

        def step(x, block):
            return block(x), None

        if self.config.remat:
            step = jax.checkpoint(step, prevent_cse=False)
        outputs = {}
        for run in runs(self.config):
            stack = getattr(self.blocks, str(run.start))
            if run.pools:  # another shape comes out than goes in; a leading block is alone in its run
                x, _ = step(x, jax.tree.map(lambda leaf: leaf[0], stack))
            else:
                x, _ = lax.scan(step, x, stack)
            outputs[run.stage] = x
        return list(outputs.values())

    def positions(self, rows: int, columns: int) -> Float[Array, "1 {rows} {columns} d"]:
        """A table resized to the frame (bicubic) plus one that repeats in every window (Bolya et al. 2023)."""
        window = self.pos_embed_window[...]
        tiles = (1, rows // window.shape[1], columns // window.shape[2], 1)
        return resize(self.pos_embed[...], (rows, columns), method="cubic") + jnp.tile(window, tiles)


class Neck(nnx.Module):
    """Stage outputs -> maps of one width, the coarser added to the finer where asked (image_encoder.py, FpnNeck)."""

    def __init__(self, config: HieraConfig, *, rngs: nnx.Rngs):
        self.top_down = config.top_down
        self.convs = nnx.Module()
        for i in range(len(config.stages)):  # upstream counts them from the coarsest
            lateral = nnx.Module()
            lateral.conv = nnx.Conv(
                config.width * 2 ** (len(config.stages) - 1 - i), config.fpn_width, (1, 1), rngs=rngs
            )
            setattr(self.convs, str(i), lateral)

    def __call__(self, stages: list[Float[Array, "n _h _w _d"]]) -> list[Float[Array, "n _h _w d"]]:
        coarsest = len(stages) - 1
        maps: list[Any] = [None] * len(stages)
        for level in range(coarsest, -1, -1):
            maps[level] = getattr(self.convs, str(coarsest - level)).conv(stages[level])
            if level in self.top_down and level < coarsest:
                maps[level] = maps[level] + maps[level + 1].repeat(2, axis=1).repeat(2, axis=2)  # nearest
        return maps


# ---- the teacher --------------------------------------------------------------------------------------------------


class Hiera(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> tokens [b, t, height/stride, width/stride, width], frame by frame."""

    def __init__(self, config: HieraConfig = HieraConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.trunk = Trunk(config, rngs=rngs)
        self.neck = Neck(config, rngs=rngs)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.config.fpn_width if self.config.output == "fpn" else self.config.width * 2**self.config.level

    def grid(self, video: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens of a video of (frames, height, width); raises as the call does."""
        stride = self.config.strides[self.config.level]
        height, width = self.config.sides(video[1:])
        return video[0], height // stride, width // stride

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h2 w2 d"]:
        """Tokens of `config.level`, from the neck or as the trunk leaves them, in the dtype of the weights.

        Raises ValueError for frames that do not fit (size=None).
        """
        config = self.config
        pixels = 2**20 if jax.default_backend() == "cpu" else 2**24
        at_once = config.frames_at_once or pixels // math.prod(config.sides(video.shape[2:4]))
        levels = self.pyramid if config.output == "fpn" else self.stages
        return frames.over_frames(lambda x: levels(x)[config.level], video, at_once)

    def pyramid(self, x: Float[Array, "n h w 3"]) -> list[Float[Array, "n _h _w d"]]:
        """The neck's maps of frames in [-1, 1] at strides 4, 8, 16, 32, all frames in one step.

        SAM2 itself drops the last (`scalp: 1`). Raises as the call does.
        """
        return self.neck(self.stages(x))

    def stages(self, x: Float[Array, "n h w 3"]) -> list[Float[Array, "n _h _w _d"]]:
        """What the trunk's stages give for frames in [-1, 1], at strides 4, 8, 16, 32; raises as the call does."""
        # Resized as in upstream's image predictor: bilinear, antialiased.
        x = resize(x.astype(jnp.float32), self.config.sides(x.shape[1:3]), method="linear", antialias=True)
        return self.trunk(frames.normalised(x).astype(self.trunk.patch_embed.proj.kernel.dtype))
