"""Taps: the blocks whose tokens are wanted. A scan over stacked blocks is cut there, so that no others are kept."""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def checked(taps: Sequence[Any], depth: int) -> tuple[int, ...]:
    """The taps as ascending Python integers, each once; raises ValueError for one that is no block of `depth`."""
    for tap in taps:
        whole = isinstance(tap, numbers.Integral) and not isinstance(tap, bool)
        if not whole or not 0 <= tap < depth:
            raise ValueError(f"taps: {tap!r} is no block of this model; write whole numbers from 0 to {depth - 1}")
    return tuple(sorted({int(tap) for tap in taps}))


def split(stacked: Any, cuts: Sequence[int]) -> list[Any]:
    """The pytree's leading axis cut at the given ends. One split a leaf, so that its gradient is one concatenation."""
    leaves, structure = jax.tree.flatten(stacked)
    sizes = [int(size) for size in np.diff([0, *cuts])]
    pieces = [jax.lax.split(leaf, sizes) for leaf in leaves]
    return [jax.tree.unflatten(structure, piece) for piece in zip(*pieces, strict=True)]
