"""How a sweep is spread over a mesh: samples over the batch axes, the visits of a sample over all other axes.

The mesh is that of the tokens, or else the ambient one (`jax.set_mesh`), inside or outside of jit; without
one nothing is split. Its axes are Auto; those that are already manual (inside a shard_map) are left alone.
The axes `data` and `fsdp` split the batch where it divides by them, every other axis splits the work
(`context`, and `tensor`, which has nothing else to do here); a batch that does not divide leaves all axes to
the work. Each device gathers a sample's tokens, makes its share of the visits (or, where a pair of frames is
large, its rows of each) and ends with the sum of its own rows of the gradient, so between the devices go the
tokens, once, and the gradient, once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxalign.alignment import sweep
from jaxalign.alignment.tokens import inverse_norm

BATCH_AXES = ("data", "fsdp")


class MeshAxes(NamedTuple):
    """A mesh (None: nothing to split), its axes that split the batch, those that split the work, their size."""

    mesh: jax.sharding.AbstractMesh | None
    batch: tuple[str, ...]
    work: tuple[str, ...]
    parts: int


def mesh_axes(student) -> MeshAxes:
    """The use of the mesh for tokens [b, ...] under jit."""
    mesh = jax.typeof(student).sharding.mesh
    if mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = [name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1]
    if not names:
        return MeshAxes(None, (), (), 1)
    batch = tuple(name for name in names if name in BATCH_AXES)
    if len(student) % _size(mesh, batch):
        batch = ()
    work = tuple(name for name in names if name not in batch)
    return MeshAxes(mesh, batch, work, _size(mesh, work))


def sweep_on_mesh(relation, axes: MeshAxes, gradient: bool, student, teacher, weights, queries):
    """Value [b] and the gradient for the student's tokens [b, N, d] (None unless asked for).

    Tokens are flat and of any length, N being filled up to a multiple of axes.parts; the gradient comes in
    the student's dtype, split over the devices by samples and by rows. queries: None or [b, q] rows of the
    tokens, as many from each frame.
    """
    run = functools.partial(_sweep_on_device, relation, axes, gradient)
    if axes.mesh is None:
        return run(student, teacher, weights, queries)
    samples, tokens = P(axes.batch or None), P(axes.batch or None, axes.work or None)
    return jax.shard_map(
        run,
        mesh=axes.mesh,
        in_specs=(tokens, tokens, P(), samples),
        out_specs=(samples, tokens),
        axis_names=set(axes.batch + axes.work),
        check_vma=False,
    )(student, teacher, weights, queries)


def _sweep_on_device(relation, axes, gradient, student, teacher, weights, queries):
    b, n = len(student), relation.n
    at_once = sweep.choose_batch(b, n)
    if at_once < b:
        parts = jax.tree.map(lambda x: x.reshape(b // at_once, at_once, *x.shape[1:]), (student, teacher, queries))
        run = functools.partial(_sweep_on_device, relation, axes, gradient)
        found = jax.lax.map(lambda part: run(part[0], part[1], weights, part[2]), parts)
        return jax.tree.map(lambda x: x.reshape(b, *x.shape[2:]), found)

    scale = inverse_norm(student)
    s, r = sweep.Tokens(student, scale), sweep.Tokens(teacher, inverse_norm(teacher))
    part = 0
    if axes.work:
        part = jax.lax.axis_index(axes.work)
        s, r = jax.tree.map(functools.partial(_gather_rows, axes), (s, r))
    if queries is None and n * n <= sweep.LARGEST_BLOCK:
        value, grad = sweep.pair_sweep(
            relation, s, r, weights, part=part, parts=axes.parts, axes=axes.work, gradient=gradient
        )
    else:
        value, grad = _sweep_rows(relation, axes.parts, part, gradient, s, r, weights, queries)
    if axes.work:
        value = jax.lax.psum(value, axes.work)
    if not gradient:
        return value, None
    if axes.work:
        grad = _scatter_rows(axes, grad)
    # The sweep took 1/‖x‖ for a constant. Its derivative takes away what would only change the length of x.
    unit = student.astype(jnp.float32) * scale[..., None]
    grad -= unit * jnp.sum(unit * grad, axis=-1, keepdims=True)
    return value, grad.astype(student.dtype)


def _sweep_rows(relation, parts, part, gradient, s, r, weights, queries):
    """This part's share of the queries (None: of all tokens) against all tokens."""
    b, count = len(s.x), relation.t * relation.n
    if queries is None:
        queries = jnp.broadcast_to(jnp.arange(count), (b, count))
    # Every parts-th query; the last ones may be missing and are filled up with rows of weight 0.
    mine = jnp.pad(queries, ((0, 0), (0, -queries.shape[1] % parts))).reshape(b, -1, parts)[:, :, part]
    real = jnp.arange(mine.shape[1]) * parts + part < queries.shape[1]
    # A query's frame is the same in every sample: all have equally many from each frame, in order.
    weights = jnp.where(real[:, None], weights[mine[0] // relation.n], 0)
    return sweep.row_sweep(relation, mine, s, r, weights, parts=parts, gradient=gradient)


# Rows travel with the axis of the devices in front: in a batch of one that is their order in memory, no copy.


def _gather_rows(axes, x):
    x = jnp.moveaxis(jax.lax.all_gather(x, axes.work), 0, 1)  # [b, parts, rows, ...]
    return x.reshape(len(x), -1, *x.shape[3:])


def _scatter_rows(axes, x):
    x = x.reshape(len(x), axes.parts, -1, x.shape[-1])
    return jax.lax.psum_scatter(jnp.moveaxis(x, 1, 0), axes.work)  # [b, rows, d]


def _size(mesh, names) -> int:
    return int(np.prod([mesh.shape[name] for name in names]))
