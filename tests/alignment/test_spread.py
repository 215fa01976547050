"""The relation losses on a mesh equal those of one device, and each device does its share."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp

from jaxalign.alignment.spread import MeshAxes, mesh_axes


def test_on_eight_devices():
    script = pathlib.Path(__file__).with_name("sharded_relations.py")
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache} if cache else None
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("flops") == 8 and run.stdout.count("memory") == 3


def test_on_one_device_nothing_is_split():
    nothing = MeshAxes(None, (), (), 1)
    assert mesh_axes(jnp.zeros((4, 3))) == nothing
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert jax.eval_shape(lambda x: x if mesh_axes(x) == nothing else None, jnp.zeros((4, 3))) is not None
