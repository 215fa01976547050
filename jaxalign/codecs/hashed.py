"""Words as fixed random vectors: a text encoder without weights, for tests and demos.

It tells captions apart and knows no language: two words are as far from each other as any two, whatever they mean, and
a vector does not depend on the words around it. A model trained with it understands nothing but the words of its own
captions.
"""

import hashlib
import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

WIDTH, WORDS = 32, 4096  # words that are different share a row with one chance in 4096


class HashedWords(nnx.Module):
    """Token ids [b, n] -> embeddings [b, n, 32], fp32; no parameters. Row 0, padding and the empty prompt, is zero."""

    @property
    def width(self) -> int:
        """Channels of an embedding."""
        return WIDTH

    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        table = np.random.default_rng(0).standard_normal((WORDS, WIDTH), np.float32)
        table[0] = 0.0
        return jnp.take(jnp.asarray(table), tokens, axis=0)


def tokenize(prompts: Sequence[str], max_length: int) -> tuple[Int[np.ndarray, "b n"], int]:
    """(token ids [b, max_length] padded with zeros, how many prompts were cut): a word's id is a digest of it."""
    ids, cut = np.zeros((len(prompts), max_length), np.int32), 0
    for row, prompt in zip(ids, prompts, strict=True):
        words = re.findall(r"\w+", prompt.lower())
        cut += len(words) > max_length
        for k, word in enumerate(words[:max_length]):
            row[k] = 1 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % (WORDS - 1)
    return ids, cut
