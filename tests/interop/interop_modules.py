"""Modules and comparisons that the tests of the mapping engine share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Branch(nnx.Module):
    """An attribute holder: Branch(a=module, **{'0': module})."""

    def __init__(self, **children):
        for name, child in children.items():
            setattr(self, name, child)


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def random_like(module, seed=0):
    """The module with every leaf drawn from one stream."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), module)


def leaves_of(**shapes):
    """A module with bare Param leaves of these shapes, numbered."""
    module = Branch()
    for path, shape in shapes.items():
        node = module
        *parents, last = path.split("__")
        for parent in parents:
            if not hasattr(node, parent):
                setattr(node, parent, Branch())
            node = getattr(node, parent)
        setattr(node, last, nnx.Param(jnp.zeros(shape)))
    return random_like(module)
