"""A model on a mesh: the same loss and gradients as on one device, in less memory a device."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxalign.models import vdit
from jaxalign.models.placement import keep_rows


def test_cogvideox_on_eight_devices():
    script = pathlib.Path(__file__).with_name("sharded_cogvideox.py")
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache} if cache else None
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("memory") == 1


def test_on_one_device_nothing_is_said():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert "sharding_constraint" not in str(jax.make_jaxpr(keep_rows)(jnp.zeros((4, 3))))


def test_the_blocks_of_vdit_keep_their_rows():
    config = vdit.VDiTConfig(
        input_size=(4, 4), num_frames=2, patch_size=2, in_channels=3, width=16, depth=4, num_heads=2
    )
    model = jax.eval_shape(lambda: vdit.VDiT(config, rngs=nnx.Rngs(0)))
    shapes = jax.ShapeDtypeStruct((8, 2, 4, 4, 3), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)

    def traced():
        return jax.make_jaxpr(lambda model, *inputs: model(*inputs)[0])(model, *shapes)

    alone = str(traced())
    mesh = AbstractMesh((1, 4, 2, 1), ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        (scan,) = (equation for equation in traced().eqns if equation.primitive.name == "scan")
    said = [e.params for e in scan.params["jaxpr"].eqns if e.primitive.name == "sharding_constraint"]
    assert len(said) == 4, "at both ends of the spatial and of the temporal block"
    for params in said:  # frames and positions lie as they did, over context
        assert params["sharding"].spec == P(("fsdp",), P.UNCONSTRAINED, P.UNCONSTRAINED, None), params["sharding"]
    assert "sharding_constraint" not in alone
