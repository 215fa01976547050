"""A hint to the partitioner: what is computed on a sample's tokens stays with the sample.

A model knows no mesh. But where parameters are cut into pieces (fsdp), XLA has to choose, for every scanned block,
between gathering the block's weights and cutting the activations by channels as the weights are cut, and left alone
it takes the latter: in a training step of CogVideoX-2B with 8 clips on 8 devices, each then holds all 8 and needs
55 GB. With the hint at the blocks' borders it is 13 GB, and what is gathered in a block is its weights.
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp")  # the mesh axes that the rows of a batch are spread over
TOKEN_AXIS = "context"


def keep_rows(x: Float[Array, "b *rest"], *, tokens: int | None = None) -> Float[Array, "b *rest"]:
    """x itself, its rows spread over `data` and `fsdp` and its axis `tokens` over `context`, the channels whole.

    The mesh is that of x under jit, or else the ambient one (`jax.set_mesh`); without one, or where the sizes do not
    divide, nothing is said. Axes that are manual already (inside a shard_map) are left alone.
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
    if tokens is not None and x.shape[tokens] % sizes.get(TOKEN_AXIS, 1) == 0:
        spec[tokens] = TOKEN_AXIS if TOKEN_AXIS in sizes else None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))
