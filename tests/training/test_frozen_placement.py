"""Frozen networks are kept in pieces, large arrays only, and shapes are placed as arrays are."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxalign.models.placement import gathered
from jaxalign.training.mesh import AXES, make_mesh, put, spread_frozen


def test_large_arrays_are_cut_along_their_largest_dimension_that_divides():
    shapes = {
        "stacked": (24, 1024, 4096),
        "kernel": (3, 3, 3, 512, 256),
        "odd": (1001, 4096),
        "small": (256, 256),
        "prime": (1_000_003,),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    both = {k: s.spec for k, s in spread_frozen(tree, AbstractMesh((2, 4, 1, 2), AXES)).items()}
    assert both == {
        "stacked": P(None, None, ("fsdp", "tensor")),
        "kernel": P(None, None, None, ("fsdp", "tensor")),
        "odd": P(None, ("fsdp", "tensor")),
        "small": P(),
        "prime": P(),
    }
    seven = spread_frozen({"a": jax.ShapeDtypeStruct((4096, 49 * 64), jnp.float32)}, AbstractMesh((1, 7, 1, 1), AXES))
    assert seven["a"].shard_shape((4096, 49 * 64)) == (4096, 7 * 64)


def test_shapes_stay_shapes_and_arrays_stay_equal():
    mesh = make_mesh(devices=jax.devices()[:1])
    tree = {"shape": jax.ShapeDtypeStruct((512, 1024), jnp.float32), "array": np.arange(2**19, dtype=np.float32)}
    placed = spread_frozen(tree, mesh)
    found = put(tree, placed)
    assert isinstance(found["shape"], jax.ShapeDtypeStruct) and found["shape"].sharding == placed["shape"]
    np.testing.assert_array_equal(found["array"], tree["array"])
    assert found["array"].sharding.is_equivalent_to(placed["array"], 1)
    np.testing.assert_array_equal(jax.jit(gathered)(found["array"]), tree["array"])
