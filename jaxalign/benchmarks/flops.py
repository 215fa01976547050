"""Flops of a program, counted on its jaxpr: XLA's own count takes a scan's body once and custom calls as nothing."""

import jax
import numpy as np


def matmul_flops(function, *args) -> int:
    """Flops of all matrix products and convolutions in a function's jaxpr, times the lengths of their scans.

    Inside a shard_map it counts one device's share. Conditionals count their dearest branch.
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // outputs
        elif name == "cond":
            total += max(_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = [getattr(p, "jaxpr", p) for p in params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
            total += params.get("length", 1) * sum(map(_flops, inner))
    return total
