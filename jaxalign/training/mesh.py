"""Device meshes and sharding rules: which array lives on which device, decided by parameter paths.

The axes are always these four, in this order, whatever their sizes (design.md, "Flax, the pure way"):

    data      copies of the model, each with its own rows of the batch
    fsdp      parameters, gradients and optimizer states cut into pieces; the batch is split over it too
    context   the tokens of one clip
    tensor    heads and hidden channels of one layer

Meshes are Auto: XLA propagates the shardings and inserts the collectives; model code stays free of meshes. What
steers it stands in four places: the parameters and their gradients (`shardings`), the batch (`batch_sharding`), what
the student and the teachers are fed and the tokens that are tapped (`spread_clips`), and the relation losses, which
split their own work (alignment/spread.py).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")  # the rows of a batch are spread over both
PARAMETER_AXES = ("fsdp", "tensor")  # the axes that can cut a parameter
WORTH_CUTTING = 2**20  # bytes of a frozen array; the gathering of smaller ones costs more than it saves

Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    dcn: int = -1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The Auto mesh over `devices` (default: all, of every process); an axis of -1 takes what is left.

    Where devices form several slices, joined by a slower network, `data` and then `fsdp` go from slice to slice
    (`arrange`); `dcn` is how many slices there are: -1 as many as the devices say, 1 takes all devices for one slice.
    Raises ValueError when the sizes do not multiply to the number of devices, or slices cut what must not be cut.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, context, tensor), strict=True))
    wanted = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in (*sizes.values(), dcn)):
        raise ValueError(
            f"mesh ({wanted}, dcn={dcn}): every size must be a positive number, or -1 to take what is left"
        )
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh ({wanted}): only one axis can be -1; give {' or '.join(free)} a number")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and len(devices) != fixed):
        remedy = "" if free else "; set one axis to -1 to let it fill"
        raise ValueError(f"mesh ({wanted}) does not fit {len(devices)} device(s): needs {fixed}{remedy}")
    if free:
        sizes[free[0]] = len(devices) // fixed
    return Mesh(arrange(devices, tuple(sizes.values()), dcn), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices(devices: Sequence[Any], dcn: int = -1) -> list[list[Any]]:
    """The devices by slice: a TPU slice, or GPUs with NVLink between them; `dcn` as in `make_mesh`.

    Devices that do not say where they are (CPUs) are one slice; with `dcn` of several, that many equal parts of them
    in order. Raises ValueError when the slices are not `dcn`, or not equally large.
    """
    found: dict[int, list[Any]] = {}
    for device in devices:
        index = getattr(device, "slice_index", None)  # on GPUs too; other platforms have none, or None
        found.setdefault(0 if index is None else index, []).append(device)
    groups = [found[index] for index in sorted(found)]
    if dcn == 1:
        return [[device for group in groups for device in group]]
    if dcn > 1 and len(groups) == 1 and len(devices) % dcn == 0:
        size = len(devices) // dcn
        groups = [list(devices[start : start + size]) for start in range(0, len(devices), size)]
    told = len(groups) if dcn == -1 else dcn
    if len(groups) != told or len({len(group) for group in groups}) > 1:
        sizes = ", ".join(str(len(group)) for group in groups)
        raise ValueError(
            f"mesh.dcn = {dcn}, but there are {len(groups)} slice(s) of {sizes} devices: use slices of one size and"
            " mesh.dcn=-1, or mesh.dcn=1 to take all devices for one slice"
        )
    return groups


def arrange(devices: Sequence[Any], sizes: tuple[int, int, int, int], dcn: int = -1) -> np.ndarray:
    """Which device stands where in a mesh of `sizes` (data, fsdp, context, tensor).

    The outer part of `data`, and of `fsdp` if that is not enough, counts slices: gradients and parameters go over the
    slow network, once a step; `context` and `tensor`, which talk in every layer, stay inside a slice. Raises
    ValueError when they cannot. Source: jax.experimental.mesh_utils.create_hybrid_device_mesh.
    """
    groups = slices(devices, dcn)
    outer, left = [1] * len(AXES), len(groups)
    for k in range(len(BATCH_AXES)):  # the first axes
        outer[k] = math.gcd(sizes[k], left)
        left //= outer[k]
    if left > 1:
        wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"mesh ({wanted}): there are {len(groups)} slices of {len(groups[0])} devices, and mesh.data × mesh.fsdp ="
            f" {sizes[0] * sizes[1]} cannot count them, so tokens or heads would be cut across the slow network: give"
            " mesh.context and mesh.tensor fewer devices, or write mesh.dcn=1 to take all devices for one slice"
        )
    inner = [size // part for size, part in zip(sizes, outer, strict=True)]
    if dcn == 1 and len({getattr(device, "slice_index", None) for device in devices}) > 1:
        return np.asarray(groups[0]).reshape(sizes)  # no torus that JAX could lay the mesh on
    # As jax.make_mesh, which refuses several slices.
    split = {"allow_split_physical_axes": devices[0].device_kind in ("TPU v5 lite", "TPU v5e")}
    blocks = np.empty(outer, dtype=object)
    for place, group in zip(np.ndindex(*outer), groups, strict=True):
        blocks[place] = mesh_utils.create_device_mesh(inner, group, **split)
    return np.block(blocks.tolist())


def path_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, e.g. `params.blocks.attn.qkv.kernel`.

    `path` is a key path of `jax.tree_util`. NNX variables add a last `.value`, which is stripped: a name is
    the same for a module, for its gradients and for a plain dict of arrays.
    """
    parts = []
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            parts.append(key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            parts.append(str(key.idx))
        else:  # DictKey, FlattenedIndexKey
            parts.append(str(key.key))
    if len(parts) > 1 and parts[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        parts.pop()
    return ".".join(parts)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by dotted name, in tree order; ValueError if two leaves get the same name."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in leaves:
            raise ValueError(f"two leaves of the tree are both called {name!r}: rename one of them")
        leaves[name] = leaf
    return leaves


def _fitting(axes: Any, size: int, mesh: Mesh | AbstractMesh) -> Any:
    """The leading axes of one entry of a spec that divide a dimension; None when even the first does not."""
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    kept: list[str] = []
    for name in names:
        if size % math.prod(mesh.shape[axis] for axis in (*kept, name)):
            break
        kept.append(name)
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else tuple(kept)


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of `tree` (arrays or ShapeDtypeStructs), in the same structure.

    `rules` is an ordered list of (regex, PartitionSpec); the first regex found anywhere in the leaf's
    dotted name wins, so one list serves parameters, EMA and optimizer moments alike. A leaf no rule matches
    is replicated (`coverage` complains if that was much), and so is a dimension that the axis sizes do not
    divide. Raises ValueError for a spec with more entries than the leaf has dimensions or with an unknown
    axis.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    for pattern, spec in compiled:
        for axes in spec:
            unknown = {axes} if isinstance(axes, str) else set(axes or ())
            if unknown := unknown - set(mesh.axis_names):
                raise ValueError(
                    f"sharding rule {pattern.pattern!r}: no mesh axis called {', '.join(sorted(unknown))};"
                    f" the axes are {', '.join(mesh.axis_names)}"
                )

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, shape = path_name(path), tuple(getattr(leaf, "shape", ()))
        pattern, spec = next(((p, s) for p, s in compiled if p.search(name)), (None, PartitionSpec()))
        if len(spec) > len(shape):
            raise ValueError(f"sharding rule {pattern.pattern!r}: {spec} is too long for {name}, {shape}")
        entries = [_fitting(axes, size, mesh) for axes, size in zip(spec, shape, strict=False)]
        while entries and entries[-1] is None:  # P(None, None) places as P() does: keep one spelling
            entries.pop()
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree_util.tree_map_with_path(place, tree)


def coverage(tree: Any, placed: Any, mesh: Mesh, *, limit: float = 0.02) -> float:
    """The fraction of parameters (elements) that no axis cuts, on a mesh that could; 0.0 on any other.

    `tree` and `placed` are as in and out of `shardings`. Raises ValueError with the largest offenders when
    the fraction exceeds `limit`: a regex that stopped matching would otherwise cost memory silently.
    """
    if all(mesh.shape[axis] == 1 for axis in PARAMETER_AXES):
        return 0.0
    total, whole = 0, {}
    where = named_leaves(placed)
    for name, leaf in named_leaves(tree).items():
        size = math.prod(getattr(leaf, "shape", ()))
        total += size
        if where[name].shard_shape(tuple(leaf.shape)) == tuple(leaf.shape):
            whole[name] = size
    fraction = sum(whole.values()) / max(total, 1)
    if fraction > limit:
        worst = sorted(whole, key=whole.__getitem__, reverse=True)
        names = ", ".join(f"{name} ({whole[name]:,})" for name in worst[:8])
        more = f" and {len(worst) - 8} more" if len(worst) > 8 else ""
        raise ValueError(
            f"{fraction:.1%} of the parameters are left whole on a mesh with"
            f" {', '.join(f'{axis}={mesh.shape[axis]}' for axis in PARAMETER_AXES)}"
            f" (limit {limit:.0%}): {names}{more};"
            " add sharding rules for them or set mesh.fsdp=1 and mesh.tensor=1"
        )
    return fraction


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The placement of a batch: the leading dimension over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, grad_accum: int = 1) -> None:
    """ValueError unless every row of the mesh gets equally many clips of each part of the batch."""
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (rows * grad_accum):
        parts = f" in {grad_accum} parts (optimizer.grad_accum)" if grad_accum > 1 else ""
        raise ValueError(
            f"config.batch_size = {batch_size}{parts} cannot be spread over mesh.data={mesh.shape['data']} ×"
            f" mesh.fsdp={mesh.shape['fsdp']}: write a multiple of {rows * grad_accum}, or give some of the"
            f" {mesh.size} devices to mesh.context or mesh.tensor"
        )


def process_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(i, n): process `process` (default: this one) holds the i-th of n equal parts of every global batch.

    Processes that differ in `context` or `tensor` only hold the same rows. Raises ValueError when the rows of a
    process are not next to each other in the batch, which no config but one with devices in a strange order gives.
    """
    process = jax.process_index() if process is None else process
    rows = mesh.devices.reshape(math.prod(mesh.shape[axis] for axis in BATCH_AXES), -1)
    mine = [k for k, devices in enumerate(rows) if any(device.process_index == process for device in devices)]
    first, count = mine[0], len(mine)
    if mine != list(range(first, first + count)) or len(rows) % count or first % count:
        raise ValueError(
            f"the batch rows of process {process} are {mine} of {len(rows)}, which is no contiguous share: choose"
            " mesh.data and mesh.fsdp so that their product is a multiple (or a divisor) of the number of processes"
        )
    return first // count, len(rows) // count


def token_axis(mesh: Mesh, grid: tuple[int, int, int]) -> int:
    """Which dimension of tokens [b, t, h, w, d] the axis `context` cuts: the first of t, h, w that it divides.

    Raises ValueError when it divides none of them.
    """
    context = mesh.shape["context"]
    for axis, size in enumerate(grid, start=1):
        if size % context == 0:
            return axis
    raise ValueError(
        f"config.mesh.context = {context} divides none of the student's tokens (t, h, w) = {grid}:"
        " write a divisor of one of them"
    )


def spread_clips(x: jax.Array, *, mesh: Mesh, axis: int) -> jax.Array:
    """Video, latents or tokens [b, t, h, w, c] under jit: rows over `data` and `fsdp`, dimension `axis` over `context`.

    A network that gets its input so, and knows no mesh, computes on its own rows and tokens: XLA carries the
    placement through everything that works on single tokens and gathers the keys and values where attention mixes
    tokens of several devices. A dimension that is not divided stays whole; another of t, h, w is cut in its place.
    """
    entries = [_fitting(BATCH_AXES, x.shape[0], mesh), None, None, None, None]
    for candidate in (axis, 1, 2, 3):
        if x.shape[candidate] % mesh.shape["context"] == 0:
            entries[candidate] = "context"
            break
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*entries)))


def spread_frozen(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every leaf of a network that is only read: large ones cut over `fsdp` and `tensor`.

    A leaf of WORTH_CUTTING bytes or more is cut along the largest of its dimensions that divides; the others are whole.
    """

    def place(leaf):
        shape = tuple(leaf.shape)
        entries: list[Any] = [None] * len(shape)
        if math.prod(shape) * leaf.dtype.itemsize >= WORTH_CUTTING:
            for axis in sorted(range(len(shape)), key=lambda k: -shape[k]):
                if axes := _fitting(PARAMETER_AXES, shape[axis], mesh):
                    entries[axis] = axes
                    break
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of something that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a pytree whole on every device; as `put`."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def put(tree: Any, placed: Any) -> Any:
    """The arrays of a pytree where `placed`, shardings in the same structure, says.

    Every process gives the same arrays whole (nobody compares them). Shapes (ShapeDtypeStruct) stay shapes, placed.
    """

    def place(x, sharding):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, placed)


def fetch(tree: Any) -> Any:
    """The arrays of a pytree as NumPy, whole, on every process; all processes must call it."""

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)
