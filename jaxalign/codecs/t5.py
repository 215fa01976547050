"""The T5 v1.1 text encoder (transformers T5EncoderModel): token ids -> embeddings; XXL is CogVideoX's.

Blocks of x + attention(norm(x)) and x + gated GELU(norm(x)) without biases; RMSNorm; queries are not scaled; attention
knows positions only through one table of biases by distance, which all blocks share.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxalign.codecs.layers import Numbered
from jaxalign.interop.rules import Rename, Rule, Stack, Tied

RULES: tuple[Rule, ...] = (
    Stack(r"encoder\.block"),
    # Upstream keeps the table that all blocks share in the first one.
    Rename(r"^encoder\.relative_attention_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    Tied("encoder.embed_tokens.weight", "shared.weight"),
)

# The leading axis of the blocks is scanned and stays whole.
SHARDING_RULES = [
    (r"encoder\.block\.layer\.\d\.\w+\.(q|k|v|wi_0|wi_1)\.kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"encoder\.block\.layer\.\d\.\w+\.(o|wo)\.kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"shared\.embedding", PartitionSpec("fsdp", "tensor")),
    (r".*", PartitionSpec()),
]

PRESETS = {"t5_xxl": dict()}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Static settings; transformers' names in brackets where they differ."""

    vocabulary: int = 32128  # (vocab_size)
    width: int = 4096  # (d_model)
    depth: int = 24  # (num_layers)
    num_heads: int = 64
    head_dim: int = 64  # (d_kv)
    hidden: int = 10240  # (d_ff)
    buckets: int = 32  # (relative_attention_num_buckets)
    max_distance: int = 128  # (relative_attention_max_distance)
    eps: float = 1e-6  # (layer_norm_epsilon)


def settings_from(upstream: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `T5Config` from transformers' text_encoder/config.json. Raises ValueError for the first T5 (ReLU)."""
    if upstream.get("feed_forward_proj", "relu") != "gated-gelu":
        raise ValueError("text_encoder/config.json: feed_forward_proj must be 'gated-gelu', as T5 v1.1 has it")
    names = dict(
        vocabulary="vocab_size",
        width="d_model",
        depth="num_layers",
        num_heads="num_heads",
        head_dim="d_kv",
        hidden="d_ff",
        buckets="relative_attention_num_buckets",
        max_distance="relative_attention_max_distance",
        eps="layer_norm_epsilon",
    )
    return {ours: upstream[theirs] for ours, theirs in names.items() if theirs in upstream}


# ---- modules ------------------------------------------------------------------------------------------------------


class Table(nnx.Module):
    """Rows that are looked up."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (rows, width)))

    def __call__(self, index: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        return jnp.take(self.embedding[...], index, axis=0)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, in fp32; the result has the dtype of the scale (T5LayerNorm)."""

    def __init__(self, config: T5Config):
        self.eps = config.eps
        self.scale = nnx.Param(jnp.ones(config.width))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        x, scale = x.astype(jnp.float32), self.scale[...]
        return (x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)).astype(scale.dtype) * scale


class SelfAttention(nnx.Module):
    """Attention without biases in its maps and without 1/√d (T5Attention)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.num_heads, inner = config.num_heads, config.num_heads * config.head_dim
        self.q, self.k, self.v = (nnx.Linear(config.width, inner, use_bias=False, rngs=rngs) for _ in range(3))
        self.o = nnx.Linear(inner, config.width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "1 heads n n"], mask: Bool[Array, "b 1 1 n"] | None
    ) -> Float[Array, "b n d"]:
        q, k, v = (
            (x @ linear.kernel[...]).reshape(*x.shape[:2], self.num_heads, -1) for linear in (self.q, self.k, self.v)
        )
        mixed = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        return _wide(mixed.reshape(*x.shape[:2], -1), self.o)


class GatedMlp(nnx.Module):
    """wo(GELU(wi_0 x) · wi_1 x), with the tanh form of GELU (T5DenseGatedActDense)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.wi_0, self.wi_1 = (nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs) for _ in range(2))
        self.wo = nnx.Linear(config.hidden, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        gate, value = (x @ linear.kernel[...] for linear in (self.wi_0, self.wi_1))
        return _wide(jax.nn.gelu(gate, approximate=True) * value, self.wo)


def _wide(x: Array, linear: nnx.Linear) -> Array:
    """x @ kernel in fp32 at least: what is added up over the blocks is too large and too fine for half precision."""
    return jnp.matmul(x, linear.kernel[...], preferred_element_type=jnp.float32)


class Block(nnx.Module):
    """Attention and MLP under upstream's names layer.0 and layer.1 (T5Block)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        first, second = nnx.Module(), nnx.Module()
        first.SelfAttention, first.layer_norm = SelfAttention(config, rngs=rngs), RMSNorm(config)
        second.DenseReluDense, second.layer_norm = GatedMlp(config, rngs=rngs), RMSNorm(config)
        self.layer = Numbered([first, second])

    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "1 heads n n"], mask: Bool[Array, "b 1 1 n"] | None
    ) -> Float[Array, "b n d"]:
        first, second = self.layer
        x = x + first.SelfAttention(first.layer_norm(x), bias, mask)
        return x + second.DenseReluDense(second.layer_norm(x))


class T5Encoder(nnx.Module):
    """Token ids [b, n] -> embeddings [b, n, width]. `T5Encoder(config, rngs=nnx.Rngs(seed))`."""

    def __init__(self, config: T5Config = T5Config(), *, rngs: nnx.Rngs):
        self.config = config
        self.shared = Table(config.vocabulary, config.width, rngs=rngs)
        self.encoder = nnx.Module()
        self.encoder.relative_attention_bias = Table(config.buckets, config.num_heads, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.depth)
        self.encoder.block = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.encoder.final_layer_norm = RMSNorm(config)

    @property
    def width(self) -> int:
        """Channels of an embedding."""
        return self.config.width

    def __call__(self, tokens: Int[Array, "b n"], mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b n d"]:
        """Embeddings in the dtype of the weights. `mask` is False where nobody attends to; CogVideoX gives none.

        Source: transformers models/t5/modeling_t5.py, T5Stack.forward.
        """
        x = self.shared(tokens).astype(jnp.float32)
        buckets = position_buckets(tokens.shape[1], self.config.buckets, self.config.max_distance)
        bias = self.encoder.relative_attention_bias(jnp.asarray(buckets)).astype(jnp.float32)
        bias, mask = bias.transpose(2, 0, 1)[None], None if mask is None else mask[:, None, None]
        x, _ = lax.scan(lambda x, block: (block(x, bias, mask), None), x, self.encoder.block)
        return self.encoder.final_layer_norm(x)


def position_buckets(length: int, buckets: int = 32, max_distance: int = 128) -> Int[np.ndarray, "n n"]:
    """Row of the bias table for each query (rows) and key (columns).

    Half of the rows are for keys that come later. Half of each half are distances one by one, the others grow
    logarithmically up to max_distance. Source: T5Attention._relative_position_bucket, bidirectional.
    """
    ahead = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(ahead)
    # In fp32 as upstream: some distances lie on a border.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return np.where(distance < exact, distance, far).astype(np.int32) + half * (ahead > 0).astype(np.int32)


# ---- tokens -------------------------------------------------------------------------------------------------------


def tokenize(folder: str | Path, prompts: Sequence[str], max_length: int = 226) -> tuple[Int[np.ndarray, "b n"], int]:
    """(token ids [b, max_length] padded with zeros, how many prompts were cut), by the tokenizer in a model's folder.

    `folder` has a folder tokenizer/ or is one. Raises FileNotFoundError when it has none; ValueError for one that
    cannot be read. Source: diffusers pipeline_cogvideox.py, _get_t5_prompt_embeds.
    """
    folder = Path(folder)
    place = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not any((place / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        raise FileNotFoundError(f"{place}: no tokenizer (spiece.model or tokenizer.json); give the folder of the model")
    tokenizer = _tokenizer(place.resolve())
    whole = tokenizer(list(prompts), add_special_tokens=True, verbose=False)["input_ids"]
    cut = tokenizer(
        list(prompts), padding="max_length", max_length=max_length, truncation=True, add_special_tokens=True
    )["input_ids"]
    return np.asarray(cut, np.int32), sum(len(ids) > max_length for ids in whole)


@functools.lru_cache(maxsize=4)  # a million captions come in parts, and reading it takes a second
def _tokenizer(place: Path):
    from transformers import AutoTokenizer  # seconds to import, and only this function needs it

    try:
        return AutoTokenizer.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # the library raises plain ones, pages long
        raise ValueError(f"{place}: the tokenizer cannot be read ({' '.join(str(error).split())[:160]})") from error
