"""What differs between a module here and its PyTorch original, as a short list of rules beside each model.

Without any rule the engine (mapping.py) joins a leaf's path by dots, writes `kernel`, `scale` and `embedding`
as `weight`, and turns a kernel's axes by its rank: linear [in, out] -> [out, in], convolution [*spatial, in,
out] -> [out, in, *spatial] (depthwise ones too: their `in` is 1). `Stack` rules come first; the others then
act in the order of the list, each on the name that the ones before it made. Patterns are regular expressions.

Every rule is invertible by construction: upstream's array is a box of our leaf with its axes permuted and its
shape read differently, so what is written out on export is read back into the same place on import.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stack:
    """Leaves under `path` are stacked over equal blocks; upstream numbers the blocks.

    `path.rest[i]` is upstream's `name.{start + i}.rest`. With `children` = c > 1 the blocks come in groups of
    c with a stack each (attributes '0' ... 'c-1'): `path.j.rest[i]` is `name.{start + c*i + j}.rest`. `name`
    defaults to what `path` matched and may use its groups (`\\1`).
    """

    path: str
    children: int = 1
    name: str | None = None
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Rename:
    """`re.sub(pattern, to, name)`; anchor the pattern with ^ and $ where it must not match inside names."""

    pattern: str
    to: str


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Axes of a matching leaf (after the turn by rank) are permuted: upstream = array.transpose(axes)."""

    pattern: str
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reshape:
    """A matching leaf has another shape upstream, same order of elements; one entry may be -1."""

    pattern: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """One leaf here is several keys upstream: equal parts along `axis` of the turned array.

    `pattern` must match the whole name; `names` may use its groups:
    `Split(r'(.*)\\.qkv\\.(.*)', (r'\\1.q.\\2', r'\\1.k.\\2', r'\\1.v.\\2'))`.
    """

    pattern: str
    names: tuple[str, ...]
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Join:
    """Several leaves here are one key upstream: concatenated along `axis`, ordered by the group `part`.

    `Join(r'(.*)\\.(?P<part>[qkv])\\.(weight|bias)', r'\\1.qkv.\\3', ('q', 'k', 'v'))`.
    """

    pattern: str
    name: str
    order: tuple[str, ...]
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Fixed:
    """An upstream key without a leaf here, of known value: a constant, or a table that the model computes.

    `value` is an array or a function that makes one. With `where`, one key for every upstream name that this
    pattern matches whole; `name` may use its groups. On import the key may be missing; where it is there it
    must have this shape and kind of numbers and, unless `check` is False, these values within `atol`. On export
    it is written, with the file's own numbers where `mapping.kept_arrays` kept them.
    """

    name: str
    value: np.ndarray | Callable[[], np.ndarray]
    where: str | None = None
    check: bool = True
    atol: float = 1e-5

    def array(self) -> np.ndarray:
        return np.asarray(self.value() if callable(self.value) else self.value)


@dataclasses.dataclass(frozen=True)
class Tied:
    """An upstream key that repeats the key `source`: may be missing on import, is written on export."""

    name: str
    source: str


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Upstream keys (whole name) dropped on import, not written on export: the one rule that loses data."""

    pattern: str


Rule = Stack | Rename | Transpose | Reshape | Split | Join | Fixed | Tied | Ignored

# PyTorch's BatchNorm counts its training steps; inference never reads the count, so it is kept beside the module.
BATCH_NORM_COUNTS = Fixed(r"\1.num_batches_tracked", np.zeros((), np.int64), where=r"(.*)\.running_mean", check=False)
