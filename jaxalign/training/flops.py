"""Flops of a program, counted on its jaxpr: XLA's own count takes a scan's body once and custom calls as nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Flops(NamedTuple):
    """Flops of matrix products and convolutions; `recomputed` of them belong to activations made a second time."""

    total: int
    recomputed: int

    @property
    def model(self) -> int:
        """What the mathematics needs, whatever is saved in memory: the flops of MFU (Chowdhery et al. 2022, app. B)."""
        return self.total - self.recomputed

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.total + other.total, self.recomputed + other.recomputed)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.total * times, self.recomputed * times)


NONE = Flops(0, 0)


def matmul_flops(function: Callable, *args: Any) -> int:
    """Flops of all matrix products and convolutions in a function's jaxpr, times the lengths of their scans.

    Inside a shard_map it counts one device's share. Conditionals count their dearest branch.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, False, False).total


def count(jaxpr: Any) -> Flops:
    """The flops that all devices together make of a jaxpr (`jax.make_jaxpr(f)(*args)`, `jitted.trace(*args).jaxpr`).

    As `matmul_flops`, but what stands in a shard_map is counted for every device that does it. cuDNN's attention, one
    opaque call, counts as the products it is made of; a Pallas kernel once for each point of its grid.
    """
    return _count(getattr(jaxpr, "jaxpr", jaxpr), False, True)


def _count(jaxpr, again: bool, every_device: bool) -> Flops:
    """`again`: the whole jaxpr is a recomputation."""
    total = NONE
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        # jax.checkpoint marks so what its backward pass makes again (jax/_src/ad_checkpoint.py).
        redone = again or "rematted_computation" in str(equation.source_info.name_stack)
        if (own := _own_flops(name, equation, params)) is not None:
            total += Flops(own.total, own.total if redone else own.recomputed)
        elif name == "cond":
            total += max(_count(branch.jaxpr, redone, every_device) for branch in params["branches"])
        else:
            inner = [getattr(p, "jaxpr", p) for p in params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
            for body in inner:
                total += _count(body, redone, every_device) * _times(name, params, every_device)
    return total


def _times(name: str, params: dict, every_device: bool) -> int:
    """How often the jaxprs inside an equation run."""
    if name == "scan":
        return params["length"]
    if name == "shard_map" and every_device:
        return int(np.prod([params["mesh"].shape[axis] for axis in params["newly_manual_axes"]]))
    if name == "pallas_call":
        return int(np.prod(params["grid_mapping"].grid))
    return 1


def _own_flops(name: str, equation, params: dict) -> Flops | None:
    """The flops of an equation that is work itself; None for the others."""
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return Flops(2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted])), 0)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return Flops(2 * equation.outvars[0].aval.size * kernel.size // outputs, 0)
    if name.startswith("dot_product_attention"):  # cuDNN: operands q, k, v, ... [b, n, heads, d] (layout 0) or BNTH
        q, k = (variable.aval for variable in equation.invars[:2])
        product = 2 * q.size * k.shape[1 if params["layout"] == 0 else 2]
        # Forward: scores and mixture. Backward: the four products of the gradient, and the scores again.
        return Flops(5 * product, product) if "bwd" in name else Flops(2 * product, 0)
    return None
