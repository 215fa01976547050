"""A model on a mesh: the same loss and gradients as on one device, in less memory a device."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp

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
