"""One engine that carries weights between NNX modules and PyTorch state dicts, both ways, for every network.

Names come from the module's own attributes; `rules.py` says what a model's table may add. Import works key
by key on an abstract module (`jax.eval_shape`): each of upstream's arrays is copied from the mapped file into
its place in a leaf and its pages are let go, so the peak is the model plus one layer's array; leaves that have
a sharding read each device's part only. Export goes leaf by leaf in the same way.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxalign.interop.dtypes import is_floating
from jaxalign.interop.mismatch import check
from jaxalign.interop.rules import Fixed, Join, Rename, Reshape, Rule, Split, Stack, Tied, Transpose

Module = TypeVar("Module")
Arrays = Mapping[str, np.ndarray]

_WEIGHT = ("kernel", "scale", "embedding")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One upstream array (or one part of one) as a place in one leaf.

    upstream = leaf[box].reshape(without the stacked axes).transpose(axes).reshape(shape)
    """

    leaf: str
    dtype: np.dtype
    name: str
    box: tuple[tuple[int, int], ...]  # start and stop on every axis of the leaf
    stacked: int = 0  # this many leading axes of the box have extent 1 and are dropped
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    reshaped: bool = False
    part: tuple[int, int] | None = None  # (axis, position) in an upstream array that several leaves make up

    @property
    def inner(self) -> tuple[int, ...]:
        """Extents in the leaf's own axis order, stacked axes dropped."""
        return tuple(stop - start for start, stop in self.box[self.stacked :])

    def outward(self, leaf: np.ndarray) -> np.ndarray:
        """The upstream array, from the leaf."""
        array = leaf[tuple(slice(*bounds) for bounds in self.box)].reshape(self.inner)
        return np.asarray(array.transpose(self.axes).reshape(self.shape))  # of a single number NumPy makes no array

    def inward(self, array: np.ndarray) -> np.ndarray:
        """The leaf's box, from the upstream array: a view wherever the reshapes allow one."""
        array = array.reshape([self.inner[axis] for axis in self.axes]).transpose(np.argsort(self.axes))
        return array.reshape([stop - start for start, stop in self.box])


# ---- leaf -> pieces ----------------------------------------------------------------------------------------


def named_leaves(module: Any) -> tuple[list[tuple[str, Any]], Any]:
    """(dotted path, leaf) of every leaf, and the tree's structure."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(module)

    def part(entry) -> str:
        return str(next(getattr(entry, a) for a in ("name", "key", "idx") if hasattr(entry, a)))

    named = []
    for path, leaf in flat:
        parts = [part(entry) for entry in path]
        if parts and parts[-1] == "value":  # how an nnx.Variable's content shows in a path
            parts.pop()
        named.append((".".join(parts), leaf))
    return named, treedef


def _stack(piece: _Piece, rule: Stack) -> list[_Piece]:
    match = re.match(rf"{rule.path}\.", piece.name)
    if not match:
        return [piece]
    prefix = match.expand(rule.name) if rule.name is not None else match.group()[:-1]
    rest, child = piece.name[match.end() :], 0
    if rule.children > 1:
        digit, _, rest = rest.partition(".")
        if not digit.isdigit() or int(digit) >= rule.children:
            raise ValueError(f"{rule}: leaf {piece.leaf} has no child 0..{rule.children - 1} there")
        child = int(digit)
    if piece.stacked >= len(piece.box):
        raise ValueError(f"{rule}: leaf {piece.leaf} has no axis left that could be a stack")
    axis, pieces = piece.stacked, []
    for index in range(piece.box[axis][1]):
        box = (*piece.box[:axis], (index, index + 1), *piece.box[axis + 1 :])
        name = f"{prefix}.{rule.start + rule.children * index + child}.{rest}"
        pieces.append(dataclasses.replace(piece, name=name, box=box, stacked=axis + 1))
    return pieces


def _turn(piece: _Piece) -> _Piece:
    """Names the leaf as PyTorch would and turns a kernel's axes by rank."""
    head, _, last = piece.name.rpartition(".")
    rank = len(piece.inner)
    axes = tuple(range(rank))
    if last == "kernel" and rank >= 2:
        axes = (rank - 1, rank - 2, *range(rank - 2))
    name = f"{head}.weight" if head and last in _WEIGHT else "weight" if last in _WEIGHT else piece.name
    shape = tuple(piece.inner[axis] for axis in axes)
    return dataclasses.replace(piece, name=name, axes=axes, shape=shape)


def _apply(piece: _Piece, rule: Rule) -> list[_Piece]:
    if isinstance(rule, Rename):
        return [dataclasses.replace(piece, name=re.sub(rule.pattern, rule.to, piece.name))]
    if not isinstance(rule, (Transpose, Reshape, Split, Join)):
        return [piece]
    match = re.fullmatch(rule.pattern, piece.name)
    if not match:
        return [piece]
    if piece.reshaped and not isinstance(rule, Join):
        raise ValueError(f"{rule}: leaf {piece.leaf} was reshaped before; put Reshape last for it")
    if isinstance(rule, Transpose):
        if sorted(rule.axes) != list(range(len(piece.axes))):
            raise ValueError(f"{rule}: leaf {piece.leaf} has shape {piece.shape} here")
        axes = tuple(piece.axes[axis] for axis in rule.axes)
        return [dataclasses.replace(piece, axes=axes, shape=tuple(piece.inner[axis] for axis in axes))]
    if isinstance(rule, Reshape):
        known, size = math.prod(n for n in rule.shape if n >= 0), math.prod(piece.shape)
        shape = tuple(size // known if n < 0 and known else n for n in rule.shape)
        if math.prod(shape) != size:
            raise ValueError(f"{rule}: leaf {piece.leaf} has shape {piece.shape} here")
        return [dataclasses.replace(piece, shape=shape, reshaped=True)]
    if isinstance(rule, Join):
        if match["part"] not in rule.order:
            raise ValueError(f"{rule}: leaf {piece.leaf} is part {match['part']!r}, not in order")
        part = (rule.axis, rule.order.index(match["part"]))
        return [dataclasses.replace(piece, name=match.expand(rule.name), part=part)]
    axis, count = piece.stacked + piece.axes[rule.axis], len(rule.names)
    start, stop = piece.box[axis]
    if (stop - start) % count:
        raise ValueError(f"{rule}: leaf {piece.leaf} has {stop - start} there, no multiple of {count}")
    step, pieces = (stop - start) // count, []
    for index, name in enumerate(rule.names):
        box = (*piece.box[:axis], (start + index * step, start + (index + 1) * step), *piece.box[axis + 1 :])
        cut = dataclasses.replace(piece, name=match.expand(name), box=box)
        pieces.append(dataclasses.replace(cut, shape=tuple(cut.inner[a] for a in cut.axes)))
    return pieces


@dataclasses.dataclass(frozen=True)
class _Plan:
    leaves: list[tuple[str, Any]]
    treedef: Any
    pieces: dict[str, list[_Piece]]  # by upstream name, parts in order
    fixed: dict[str, Fixed]
    tied: dict[str, str]
    kept: Arrays

    def tables(self, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
        """What has no leaf: as it was kept, or else as its rule makes it."""
        for name, rule in self.fixed.items():
            table = self.kept[name] if name in self.kept else rule.array()
            own = table.dtype if name in self.kept else _cast_to(table.dtype, dtype)
            yield name, np.array(table, dtype=own, order="C")

    def shape(self, name: str) -> tuple[int, ...]:
        pieces = self.pieces[name]
        shape = list(pieces[0].shape)
        if pieces[0].part:
            axis = pieces[0].part[0]
            shape[axis] = sum(piece.shape[axis] for piece in pieces)
        return tuple(shape)


def _plan(module: Any, rules: Sequence[Rule], kept: Arrays | None = None) -> _Plan:
    leaves, treedef = named_leaves(module)
    by_name: dict[str, list[_Piece]] = {}
    for path, leaf in leaves:
        pieces = [_Piece(path, np.dtype(leaf.dtype), path, tuple((0, n) for n in leaf.shape))]
        for rule in rules:
            if isinstance(rule, Stack):
                pieces = [new for piece in pieces for new in _stack(piece, rule)]
        pieces = [_turn(piece) for piece in pieces]
        for rule in rules:
            pieces = [new for piece in pieces for new in _apply(piece, rule)]
        for piece in pieces:
            by_name.setdefault(piece.name, []).append(piece)
    for name, pieces in by_name.items():
        pieces.sort(key=lambda piece: piece.part or (0, 0))
        places = [piece.part[1] if piece.part else 0 for piece in pieces]
        if places != list(range(len(pieces))):
            leaves_of = ", ".join(piece.leaf for piece in pieces[:4])
            raise ValueError(f"the rules make {name!r} out of {leaves_of}: twice the same part, or one lacks")
    fixed: dict[str, Fixed] = {}
    for rule in rules:
        if isinstance(rule, Fixed) and rule.where is None:
            fixed[rule.name] = rule
        elif isinstance(rule, Fixed):
            fixed |= {m.expand(rule.name): rule for name in by_name if (m := re.fullmatch(rule.where, name))}
    tied = {rule.name: rule.source for rule in rules if isinstance(rule, Tied)}
    kept = dict(kept or {})
    if unknown := [name for name in kept if name not in fixed]:
        raise ValueError(f"{unknown[0]!r} was kept of a file, and no rule Fixed of this model is about it")
    return _Plan(leaves, treedef, by_name, fixed, tied, kept)


# ---- the public functions ----------------------------------------------------------------------------------


def upstream_shapes(
    module: Any, rules: Sequence[Rule] = (), *, dtype: Any = None, kept: Arrays | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Upstream's keys with shapes and dtypes, for a module or an abstract one; allocates no leaf.

    `dtype` stands in for that of the floating ones, and `kept` for fixed tables, as in `upstream_arrays`.
    """
    plan = _plan(module, rules, kept)
    shapes = {n: jax.ShapeDtypeStruct(plan.shape(n), _cast_to(ps[0].dtype, dtype)) for n, ps in plan.pieces.items()}
    shapes |= {name: jax.ShapeDtypeStruct(table.shape, table.dtype) for name, table in plan.tables(dtype)}
    return shapes | {name: shapes[source] for name, source in plan.tied.items()}


def _cast_to(own: np.dtype, dtype: Any) -> np.dtype:
    return np.dtype(dtype) if dtype is not None and is_floating(own) else np.dtype(own)


def upstream_arrays(
    module: Any, rules: Sequence[Rule] = (), *, dtype: Any = None, kept: Arrays | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of the state dict, one after the other in the order of our leaves; each is an array of its own.

    Leaves are fetched one by one and nothing is kept, so that a model can be written out without a second copy of
    it in memory. `dtype` casts the floating ones, fixed tables too. `kept`, what `kept_arrays` took from a file, goes
    out as it is. Raises ValueError when a key of it is not known.
    """
    plan = _plan(module, rules, kept)
    by_leaf = _by_leaf(plan)
    tied: dict[str, list[str]] = {}
    for name, source in plan.tied.items():
        tied.setdefault(source, []).append(name)

    def cast(array: np.ndarray) -> np.ndarray:
        return np.array(array, dtype=_cast_to(array.dtype, dtype), order="C")

    waiting: dict[str, list[np.ndarray]] = {}  # parts of a joined key; `_plan` has put its pieces in order

    def whole() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in plan.leaves:
            host = np.asarray(leaf)
            for piece in by_leaf[path]:
                if piece.part is None:
                    yield piece.name, cast(piece.outward(host))
                    continue
                parts = waiting.setdefault(piece.name, [None] * len(plan.pieces[piece.name]))
                parts[piece.part[1]] = cast(piece.outward(host))
                if all(part is not None for part in parts):
                    yield piece.name, np.concatenate(waiting.pop(piece.name), piece.part[0])
        yield from plan.tables(dtype)

    for name, array in whole():
        yield name, array
        for twin in tied.get(name, ()):
            yield twin, array.copy()


def state_dict(
    module: Any, rules: Sequence[Rule] = (), *, dtype: Any = None, kept: Arrays | None = None
) -> dict[str, np.ndarray]:
    """PyTorch state dict of a module in upstream's names, axes and order; as `upstream_arrays`."""
    arrays = dict(upstream_arrays(module, rules, dtype=dtype, kept=kept))
    return {name: arrays[name] for name in upstream_shapes(module, rules)}


def kept_arrays(module: Any, weights: Arrays, rules: Sequence[Rule] = ()) -> dict[str, np.ndarray]:
    """What a file has and no leaf takes, where a rule `Fixed` is about it: copies, number format and all.

    Beside the module they make the way back exact: PyTorch's BatchNorm counts in int64, which JAX leaves hold only with
    jax_enable_x64; and nothing that a program computes reads them.
    """
    return {name: np.array(weights[name], order="C") for name in _plan(module, rules).fixed if name in weights}


def load_state_dict(
    module: Module,
    weights: Arrays,
    rules: Sequence[Rule] = (),
    *,
    dtype: Any = None,
    sharding: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Module:
    """The module with its leaves taken from a PyTorch state dict; `module` may be abstract (jax.eval_shape).

    `weights` maps names to arrays or lazy views. Leaves keep the module's dtypes, or floating ones become `dtype`, or
    with dtype='keep' what the file has. `sharding`: one jax Sharding for all leaves, a pytree of them shaped like the
    module, or a function (dotted leaf path, shape) -> Sharding or None; each device then reads only its part of the
    file. `progress` is called with the count of numbers that were just read.
    Raises ValueError that lists keys nothing takes, leaves nothing fills, shapes that differ, tables that
    differ.
    """
    plan = _plan(module, rules)
    wanted = {name: (plan.shape(name), pieces[0].dtype) for name, pieces in plan.pieces.items()}
    check(wanted, plan.fixed, plan.tied, weights, rules)
    by_leaf, place = _by_leaf(plan), placement(sharding, plan.leaves, plan.treedef)
    release = getattr(weights, "release", lambda: None)  # pages of a mapped file, once they were copied

    def done(count: int) -> None:
        release()
        if progress is not None:
            progress(count)

    loaded = []
    for path, leaf in plan.leaves:
        pieces = by_leaf[path]
        target = np.dtype(leaf.dtype)
        if is_floating(target) and isinstance(dtype, str) and dtype == "keep":
            stored = {weights[piece.name].dtype for piece in pieces}
            target = stored.pop() if len(stored) == 1 else target
        elif is_floating(target) and dtype is not None:
            target = np.dtype(dtype)
        sources = [(piece, _source(plan, weights, piece)) for piece in pieces]
        loaded.append(_place(sources, leaf.shape, target, place(path, leaf.shape), done))
    return jax.tree_util.tree_unflatten(plan.treedef, loaded)


def _by_leaf(plan: _Plan) -> dict[str, list[_Piece]]:
    by_leaf: dict[str, list[_Piece]] = {}
    for piece in (piece for pieces in plan.pieces.values() for piece in pieces):
        by_leaf.setdefault(piece.leaf, []).append(piece)
    return by_leaf


# ---- import in detail --------------------------------------------------------------------------------------


def _source(plan: _Plan, weights: Arrays, piece: _Piece) -> Callable[[], np.ndarray]:
    """Gives the leaf's box as upstream's file has it. Called late: a lazy mapping makes its view then."""

    def get() -> np.ndarray:
        array = np.asarray(weights[piece.name])
        if piece.part:
            axis, position = piece.part
            start = sum(other.shape[axis] for other in plan.pieces[piece.name][:position])
            index = [slice(None)] * array.ndim
            index[axis] = slice(start, start + piece.shape[axis])
            array = array[tuple(index)]
        return piece.inward(array)

    return get


def _place(
    sources: list, shape: tuple[int, ...], dtype: np.dtype, sharding: Any, done: Callable[[int], None]
) -> jax.Array:
    """Fills a leaf, or each device's part of it, from the pieces that overlap it."""

    def fill(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        out = _aligned([stop - start for start, stop in bounds], dtype)
        for piece, get in sources:
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, piece.box, strict=True)]
            if all(start < stop for start, stop in both) or not shape:
                there = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, bounds, strict=True))
                here = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, piece.box, strict=True))
                out[there] = get()[here]
                done(math.prod(stop - start for start, stop in both))
        return out

    if sharding is None:
        return jax.device_put(fill(tuple(slice(None) for _ in shape)))
    return jax.make_array_from_callback(shape, sharding, fill)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes: JAX on CPU then takes it as it is and copies nothing."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def placement(sharding: Any, leaves: list[tuple[str, Any]], treedef: Any) -> Callable[[str, tuple[int, ...]], Any]:
    """(dotted leaf path, shape) -> Sharding or None, for all that `sharding` may be in `load_state_dict`."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return lambda path, shape: sharding
    if jax.tree_util.tree_structure(sharding) == treedef:
        by_path = {path: leaf for (path, _), leaf in zip(leaves, jax.tree_util.tree_leaves(sharding), strict=True)}
        return lambda path, shape: by_path[path]
    if callable(sharding):
        return sharding
    raise ValueError("sharding= must be a Sharding, a pytree of them shaped like the module, or a function")
