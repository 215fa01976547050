"""Memory of attention over a sequence that is cut over devices: keys and values gathered, or passed around a ring.

    python -m jaxalign.benchmarks.attention
    python -m jaxalign.benchmarks.attention --tokens=131072 --devices=8,32

Value and gradient, batch 1, bf16, as compiled for forced CPU devices: nothing is run. `head` is models/attention.py's
formulation, in which XLA gathers one head's keys and values at a time. `ring` is ring attention (Liu et al. 2023,
arXiv:2310.01889) by its equations: each device keeps its queries and a running softmax while blocks of keys and values
go once around, and for the gradient once more, together with theirs. It is here for comparison only.
"""

import functools
import os

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.attention import attention

FLAGS = flags.FLAGS
AXIS = "context"


def _around(blocks, size: int):
    return jax.lax.ppermute(blocks, AXIS, [(k, (k + 1) % size) for k in range(size)])


def _scores(q, k):
    return jnp.einsum("nd,md->nm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _ring_forward(size: int, q, k, v):
    """(output, log of the softmax's sum) for this device's queries [heads, n, d]."""

    def one_head(args):
        q, k, v, largest, total, out = args
        scores = _scores(q, k)
        new = jnp.maximum(largest, scores.max(-1))
        weights, shrink = jnp.exp(scores - new[:, None]), jnp.exp(largest - new)
        mixed = jnp.einsum("nm,md->nd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new, total * shrink + weights.sum(-1), out * shrink[:, None] + mixed

    def turn(carry, _):
        k, v, *sums = carry
        sums = jax.lax.map(one_head, (q, k, v, *sums))
        return (*_around((k, v), size), *sums), None

    rows = q.shape[:2]
    start = (k, v, jnp.full(rows, -1e30), jnp.zeros(rows), jnp.zeros(q.shape))
    (_, _, largest, total, out), _ = jax.lax.scan(turn, start, length=size)
    return (out / total[..., None]).astype(v.dtype), largest + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_on_device(size: int, q, k, v):
    return _ring_forward(size, q, k, v)[0]


def _ring_backward(size: int, saved, grad):
    q, k, v, out, log_sum = saved
    along = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def one_head(args):
        q, k, v, grad, log_sum, along, dq, dk, dv = args
        weights = jnp.exp(_scores(q, k) - log_sum[:, None])
        d_weights = jnp.einsum("nd,md->nm", grad, v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - along[:, None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dq += jnp.einsum("nm,md->nd", d_scores, k, preferred_element_type=jnp.float32)
        dk += jnp.einsum("nm,nd->md", d_scores, q, preferred_element_type=jnp.float32)
        dv += jnp.einsum("nm,nd->md", weights.astype(grad.dtype), grad, preferred_element_type=jnp.float32)
        return dq, dk, dv

    def turn(carry, _):
        k, v, dq, dk, dv = carry
        dq, dk, dv = jax.lax.map(one_head, (q, k, v, grad, log_sum, along, dq, dk, dv))
        k, v, dk, dv = _around((k, v, dk, dv), size)
        return (k, v, dq, dk, dv), None

    nothing = jnp.zeros(q.shape)
    (_, _, *grads), _ = jax.lax.scan(turn, (k, v, nothing, nothing, nothing), length=size)
    return tuple(g.astype(q.dtype) for g in grads)


def _ring_saving(size: int, q, k, v):
    out, log_sum = _ring_forward(size, q, k, v)
    return out, (q, k, v, out, log_sum)


_ring_on_device.defvjp(_ring_saving, _ring_backward)


def ring(q, k, v, *, mesh: jax.sharding.Mesh):
    """Attention on [1, n, heads, d], n cut over the mesh's one axis."""

    def on_device(q, k, v):
        heads = (x[0].swapaxes(0, 1) for x in (q, k, v))
        return _ring_on_device(mesh.size, *heads).swapaxes(0, 1)[None]

    cut = P(None, AXIS)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut, check_vma=False)(q, k, v)


def ways(mesh: jax.sharding.Mesh) -> dict:
    """The ways of computing it, by name."""
    return {"head": functools.partial(attention, implementation="head"), "ring": functools.partial(ring, mesh=mesh)}


def temporaries(way, mesh: jax.sharding.Mesh, tokens: int, heads: int, head_dim: int) -> int:
    """Bytes on each device beyond arguments and results, for value and gradient."""
    placed = NamedSharding(mesh, P(None, AXIS))
    x = jax.ShapeDtypeStruct((1, tokens, heads, head_dim), jnp.bfloat16, sharding=placed)
    value = jax.value_and_grad(lambda *qkv: jnp.square(way(*qkv).astype(jnp.float32)).sum(), (0, 1, 2))
    compiled = jax.jit(value, out_shardings=(None, (placed,) * 3)).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main(_) -> None:
    counts = [int(count) for count in FLAGS.devices]
    # The backend is made at the first question to JAX, which has not been asked yet.
    forced = f"--xla_force_host_platform_device_count={max(counts)} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {forced}"
    jax.config.update("jax_platforms", "cpu")
    print("| tokens | heads | devices | head | ring |\n|---|---|---|---|---|")
    for tokens in map(int, FLAGS.tokens):
        for count in counts:
            mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
            sizes = tokens, FLAGS.heads, FLAGS.head_dim
            found = [f"{temporaries(way, mesh, *sizes) / 1e9:.2f} GB" for way in ways(mesh).values()]
            print(f"| {tokens:,} | {FLAGS.heads} × {FLAGS.head_dim} | {count} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("tokens", "17776,131072", "Lengths of the sequence.")
    flags.DEFINE_list("devices", "1,8", "Devices that it is cut over.")
    flags.DEFINE_integer("heads", 30, "Heads.")
    flags.DEFINE_integer("head_dim", 64, "Channels of a head.")
    app.run(main)
