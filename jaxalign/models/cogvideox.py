"""CogVideoX: a diffusion transformer over the joint sequence of text and video (diffusers CogVideoXTransformer3DModel).

Text and video tokens share every Linear, every LayerNorm and the attention; what each of them has for itself are the
shifts, scales and gates that the timestep makes ("expert" adaLN). Here both stay one sequence from end to end: the two
sets of vectors are chosen token by token inside the elementwise functions that use them, so that nothing is taken
apart and put together again in each block, and so that the sequence can be split over devices.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Shaped

from jaxalign.interop.rules import Rule, Stack
from jaxalign.models import attention as attention_lib
from jaxalign.models import layers
from jaxalign.models import positions as positions_lib
from jaxalign.models import taps as taps_lib
from jaxalign.models.placement import keep_rows

_2B = dict(width=1920, depth=30, num_heads=30)
_5B = dict(width=3072, depth=42, num_heads=48, positions="rotary")
PRESETS = {
    "2b": _2B,
    "5b": _5B,
    "5b_i2v": _5B | dict(image_channels=16, positions="rotary+learned"),
    "1.5_5b": _5B | dict(patch_size_t=2),
    "1.5_5b_i2v": _5B | dict(patch_size_t=2, image_channels=16, ofs_width=512),
    "demo": dict(width=128, depth=8, num_heads=4, time_width=64, text_width=32, text_tokens=32),
}

POSITIONS = ("sincos", "rotary", "rotary+learned")

# Path regex -> sharding; first match wins. The leading axis of `transformer_blocks` is scanned and stays whole.
# Over `tensor`: columns of q, k, v, the MLP's first Linear and adaLN, rows of what follows them (Megatron).
SHARDING_RULES = [
    (
        r"transformer_blocks\.(attn1\.to_[qkv]|ff\.net\.0\.proj|norm[12]\.linear)\.kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (r"transformer_blocks\.(attn1\.to_out\.0|ff\.net\.2)\.kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"transformer_blocks\.(attn1\.to_[qkv]|ff\.net\.0\.proj|norm[12]\.linear)\.bias", PartitionSpec(None, "tensor")),
    (r"transformer_blocks\..*", PartitionSpec()),  # norms and the biases of rows
    (r"patch_embed\.text_proj\.kernel", PartitionSpec("fsdp", "tensor")),
    (r"patch_embed\.pos_embedding", PartitionSpec(None, None, "fsdp")),
    (r"(time|ofs)_embedding\.linear_1\.kernel", PartitionSpec("fsdp", "tensor")),
    (r"(time|ofs)_embedding\.linear_2\.kernel", PartitionSpec("tensor", "fsdp")),
    (r"norm_out\.linear\.kernel", PartitionSpec("fsdp", "tensor")),
    (r"proj_out\.kernel", PartitionSpec("fsdp", None)),
    (r".*", PartitionSpec()),  # the patches' projection (less than 0.02 % of the parameters), other biases and norms
]


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig:
    """Static settings; sizes in latent pixels and latent frames. Raises ValueError for sizes that do not fit.

    positions: 'sincos' is added to the video tokens (2B); 'rotary' turns queries and keys (5B); 'rotary+learned' adds
    a trained table too (5B I2V). `sample_size` is the size that rotary positions are stretched to, upstream's
    sample_height and sample_width. I2V: `image_channels` further channels come in behind those of the noisy latents.
    """

    input_size: tuple[int, int]  # height, width
    num_frames: int  # of latents: 13 for 49 frames of video
    width: int
    depth: int
    num_heads: int
    patch_size: int = 2
    patch_size_t: int | None = None  # CogVideoX-1.5 takes 2 latent frames as one; None is 1.0, another embedding
    in_channels: int = 16  # of the noisy latents, and so of the prediction
    image_channels: int = 0
    positions: str = "sincos"
    spatial_scale: float = 1.875  # what sin-cos positions are divided by
    temporal_scale: float = 1.0
    sample_size: tuple[int, int] = (60, 90)
    text_tokens: int = 226
    text_width: int = 4096
    time_width: int = 512
    ofs_width: int = 0  # 0: no embedding of `ofs`; 1.5's I2V has one of 512 channels
    remat: bool = False  # keep only every block's input for the gradient and compute the rest again
    attention: str = "auto"

    def __post_init__(self):
        for name in ("input_size", "sample_size"):  # a config file may give a list
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.depth < 1:
            raise ValueError(f"model.depth must be at least 1, got {self.depth}")
        if self.width % self.num_heads or self.width % 16:
            raise ValueError(f"model.width must be divisible by num_heads {self.num_heads} and by 16, got {self.width}")
        if self.positions not in POSITIONS:
            raise ValueError(f"model.positions {self.positions!r} is not known; write one of {POSITIONS}")
        if self.positions != "sincos" and self.head_dim % 16:
            raise ValueError(f"rotary positions need heads of a multiple of 16 channels, got {self.head_dim}")
        for length in self.input_size:
            if length % self.patch_size:
                nearest = max(1, round(length / self.patch_size)) * self.patch_size
                raise ValueError(
                    f"latents of {self.input_size[0]}x{self.input_size[1]}: model.patch_size {self.patch_size} does "
                    f"not divide {length}; the nearest size that fits is {nearest}"
                )
        if self.num_frames % (self.patch_size_t or 1):
            raise ValueError(
                f"model.patch_size_t {self.patch_size_t} does not divide {self.num_frames} latent frames; pad them "
                f"to {-(-self.num_frames // self.patch_size_t) * self.patch_size_t}, as upstream's pipeline does"
            )
        attention_lib.check_implementation(self.attention)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens along (time, height, width)."""
        h, w = self.input_size
        return (self.num_frames // (self.patch_size_t or 1), h // self.patch_size, w // self.patch_size)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Tokens that attend to each other: text and video."""
        return self.text_tokens + int(np.prod(self.grid))

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels


def weight_rules(config: CogVideoXConfig) -> list[Rule]:
    """What the engine in interop must know beyond attribute names to read and write diffusers' state dict."""
    del config  # the same for all
    return [Stack(r"transformer_blocks")]


# ---- positions ----------------------------------------------------------------------------------------------------


def _add_sincos(x: Float[Array, "b n d"], config: CogVideoXConfig) -> Float[Array, "b n d"]:
    """Adds a quarter of the channels for the frame and three quarters for the place in it (CogVideoXPatchEmbed)."""
    t, h, w = config.grid
    frames = np.arange(t, dtype=np.float32) / np.float32(config.temporal_scale)
    in_time = positions_lib.sincos_1d(config.width // 4, frames)
    in_space = positions_lib.sincos_2d(3 * config.width // 4, h, w, config.spatial_scale)
    # The whole table of a 2B clip would be 135 MB in the program; its two factors are 8 MB.
    whole = [
        jnp.broadcast_to(in_time.astype(x.dtype)[:, None], (t, h * w, in_time.shape[1])),
        jnp.broadcast_to(in_space.astype(x.dtype)[None], (t, *in_space.shape)),
    ]
    return x + jnp.concatenate(whole, axis=-1).reshape(t * h * w, config.width)


def rotary_angles(config: CogVideoXConfig) -> Float[np.ndarray, "n half"]:
    """Angle of each pair of channels of a head, for text (0: not turned) and video tokens, fp32.

    A quarter of the channels is for time, three eighths each for height and width. CogVideoX 1.0 stretches a grid of
    another size or aspect to what it was trained on (`sample_size`), 1.5 counts tokens.
    Source: diffusers pipeline_cogvideox.py, _prepare_rotary_positional_embeddings, and embeddings.py.
    """
    t, h, w = config.grid
    rows, columns = np.arange(h, dtype=np.float32), np.arange(w, dtype=np.float32)
    if config.patch_size_t is None:
        base_h, base_w = (length // config.patch_size for length in config.sample_size)
        # Fit the grid into the trained one with its aspect kept, centred; round() as upstream's.
        tall = h / w > base_h / base_w
        fit_h = base_h if tall else round(base_w / w * h)
        fit_w = round(base_h / h * w) if tall else base_w
        top, left = round((base_h - fit_h) / 2), round((base_w - fit_w) / 2)
        rows = np.linspace(top, (top + fit_h) * (h - 1) / h, h)
        columns = np.linspace(left, (left + fit_w) * (w - 1) / w, w)
    in_time, in_height, in_width = (
        positions_lib.rotary_1d(channels, along)
        for channels, along in (
            (config.head_dim // 4, np.arange(t)),
            (config.head_dim // 8 * 3, rows),
            (config.head_dim // 8 * 3, columns),
        )
    )
    axes = (in_time[:, None, None], in_height[None, :, None], in_width[None, None])
    video = np.concatenate([np.broadcast_to(axis, (t, h, w, axis.shape[-1])) for axis in axes], axis=-1)
    text = np.zeros((config.text_tokens, config.head_dim // 2), np.float32)
    return np.concatenate([text, video.reshape(t * h * w, -1)])


def _rotate(x: Float[Array, "b n heads d"], angles: Float[np.ndarray, "n half"]) -> Float[Array, "b n heads d"]:
    """Turns the pairs of neighbouring channels by their token's angles, in fp32 (diffusers apply_rotary_emb)."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


# ---- modules ------------------------------------------------------------------------------------------------------


class PatchEmbed(layers.PatchEmbed):
    """Latents and text embeddings -> tokens (CogVideoXPatchEmbed)."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        channels, p, p_t = config.in_channels + config.image_channels, config.patch_size, config.patch_size_t
        self.patch_size, self.patch_size_t = p, p_t
        if p_t is None:
            super().__init__(p, channels, config.width, rngs=rngs)
        else:
            self.proj = layers.Linear(channels * p_t * p * p, config.width, kernel_init=layers.xavier, rngs=rngs)
        self.text_proj = layers.Linear(config.text_width, config.width, kernel_init=layers.xavier, rngs=rngs)
        if config.positions == "rotary+learned":
            # A buffer in diffusers, but a trained parameter where the published weights come from (THUDM/CogVideo,
            # sat/dit_video_concat.py: zeros at first, for text and video); so it is one here.
            self.pos_embedding = nnx.Param(jnp.zeros((1, config.num_tokens, config.width)))

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b i n d"]:
        if self.patch_size_t is None:
            return super().__call__(x)
        b, t, h, w, c = x.shape
        p, p_t = self.patch_size, self.patch_size_t
        patches = x.reshape(b, t // p_t, p_t, h // p, p, w // p, p, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
        patches = patches.reshape(b, t // p_t, (h // p) * (w // p), c * p_t * p * p)
        return self.proj(patches.astype(self.proj.kernel.dtype))


class TimestepEmbedding(nnx.Module):
    """Frequencies [b, channels] -> vectors [b, width]: Linear, SiLU, Linear (diffusers TimestepEmbedding)."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = layers.Linear(channels, width, kernel_init=layers.small_normal, rngs=rngs)
        self.linear_2 = layers.Linear(width, width, kernel_init=layers.small_normal, rngs=rngs)

    def __call__(self, timesteps: Shaped[Array, "b"]) -> Float[Array, "b d"]:
        kernel = self.linear_1.kernel[...]
        frequencies = layers.timestep_frequencies(timesteps, kernel.shape[0]).astype(kernel.dtype)
        return self.linear_2(jax.nn.silu(self.linear_1(frequencies)))


class AdaLayerNorm(nnx.Module):
    """LayerNorm, and the Linear that makes `num_vectors` shifts, scales and gates [b, width] of the condition."""

    def __init__(self, config: CogVideoXConfig, num_vectors: int, *, rngs: nnx.Rngs):
        self.num_vectors = num_vectors
        size = num_vectors * config.width
        self.linear = layers.Linear(config.time_width, size, kernel_init=layers.zeros, rngs=rngs)
        self.norm = layers.LayerNorm(config.width, eps=1e-5)

    def __call__(self, condition: Float[Array, "b k"]) -> list[Float[Array, "b d"]]:
        return jnp.split(self.linear(condition), self.num_vectors, axis=-1)


class Attention(nnx.Module):
    """adaLN and self-attention over text and video together, queries and keys normalised a head (Attention)."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.implementation = config.num_heads, config.attention
        linears = [layers.Linear(config.width, config.width, kernel_init=layers.xavier, rngs=rngs) for _ in range(4)]
        self.to_q, self.to_k, self.to_v, out = linears
        self.to_out = nnx.Module()
        setattr(self.to_out, "0", out)
        self.norm_q = layers.LayerNorm(config.head_dim)
        self.norm_k = layers.LayerNorm(config.head_dim)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        norm: layers.LayerNorm,
        vectors: Sequence[Float[Array, "b d"]],
        is_text: Bool[np.ndarray, "n 1"],
        angles: Float[np.ndarray, "n half"] | None,
    ) -> Float[Array, "b n d"]:
        linears = (self.to_q, self.to_k, self.to_v)
        qkv = _modulated_linear(x, norm, vectors, is_text, linears)
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in qkv)

        def placed(y, norm):
            return norm(y) if angles is None else _rotate(norm(y), angles)

        q = layers.recompute(placed)(q, self.norm_q)
        k = layers.recompute(placed)(k, self.norm_k)
        out = attention_lib.attention(q, k, v, implementation=self.implementation)
        return getattr(self.to_out, "0")(out.reshape(x.shape))


class FeedForward(nnx.Module):
    """adaLN, Linear, GELU, Linear (FeedForward; upstream's list has a dropout at index 1)."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.net = nnx.Module()
        setattr(self.net, "0", nnx.Module())
        first = layers.Linear(config.width, 4 * config.width, kernel_init=layers.xavier, rngs=rngs)
        getattr(self.net, "0").proj = first
        setattr(self.net, "2", layers.Linear(4 * config.width, config.width, kernel_init=layers.xavier, rngs=rngs))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        norm: layers.LayerNorm,
        vectors: Sequence[Float[Array, "b d"]],
        is_text: Bool[np.ndarray, "n 1"],
    ) -> Float[Array, "b n d"]:
        (hidden,) = _modulated_linear(x, norm, vectors, is_text, (getattr(self.net, "0").proj,))
        return layers.gelu_linear(hidden, getattr(self.net, "2"))


class Block(nnx.Module):
    """Transformer block on the joint sequence (CogVideoXBlock)."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.norm1 = AdaLayerNorm(config, 6, rngs=rngs)
        self.attn1 = Attention(config, rngs=rngs)
        self.norm2 = AdaLayerNorm(config, 6, rngs=rngs)
        self.ff = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        condition: Float[Array, "b k"],
        is_text: Bool[np.ndarray, "n 1"],
        angles: Float[np.ndarray, "n half"] | None,
    ) -> Float[Array, "b n d"]:
        shift, scale, gate, text_shift, text_scale, text_gate = self.norm1(condition)
        out = self.attn1(x, self.norm1.norm, (shift, scale, text_shift, text_scale), is_text, angles)
        x = _gated_sum(x, out, gate, text_gate, is_text)
        shift, scale, gate, text_shift, text_scale, text_gate = self.norm2(condition)
        out = self.ff(x, self.norm2.norm, (shift, scale, text_shift, text_scale), is_text)
        return _gated_sum(x, out, gate, text_gate, is_text)


def _by_stream(
    is_text: Bool[np.ndarray, "n 1"], text: Float[Array, "b d"], video: Float[Array, "b d"]
) -> Float[Array, "b n d"]:
    """The text's vector on text tokens, the video's on the others."""
    return jnp.where(is_text, text[:, None], video[:, None])


def _modulated_linear(x, norm, vectors, is_text, linears) -> tuple[Array, ...]:
    """linear(norm(x) · (1 + scale) + shift) for each of the Linears; only x is kept for the gradient."""

    def modulated(x, norm, vectors, linears):
        shift, scale, text_shift, text_scale = vectors
        normed = norm(x.astype(jnp.float32))
        normed = normed * (1 + _by_stream(is_text, text_scale, scale)) + _by_stream(is_text, text_shift, shift)
        normed = normed.astype(x.dtype)
        return tuple(linear(normed) for linear in linears)

    return layers.recompute(modulated)(x, norm, tuple(vectors), tuple(linears))


def _gated_sum(x, out, gate, text_gate, is_text) -> Array:
    """x + gate · out."""

    def gated_sum(x, out, gate, text_gate):
        return x + _by_stream(is_text, text_gate, gate) * out

    return layers.recompute(gated_sum)(x, out, gate, text_gate)


class CogVideoX(nnx.Module):
    """CogVideoX with its blocks stacked and scanned. `CogVideoX(config, rngs=nnx.Rngs(seed))`."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.time_embedding = TimestepEmbedding(config.width, config.time_width, rngs=rngs)
        if config.ofs_width:
            if config.ofs_width != config.time_width:
                raise ValueError(f"model.ofs_width {config.ofs_width} must be 0 or time_width {config.time_width}")
            self.ofs_embedding = TimestepEmbedding(config.ofs_width, config.ofs_width, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.depth)
        self.transformer_blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm_final = layers.LayerNorm(config.width, eps=1e-5)
        self.norm_out = AdaLayerNorm(config, 2, rngs=rngs)
        size = config.patch_size**2 * (config.patch_size_t or 1) * config.out_channels
        self.proj_out = layers.Linear(config.width, size, kernel_init=layers.xavier, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        timesteps: Shaped[Array, "b"],
        condition: Float[Array, "b m k"] | None,
        *,
        taps: Sequence[Any] = (),
        ofs: float | int = 2.0,
    ) -> tuple[Float[Array, "b t h w o"], dict[int, Float[Array, "b i j l d"]]]:
        """Prediction (fp32) for noisy latents at timesteps 0..1000 (fractions allowed), and the tapped video tokens.

        latents: for I2V the caller has put the image's latents behind the noisy ones on the channel axis (zeros in
        all frames but the first). condition: the text encoder's embeddings [b, text_tokens, text_width]; padding is
        attended to, as upstream. taps: 0-based block indices in any order; the dictionary has the block's output on
        the video tokens for each. ofs: read only by a model with ofs_width; upstream's pipeline always gives 2.
        Raises ValueError for a tap that is no block, and for latents or text that are not the config's shape.
        Source: diffusers transformers/cogvideox_transformer_3d.py, CogVideoXTransformer3DModel.forward.
        """
        config = self.config
        taps = taps_lib.checked(taps, config.depth)
        _check_inputs(config, latents.shape, condition)
        b, grid, num_text = latents.shape[0], config.grid, config.text_tokens

        video = self.patch_embed(latents).reshape(b, -1, config.width)
        if config.positions == "sincos":
            video = _add_sincos(video, config)
        text = self.patch_embed.text_proj(condition.astype(video.dtype))
        x = jnp.concatenate([text, video], axis=1)
        if config.positions == "rotary+learned":
            x = x + self.patch_embed.pos_embedding[...]
        angles = None if config.positions == "sincos" else rotary_angles(config)
        is_text = np.arange(config.num_tokens)[:, None] < num_text

        c = self.time_embedding(timesteps)
        if config.ofs_width:
            c = c + self.ofs_embedding(jnp.full((1,), ofs, jnp.float32))
        c = keep_rows(jax.nn.silu(c))  # all that read it take its SiLU
        x = keep_rows(x, tokens=1)

        def run_block(x, block):
            # At both ends, for the scan's gradient runs through it the other way.
            out = block(keep_rows(x, tokens=1), c, is_text, angles)
            return keep_rows(out, tokens=1), None

        if config.remat:
            run_block = jax.checkpoint(run_block, prevent_cse=False)
        # The scan is cut behind every tapped block, so that the tokens of no other one are kept.
        cuts = sorted({tap + 1 for tap in taps} | {config.depth})
        tapped = {}
        for blocks, cut in zip(taps_lib.split(self.transformer_blocks, cuts), cuts, strict=True):
            x, _ = jax.lax.scan(run_block, x, blocks)
            if cut - 1 in taps:
                tapped[cut - 1] = x[:, num_text:].reshape(b, *grid, config.width)

        shift, scale = self.norm_out(c)
        video = self.norm_final(x[:, num_text:])
        video = self.norm_out.norm(video) * (1 + scale[:, None]) + shift[:, None]
        out = self.proj_out(video).astype(jnp.float32)
        return unpatchify(out.reshape(b, *grid, -1), config.patch_size, config.patch_size_t or 1), tapped


def unpatchify(x: Float[Array, "b i j l pixels"], patch_size: int, patch_size_t: int = 1) -> Float[Array, "b t h w c"]:
    """Tokens that hold (channel, frame, row, column) of their patch -> video (CogVideoXTransformer3DModel.forward)."""
    b, t, h, w, pixels = x.shape
    p, p_t = patch_size, patch_size_t
    c = pixels // (p_t * p * p)
    x = x.reshape(b, t, h, w, c, p_t, p, p).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, t * p_t, h * p, w * p, c)


def _check_inputs(config: CogVideoXConfig, shape: tuple[int, ...], condition: Any) -> None:
    expected = (config.num_frames, *config.input_size, config.in_channels + config.image_channels)
    if shape[1:] != expected:
        image = f", of which {config.image_channels} channels are the image's" if config.image_channels else ""
        raise ValueError(f"latents have [t, h, w, c] = {shape[1:]}, but the model's config says {expected}{image}")
    text = (shape[0], config.text_tokens, config.text_width)
    if condition is None:
        raise ValueError(f"this model is conditioned on text: pass embeddings {list(text)}, those of '' for no text")
    if condition.shape != text:
        raise ValueError(f"the text embeddings are {condition.shape}, but the model's config says {text}")
