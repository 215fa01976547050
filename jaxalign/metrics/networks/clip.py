"""CLIP (ViT-B/32, ViT-L/14): images and texts as vectors whose cosine says how well they belong together.

Network: openai/CLIP clip/model.py. Attributes bear the names of its state dict. RULES have two tables of names:
    openai         ViT-B-32.pt and ViT-L-14.pt, which are TorchScript archives (most numbers in half precision)
    transformers   CLIPModel (model.safetensors of openai/clip-vit-base-patch32)
"""

import dataclasses
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxalign.interop.rules import Ignored, Rename, Rule, Split, Stack, Transpose
from jaxalign.models import attention as attention_lib
from jaxalign.models import layers as shared
from jaxalign.models.frames import normalised
from jaxalign.teachers.resize import resize

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5  # PyTorch's LayerNorm
MERGES = 49152 - 256 - 2  # of upstream's BPE file, which holds more

PRESETS: dict[str, dict[str, Any]] = {
    "clip_vit_b32": dict(width=768, depth=12, num_heads=12, patch_size=32, embedding=512, text_width=512, text_heads=8),
    "clip_vit_l14": dict(
        width=1024, depth=24, num_heads=16, patch_size=14, embedding=768, text_width=768, text_heads=12
    ),
}

# ---- names --------------------------------------------------------------------------------------------------------

_STACKS = (Stack(r"visual\.transformer\.resblocks"), Stack(r"transformer\.resblocks"))

RULES: dict[str, tuple[Rule, ...]] = {
    "openai": (
        *_STACKS,
        Rename(r"\.in_proj\.(weight|bias)$", r".in_proj_\1"),
        Ignored("input_resolution|context_length|vocab_size"),  # numbers that a loader of upstream's reads off
    ),
    "transformers": (
        *_STACKS,
        Rename(r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
        Rename(r"^transformer\.resblocks\.", "text_model.encoder.layers."),
        Split(r"(.*)\.attn\.in_proj\.(.*)", tuple(rf"\1.self_attn.{n}_proj.\2" for n in "qkv")),
        Rename(r"\.attn\.out_proj\.", ".self_attn.out_proj."),
        Rename(r"\.ln_([12])\.", r".layer_norm\1."),
        Rename(r"\.mlp\.c_fc\.", ".mlp.fc1."),
        Rename(r"\.mlp\.c_proj\.", ".mlp.fc2."),
        Rename(r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
        Rename(r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
        Rename(r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        Rename(r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # upstream's spelling
        Rename(r"^visual\.ln_post\.", "vision_model.post_layernorm."),
        Rename(r"^token_embedding\.", "text_model.embeddings.token_embedding."),
        Rename(r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        Rename(r"^ln_final\.", "text_model.final_layer_norm."),
        Rename(r"^visual\.proj$", "visual_projection.weight"),
        Rename(r"^text_projection$", "text_projection.weight"),
        Transpose(r"(visual|text)_projection\.weight", (1, 0)),
        Ignored(r".*\.position_ids"),
    ),
}


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Settings of both towers; the first ones come from PRESETS. Raises ValueError for what does not fit together."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 32
    embedding: int = 512
    text_width: int = 512
    text_heads: int = 8
    text_depth: int = 12
    image_size: int = 224
    vocabulary: int = 49408
    context: int = 77
    attention: str = "auto"

    def __post_init__(self):
        if self.image_size % self.patch_size or self.width % self.num_heads or self.text_width % self.text_heads:
            raise ValueError(
                f"clip: image_size {self.image_size} in patches of {self.patch_size}, width {self.width} in "
                f"{self.num_heads} heads, text_width {self.text_width} in {self.text_heads}: all must divide"
            )
        attention_lib.check_implementation(self.attention)


# ---- the network --------------------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Self-attention as torch.nn.MultiheadAttention has it."""

    def __init__(self, width: int, heads: int, implementation: str, *, rngs: nnx.Rngs):
        self.heads, self.implementation = heads, implementation
        self.in_proj = shared.Linear(width, 3 * width, rngs=rngs)
        self.out_proj = shared.Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], causal: bool) -> Float[Array, "b n d"]:
        b, n, width = x.shape
        q, k, v = jnp.moveaxis(self.in_proj(x).reshape(b, n, 3, self.heads, width // self.heads), 2, 0)
        if causal:
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = attention_lib.attention(q, k, v, implementation=self.implementation)
        return self.out_proj(mixed.reshape(b, n, width))


class Mlp(nnx.Module):
    """Linear, x·σ(1.702x), Linear."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.c_fc = shared.Linear(width, 4 * width, rngs=rngs)
        self.c_proj = shared.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = self.c_fc(x)
        return self.c_proj(x * jax.nn.sigmoid(1.702 * x))


class Block(nnx.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, width: int, heads: int, implementation: str, *, rngs: nnx.Rngs):
        self.attn = Attention(width, heads, implementation, rngs=rngs)
        self.ln_1 = shared.LayerNorm(width, EPS)
        self.mlp = Mlp(width, rngs=rngs)
        self.ln_2 = shared.LayerNorm(width, EPS)

    def __call__(self, x: Float[Array, "b n d"], causal: bool) -> Float[Array, "b n d"]:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """Equal blocks on a leading axis; `causal`: a token sees those before it."""

    def __init__(self, width: int, depth: int, heads: int, causal: bool, implementation: str, *, rngs: nnx.Rngs):
        def one(key):
            return Block(width, heads, implementation, rngs=nnx.Rngs(key))

        self.causal = causal
        self.resblocks = jax.vmap(one)(jax.random.split(rngs.params(), depth))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x, _ = lax.scan(lambda x, block: (block(x, self.causal), None), x, self.resblocks)
        return x


class Visual(nnx.Module):
    """Normalised images [b, size, size, 3] -> embeddings [b, e]."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        width, p = config.width, (config.patch_size, config.patch_size)
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        draw = nnx.initializers.normal(width**-0.5)
        self.class_embedding = nnx.Param(draw(rngs.params(), (width,)))
        self.positional_embedding = nnx.Param(draw(rngs.params(), (tokens, width)))
        self.proj = nnx.Param(draw(rngs.params(), (width, config.embedding)))
        self.conv1 = nnx.Conv(3, width, p, strides=p, use_bias=False, rngs=rngs)
        self.ln_pre = shared.LayerNorm(width, EPS)
        self.transformer = Transformer(
            width, config.depth, config.num_heads, causal=False, implementation=config.attention, rngs=rngs
        )
        self.ln_post = shared.LayerNorm(width, EPS)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        kernel = self.conv1.kernel[...]
        p, _, _, width = kernel.shape
        b, rows, columns = x.shape[0], x.shape[1] // p, x.shape[2] // p
        # A convolution whose stride is its size is one matmul, which every backend does well.
        x = x.astype(kernel.dtype).reshape(b, rows, p, columns, p, 3).swapaxes(2, 3).reshape(b, rows * columns, -1)
        first = jnp.broadcast_to(self.class_embedding[...], (b, 1, width))
        x = jnp.concatenate([first, x @ kernel.reshape(-1, width)], axis=1) + self.positional_embedding[...]
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj[...]


class CLIP(nnx.Module):
    """images [b, h, w, 3] in [-1, 1] -> embeddings [b, e], not of unit length; `text` for token ids."""

    def __init__(self, config: CLIPConfig = CLIPConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.visual = Visual(config, rngs=rngs)
        self.transformer = Transformer(
            config.text_width,
            config.text_depth,
            config.text_heads,
            causal=True,
            implementation=config.attention,
            rngs=rngs,
        )
        draw = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Embed(config.vocabulary, config.text_width, embedding_init=draw, rngs=rngs)
        self.positional_embedding = nnx.Param(draw(rngs.params(), (config.context, config.text_width)))
        self.ln_final = shared.LayerNorm(config.text_width, EPS)
        self.text_projection = nnx.Param(draw(rngs.params(), (config.text_width, config.embedding)))
        self.logit_scale = nnx.Param(jnp.asarray(np.log(1 / 0.07), jnp.float32))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Embeddings of images."""
        return self.visual(normalised(prepared(images, self.config.image_size), MEAN, STD))

    def text(self, token_ids: Int[Array, "b n"]) -> Float[Array, "b e"]:
        """Embeddings of texts; the largest id of a row is its end, whatever stands behind it counts for nothing."""
        table = self.token_embedding.embedding[...]
        x = jnp.take(table, token_ids, axis=0) + self.positional_embedding[: token_ids.shape[1]]
        x = self.ln_final(self.transformer(x))
        end = jnp.argmax(token_ids, axis=-1)
        return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0] @ self.text_projection[...]


def prepared(images: Float[Array, "b h w 3"], size: int) -> Float[Array, "b s s 3"]:
    """The short side brought to `size`, then the square in the middle; [-1, 1] in and out, fp32.

    As Pillow does it for upstream (clip/clip.py, _transform): bicubic with antialiasing, columns first, and whole grey
    levels after each of both directions.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    rows, columns = (int(size * side / short) for side in (height, width))
    x = (images.astype(jnp.float32) + 1) * 127.5
    for axis, length in ((2, columns), (1, rows)):
        if x.shape[axis] != length:
            x = resize(x, (length,), axes=(axis,), method="cubic", antialias=True)
            x = jnp.clip(jnp.round(x), 0, 255)
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    return x[:, top : top + size, left : left + size] / 127.5 - 1


# ---- words --------------------------------------------------------------------------------------------------------


def tokenizer(path: str | Path) -> Callable[[Sequence[str]], Int[np.ndarray, "b 77"]]:
    """Texts -> token ids [b, 77], longer ones cut.

    `path`: a folder of transformers (openai/clip-vit-base-patch32), or upstream's bpe_simple_vocab_16e6.txt.gz.
    Raises FileNotFoundError for one that is not there.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"--tokenizer {path}: not there; give the folder openai/clip-vit-base-patch32 (with tokenizer.json, or "
            "vocab.json and merges.txt), or bpe_simple_vocab_16e6.txt.gz of openai/CLIP"
        )
    from transformers import CLIPTokenizer  # seconds to import, and only this function needs it

    is_folder = path.is_dir()
    found = CLIPTokenizer.from_pretrained(path, local_files_only=True) if is_folder else CLIPTokenizer(**_bpe(path))
    length = CLIPConfig.context

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        ids = found(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np")
        return ids["input_ids"].astype(np.int32)

    return tokenize


def _bpe(path: Path) -> dict[str, Any]:
    """Vocabulary and merges out of upstream's file (clip/simple_tokenizer.py)."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    # Printable bytes stand for themselves, the others for what follows in Unicode (GPT-2's table).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + k) for k in range(256 - len(printable))]
    letters = [*map(chr, printable), *others]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {"vocab": {token: k for k, token in enumerate(tokens)}, "merges": merges}
