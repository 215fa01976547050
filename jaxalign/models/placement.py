"""A hint to the partitioner: what is computed on a sample's tokens stays with the sample.

A model knows no mesh. But where parameters are cut into pieces (fsdp), XLA has to choose, for every scanned block,
between gathering the block's weights and cutting the activations by channels as the weights are cut, and left alone
it takes the latter: in a training step of CogVideoX-2B with 8 clips on 8 devices, each then holds all 8 and needs
55 GB. With the hint at the blocks' borders it is 13 GB, and what is gathered in a block is its weights. (A training
step of V-DiT does without; sampling from it and the cosine of its two gradients take 5 to 6 times the memory.)
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp")  # the mesh axes that the rows of a batch are spread over
TOKEN_AXIS = "context"
# Text and video in one sequence seldom divide (226 + 44,880 tokens: by 2). From so many tokens a device on, XLA may as
# well fill the last device's up: that costs one in eight at most, and the axis would do nothing otherwise.
_ENOUGH = 8


def keep_rows(x: Float[Array, "b *rest"], *, tokens: int | None = None) -> Float[Array, "b *rest"]:
    """x itself, its rows spread over `data` and `fsdp` and its axis `tokens` over `context`, the channels whole.

    The mesh is that of x under jit, or else the ambient one (`jax.set_mesh`); without one, or where the rows do not
    divide, nothing is said. Tokens need not divide if there are enough of them. Axes that are manual already (inside
    a shard_map) are left alone.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    sizes = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}
    if not sizes:
        return x
    batch = tuple(name for name in BATCH_AXES if name in sizes)
    spec = [P.UNCONSTRAINED] * (x.ndim - 1) + [None]
    if x.shape[0] % math.prod(sizes[name] for name in batch) == 0:
        spec[0] = batch or None
    if tokens is not None and _can_be_cut(x, tokens, sizes.get(TOKEN_AXIS, 1)):
        spec[tokens] = TOKEN_AXIS if TOKEN_AXIS in sizes else None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def gathered(tree):
    """The arrays of a pytree whole on every device, where they are used: of a network that is kept in pieces.

    For a frozen network that knows nothing of meshes, convolutions above all: its weights come together before it
    runs and are dropped behind it. The mesh is that of the arrays under jit; without one nothing is said.
    """

    def whole(x):
        mesh = jax.typeof(x).sharding.mesh
        return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))

    return jax.tree.map(whole, tree)


def _can_be_cut(x: Array, axis: int, parts: int) -> bool:
    """Whether an axis divides, or, under jit, which may cut unevenly, is long enough."""
    return x.shape[axis] % parts == 0 or (isinstance(x, jax.core.Tracer) and x.shape[axis] >= _ENOUGH * parts)
