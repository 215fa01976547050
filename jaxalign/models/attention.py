"""Multi-head attention: one entry, and for each backend the formulation that was fastest there.

Measured on one core of a shared CPU, forward and backward, fp32, 4 heads of 32 channels, jax 0.10.2, relative to
jax.nn.dot_product_attention:
  256 tokens, batch 32 (the demo's frames)            `plain` 0.77 of the time, 0.67 of the memory; `head` 0.74, 0.34
  1536 tokens, batch 2                                `plain` 0.57, 0.67; `head` 0.42, 0.20
  8 tokens, batch 1024 (the demo's pixels in time)    `plain` 1.08, `head` 1.25, sums of elementwise products 10
A whole step of the demo takes 0.90 of the time with `plain` on its frames, 0.93 with `head`.

At CogVideoX's size, 17,776 tokens and 30 heads of 64 in bf16, the gradient needs, as compiled for a CPU, 3.5 GB with
`head` and 114 GB with `xla`: where there is no flash kernel, long sequences go head by head on every backend.

A sequence that is cut over the mesh axis `context` gathers keys and values, of one head at a time with `head`. Passing
them around a ring instead saves 0.3 GB of 0.5 on 8 devices at 17,776 tokens and costs a third more at 131,072
(benchmarks/attention.py).
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Below this many tokens the scores are no larger than the tokens, so nothing needs to be saved.
_SHORT = 64
# From this many tokens on, the scores of all heads at once cost the CPU more than a loop over the heads.
_LONG = 1000
# From this many on, the scores of all heads at once (8 GB in fp32 for 30 heads) are more than a device should give.
_HUGE = 8192
# And so many scores (0.5 GB in fp32) are more than it should give at once, of a single head too.
_SCORES = 2**27


def attention(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    *,
    implementation: str = "auto",
) -> Float[Array, "b n heads d"]:
    """Softmax(q kᵀ / √d) v for every head, softmax in fp32; the result has v's dtype.

    `implementation` is 'auto' (by backend, dtype and length) or a name in IMPLEMENTATIONS; any other raises
    ValueError. Source: Vaswani et al. 2017, equation 1.
    """
    check_implementation(implementation)
    if implementation == "auto":
        device, num_tokens = jax.local_devices()[0], max(q.shape[1], k.shape[1])
        capability = str(getattr(device, "compute_capability", ""))
        sizes = num_tokens, q.shape[3], jax.device_count()
        implementation = choose(device.platform, capability, q.dtype, *sizes)
    return IMPLEMENTATIONS[implementation](q, k, v)


def choose(
    platform: str, capability: str, dtype: jnp.dtype, num_tokens: int, head_dim: int, num_devices: int = 1
) -> str:
    """The name that 'auto' stands for; `capability` is an NVIDIA GPU's compute capability, as '9.0'."""
    if platform == "cpu":
        return "xla" if num_tokens < _SHORT else "plain" if num_tokens < _LONG else "head"
    # cuDNN's flash kernels: half precision, Ampere or newer, heads of at most 128 channels in eights.
    version = re.match(r"(\d+)\.", capability)
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = half and head_dim <= 128 and head_dim % 8 == 0 and num_tokens >= _SHORT
    if platform in ("gpu", "cuda") and version and int(version[1]) >= 8 and fits:
        return "cudnn"
    # XLA cannot partition a Pallas kernel: with several devices it takes a shard_map around it, and then its name.
    if platform == "tpu" and num_devices == 1 and num_tokens >= _LONG:
        return "pallas"
    return "head" if num_tokens >= _HUGE else "xla"


def check_implementation(name: str) -> None:
    """Raises ValueError unless `name` is 'auto' or in IMPLEMENTATIONS."""
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise ValueError(f"attention {name!r} is not known; write one of {['auto', *IMPLEMENTATIONS]}")


def _library(implementation: str) -> Callable:
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _core(q: Float[Array, "*b n d"], k: Float[Array, "*b m d"], v: Float[Array, "*b m d"]) -> Float[Array, "*b n d"]:
    """Attention on matrices in few passes over the scores: the sum divides the output, not the weights."""
    scores = jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)
    # The maximum cancels out; without its gradient nobody has to look for it again.
    scores = scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores * q.shape[-1] ** -0.5)
    mixed = jnp.einsum("...nm,...md->...nd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def _plain(q: Array, k: Array, v: Array) -> Array:
    """All heads at once."""
    return _core(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)


def _head(q: Array, k: Array, v: Array) -> Array:
    """One head after the other, and again for the gradient: one head's scores are held at a time, or a part of them."""
    heads = tuple(x.transpose(2, 0, 1, 3) for x in (q, k, v))
    one = functools.partial(_in_parts, _num_parts(q.shape[1], k.shape[1]))
    mixed = jax.lax.map(jax.checkpoint(lambda qkv: one(*qkv), prevent_cse=False), heads)
    return mixed.transpose(1, 2, 0, 3)


def _num_parts(n: int, m: int) -> int:
    """How many parts n queries against m keys are taken in; each part still divides by 8 devices."""
    parts = 1
    while n * m > parts * _SCORES and n % (16 * parts) == 0:
        parts *= 2
    return parts


def _in_parts(parts: int, q: Array, k: Array, v: Array) -> Array:
    """`_core` on some of the queries at a time. A part is every parts-th query, which every device has some of."""
    if parts == 1:
        return _core(q, k, v)
    b, n, d = q.shape
    # The gradients of keys and values are summed over the parts, in the dtype that they have outside of the loop.
    keys, values = k.astype(jnp.float32), v.astype(jnp.float32)
    one = jax.checkpoint(lambda part: _core(part, keys.astype(k.dtype), values.astype(v.dtype)), prevent_cse=False)
    mixed = jax.lax.map(one, q.reshape(b, n // parts, parts, d).transpose(2, 0, 1, 3))
    return mixed.transpose(1, 2, 0, 3).reshape(b, n, v.shape[-1])


def _pallas(q: Array, k: Array, v: Array) -> Array:
    """JAX's own flash kernel for TPUs, on sequences filled up to whole blocks; the filling is a segment of its own."""
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas_tpu  # 0.2 s that nobody else should wait for

    block = 512 if max(q.shape[1], k.shape[1]) >= 512 else 128

    def filled(x):
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))

    def segments(x):
        length = x.shape[1] + -x.shape[1] % block
        return jnp.broadcast_to(jnp.arange(length) >= x.shape[1], (x.shape[0], length)).astype(jnp.int32)

    names = [field.name for field in dataclasses.fields(pallas_tpu.BlockSizes)]
    sizes = pallas_tpu.BlockSizes(**{name: 1 if name == "block_b" else block for name in names})
    ids = pallas_tpu.SegmentIds(segments(q), segments(k))
    scale = q.shape[3] ** -0.5
    flash = pallas_tpu.flash_attention
    out = flash(filled(q), filled(k), filled(v), segment_ids=ids, sm_scale=scale, block_sizes=sizes)
    return out[:, :, : q.shape[1]].swapaxes(1, 2).astype(v.dtype)


IMPLEMENTATIONS = {
    "xla": _library("xla"),
    "cudnn": _library("cudnn"),
    "pallas": _pallas,
    "plain": _plain,
    "head": _head,
}
