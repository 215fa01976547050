"""VideoMAE V2 and VideoMAE as frozen teachers: a clip becomes tokens, two frames deep and one patch wide.

Network: OpenGVLab/VideoMAEv2 models/modeling_finetune.py and MCG-NJU/VideoMAE modeling_finetune.py, which are the same
one: pre-norm ViT on tubelets, biases on q and v alone, fixed sin-cos positions, no class token. The way in and the
positions for other sizes are those of aHapBean/VideoREPA, ssl/VideoMAEv2.py and lora_trainer.py: frame 0 dropped,
ImageNet's mean and standard deviation, bicubic to 160x240, last block, no final norm. `features` is the network's part
in the content-debiased FVD of songweige/content-debiased-fvd.

Weights are published in several layouts, whose tables of names are in RULES:
    finetuned                the network with `fc_norm` and a classifier (vit_b_k710_dl_from_giant.pth)
    pretrained               names below `encoder.`, final norm `norm`, and a decoder (vit_g_hybrid_pt_1200e.pth)
    hub                      names below `model.`, no classifier (model.safetensors of OpenGVLab/VideoMAEv2-Large)
    transformers_pretrained, transformers_finetuned
                             VideoMAEForPreTraining and VideoMAEForVideoClassification (MCG-NJU/videomae-base)
Decoders and classifiers are left out on import, so that any file of a size fits; with `num_classes` the classifier is
a leaf, and the export has every key of a finetuned file.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxalign.interop.rules import Ignored, Rename, Rule, Split, Stack
from jaxalign.models import frames as frames_lib
from jaxalign.models import layers as shared
from jaxalign.models import positions
from jaxalign.teachers import vit
from jaxalign.teachers.resize import resize

TUBELET = 2  # frames of a token
RESIZE_METHODS = {"bicubic": "cubic", "bilinear": "linear"}

_S = dict(width=384, depth=12, num_heads=6, hidden=1536)
_B = dict(width=768, depth=12, num_heads=12, hidden=3072)
_L = dict(width=1024, depth=24, num_heads=16, hidden=4096)
_H = dict(width=1280, depth=32, num_heads=16, hidden=5120)
# Upstream's MLP ratio is 48/11. 140x210 in patches of 14 is the grid that 160x240 is in patches of 16.
_G = dict(width=1408, depth=40, num_heads=16, hidden=6144, patch_size=14, size=(140, 210))

PRESETS: dict[str, dict[str, Any]] = {
    "videomaev2_s": _S,
    "videomaev2_b": _B,
    "videomaev2_l": _L,
    "videomaev2_h": _H,
    "videomaev2_g": _G,
    "videomae_v1_s": _S,
    "videomae_v1_b": _B,
    "videomae_v1_l": _L,
    "videomae_v1_h": _H,
}

# ---- names --------------------------------------------------------------------------------------------------------

_BLOCKS = Stack(r"blocks")
_DECODER = Ignored(r"(decoder|encoder_to_decoder)\..*|mask_token")  # made for pixels, no part of a teacher
_CLASSIFIER = Ignored(r"(head|classifier)\..*")
_TRANSFORMERS = (
    _BLOCKS,
    Rename(r"^patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
    Rename(r"^blocks\.", "videomae.encoder.layer."),
    Split(r"(.*)\.attn\.qkv\.weight", tuple(rf"\1.attention.attention.{n}.weight" for n in ("query", "key", "value"))),
    Rename(r"\.attn\.([qv]_bias)$", r".attention.attention.\1"),
    Rename(r"\.attn\.proj\.", ".attention.output.dense."),
    Rename(r"\.mlp\.fc1\.", ".intermediate.dense."),
    Rename(r"\.mlp\.fc2\.", ".output.dense."),
    Rename(r"\.norm1\.", ".layernorm_before."),
    Rename(r"\.norm2\.", ".layernorm_after."),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "finetuned": (_BLOCKS, _CLASSIFIER),
    "pretrained": (_BLOCKS, Rename(r"^fc_norm\.", "norm."), Rename(r"^", "encoder."), _DECODER),
    "hub": (_BLOCKS, Rename(r"^", "model.")),
    "transformers_pretrained": (*_TRANSFORMERS, Rename(r"^fc_norm\.", "videomae.layernorm."), _DECODER),
    "transformers_finetuned": (*_TRANSFORMERS, Rename(r"^head\.", "classifier."), _CLASSIFIER),
}


# ---- settings -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VideoMAEConfig:
    """Settings; the first ones come from PRESETS. Raises ValueError for what does not fit together."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072
    patch_size: int = 16
    image_size: int = 224  # pixels and frames that the network was trained on: positions for others are resampled
    frames: int = 16
    num_classes: int = 0  # of the file's classifier, where it is to be kept for the export

    size: int | Sequence[int] = (160, 240)  # frames are resized to it, an int to a square
    resize: str = "bicubic"  # or 'bilinear'; without antialiasing
    drop_first: bool | None = None  # frame 0 is left out, which causal codecs encode alone; None: where frames are odd
    layers: int | Sequence[int] | None = None  # 0-based blocks whose tokens are wanted; several: channels side by side
    norm: bool = False  # whether the final norm is applied to the tokens
    remat: bool = False
    attention: str = "auto"

    def __post_init__(self):
        if self.image_size % self.patch_size or self.frames % TUBELET:
            raise ValueError(
                f"videomae: {self.frames} frames of {self.image_size}² are no tubelets of {self.patch_size}²"
            )
        object.__setattr__(self, "size", checked_size(self.size, self.patch_size, self.resize))
        object.__setattr__(self, "layers", vit.checked_layers(self.layers, self.trunk.depth))

    @property
    def trunk(self) -> vit.ViTConfig:
        """Settings of the blocks."""
        names = ("width", "depth", "num_heads", "hidden", "remat", "attention")
        return vit.ViTConfig(qkv_bias="qv", **{name: getattr(self, name) for name in names})

    @property
    def trained_grid(self) -> tuple[int, int, int]:
        """Token frames, rows and columns that the position table was made for."""
        side = self.image_size // self.patch_size
        return self.frames // TUBELET, side, side


# ---- the way in, which V-JEPA 2 shares ----------------------------------------------------------------------------


def checked_size(size: int | Sequence[int], patch_size: int, method: str) -> tuple[int, int]:
    """Rows and columns. Raises ValueError for a size that patches do not tile, or an unknown way to resize to it."""
    if method not in RESIZE_METHODS:
        raise ValueError(f"resize {method!r} is not known; write one of {', '.join(RESIZE_METHODS)}")
    height, width = (size, size) if isinstance(size, int) else size
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        near = tuple(max(1, round(side / patch_size)) * patch_size for side in (height, width))
        raise ValueError(f"size {(height, width)} is no multiple of the patch size {patch_size}; take {near}, for one")
    return height, width


def kept_frames(num_frames: int, drop_first: bool | None) -> tuple[int, int]:
    """First frame that is looked at, and how many from there on. Raises ValueError where they are no tubelets."""
    first = num_frames % TUBELET if drop_first is None else int(drop_first)
    count = num_frames - first
    if count < TUBELET or count % TUBELET:
        dropped = " without the first" if first else ""
        raise ValueError(
            f"a clip of {num_frames} frames{dropped} is no number of tubelets of {TUBELET} frames; "
            f"write drop_first={not first} or take another number of frames"
        )
    return first, count


def prepared(
    video: Float[Array, "b t h w 3"], size: Sequence[int], *, method: str, drop_first: bool | None
) -> Float[Array, "b t2 h2 w2 3"]:
    """RGB in [-1, 1] as the network wants it, fp32: frames dropped, normalised, and only then resized.

    Raises ValueError as `kept_frames`. Source: aHapBean/VideoREPA lora_trainer.py, compute_loss.
    """
    first, _ = kept_frames(video.shape[1], drop_first)
    x = frames_lib.normalised(video[:, first:])
    return resize(x, size, method=RESIZE_METHODS[method])


# ---- positions ----------------------------------------------------------------------------------------------------


def position_table(width: int, length: int) -> Float[np.ndarray, "n width"]:
    """Sine and cosine in turns, of the index of the token in the whole flattened clip (get_sinusoid_encoding_table)."""
    table = positions.sincos_1d(width, np.arange(length))
    return table.reshape(length, 2, width // 2).swapaxes(1, 2).reshape(length, width)


def resampled_positions(
    width: int,
    trained: tuple[int, int, int],
    grid: tuple[int, int, int],
    *,
    time_factor: float | None = None,
) -> Float[Array, "t h w width"]:
    """The table of the grid `trained`, brought to `grid`: bicubic in space, then linear in time.

    `time_factor` is the interpolation's scale in time where that is not the ratio of the lengths. Source:
    aHapBean/VideoREPA ssl/VideoMAEv2.py, interpolate_pos_embed.
    """
    table = position_table(width, int(np.prod(trained))).reshape(*trained, width)
    # Behind a barrier, or XLA would resample while it compiles and keep the result, 100 MB for a large grid.
    table = lax.optimization_barrier(jnp.asarray(table))
    table = resize(table, grid[1:], method="cubic")
    factors = None if time_factor is None else (time_factor,)
    return resize(table, grid[:1], axes=(0,), method="linear", scale_factors=factors)


# ---- the network --------------------------------------------------------------------------------------------------


class VideoMAE(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> tokens [b, t/2, size/patch, size/patch, width]."""

    def __init__(self, config: VideoMAEConfig = VideoMAEConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = vit.TubeletEmbed(TUBELET, config.patch_size, config.width, rngs=rngs)
        self.blocks = vit.stacked(config.trunk, rngs.params())
        self.fc_norm = shared.LayerNorm(config.width, config.trunk.eps)
        if config.num_classes:
            self.head = nnx.Linear(config.width, config.num_classes, kernel_init=vit.trunc_normal, rngs=rngs)

    @property
    def width(self) -> int:
        """Channels of a token: those of all `layers` together."""
        return self.config.width * len(self.config.layers)

    def grid(self, video: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens of a video of (frames, height, width). Raises as `kept_frames`."""
        config = self.config
        _, count = kept_frames(video[0], config.drop_first)
        return count // TUBELET, config.size[0] // config.patch_size, config.size[1] // config.patch_size

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 d"]:
        """Tokens of the blocks in `config.layers`. Raises ValueError for a number of frames that does not fit."""
        config = self.config
        x = prepared(video, config.size, method=config.resize, drop_first=config.drop_first)
        table = resampled_positions(config.width, config.trained_grid, self.grid(video.shape[1:4]))
        found = self._blocks(x, table, config.layers)
        return jnp.concatenate([self.fc_norm(tokens) if config.norm else tokens for tokens in found], axis=-1)

    def features(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b d"]:
        """One vector a clip: the norm of the mean over all tokens of the last block, for content-debiased FVD.

        Pixels are in [0, 1] without mean and standard deviation, bilinear to the trained size, and all frames are
        looked at; with others than the trained number of them positions are resampled in time. Raises ValueError for
        an odd number of frames. Source: songweige/content-debiased-fvd, third_party/VideoMAEv2/utils.py and
        videomaev2_finetune.py, whose weights are vit_g_hybrid_pt_1200e_ssv2_ft.pth for videomaev2_g.
        """
        config = self.config
        _, count = kept_frames(video.shape[1], False)
        frames, *sides = config.trained_grid
        x = (video.astype(jnp.float32) + 1) / 2
        x = resize(x, (config.image_size, config.image_size), method="linear")
        # Upstream scales by a tenth of a frame more than there are, so that rounding loses no frame.
        length = count // TUBELET
        factor = None if length == frames else (length + 0.1) / frames
        table = resampled_positions(config.width, config.trained_grid, (length, *sides), time_factor=factor)
        (tokens,) = self._blocks(x, table, (config.depth - 1,))
        return self.fc_norm(jnp.mean(tokens, axis=(1, 2, 3), dtype=jnp.float32).astype(tokens.dtype))

    def _blocks(
        self, x: Float[Array, "b t h w 3"], table: Float[Array, "t2 h2 w2 d"], layers: Sequence[int]
    ) -> list[Float[Array, "b t2 h2 w2 d"]]:
        x = self.patch_embed(x)
        shape = x.shape
        x = (x + table.astype(x.dtype)).reshape(shape[0], -1, shape[-1])
        return [tokens.reshape(shape) for tokens in vit.run(self.blocks, x, layers)]
