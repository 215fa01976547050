"""Run by test_spread.py in a process of its own, on 8 forced CPU devices: prints one line a check, fails loudly."""

import contextlib
import os

# No optimisation: the time goes into compiling, and neither flops nor buffers depend on it.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Threads for every device to wait in several collectives at once: with one each, XLA's CPU client can lock itself up.
os.environ["NPROC"] = "64"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.alignment import relations, sweep
from jaxalign.training.flops import matmul_flops

jax.config.update("jax_default_matmul_precision", "highest")
LOSSES = {
    "trd": lambda s, r, q: relations.relation_l1(s, r, margin=0.1),
    "tsa": lambda s, r, q: relations.tempered_kl(s, r, temperature=0.1),
    "m_tsa": lambda s, r, q: relations.tempered_kl(s, r, temperature=0.1, queries=q),
    "cold": lambda s, r, q: relations.tempered_kl(s, r, temperature=0.02),  # too cold for the bound of a cosine
}


def check(name, sizes, b, t, n, d, spec, ambient=True):
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher = jax.random.normal(keys[0], (b, t, n, d)), jax.random.normal(keys[1], (b, t, n, d + 8))
    queries = jax.random.randint(keys[2], (b, t, n // 5), 0, n)
    cotangent = jnp.arange(1.0, b + 1)

    def step(student, teacher, queries):
        values, vjp = jax.vjp(lambda s: LOSSES[name](s, teacher, queries), student)
        return values, vjp(cotangent)[0]

    def compile_step(*args, **kwargs):
        return jax.jit(step, **kwargs).lower(*args).compile()(*args), matmul_flops(step, *args)

    inputs = student, teacher, queries
    (values, grad), flops_one = compile_step(*inputs)
    assert np.abs(values).min() > 0 and np.abs(grad).max() > 0
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        sharding = NamedSharding(mesh, spec)
        inputs = jax.device_put(student, sharding), jax.device_put(teacher, sharding), queries
        (mesh_values, mesh_grad), flops = compile_step(*inputs, out_shardings=(None, sharding))
    np.testing.assert_allclose(mesh_values, values, rtol=1e-5)
    np.testing.assert_allclose(mesh_grad, grad, atol=1e-5 * np.abs(grad).max())
    print(name, sizes, (b, t, n, d), "flops", flops / flops_one)
    return flops / flops_one


def check_memory(name):
    """Beyond the gathered tokens and the partial gradient, a device of eight needs a sixth of what one alone does."""
    shape = (1, 13, 1350, 768)

    def temporary(devices):
        mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            tokens = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P()))
            queries = jax.ShapeDtypeStruct((1, 13, 270), jnp.int32, sharding=NamedSharding(mesh, P()))
            step = jax.value_and_grad(lambda s, r, q: LOSSES[name](s, r, q).sum())
            return jax.jit(step).lower(tokens, tokens, queries).compile().memory_analysis().temp_size_in_bytes

    one, beyond = temporary(1), temporary(8) - 3 * 4 * np.prod(shape)
    print(name, shape, "memory", beyond / one)
    assert beyond <= one / 6, (name, one, beyond)


for name in ("trd", "tsa", "m_tsa"):
    # One clip for all devices; its 13 frames do not divide by 8.
    flops = check(name, (1, 1, 8, 1), 1, 13, 64, 32, P(None, None, None, "context"))
    assert flops <= 1 / 6, (name, flops)
    check_memory(name)
# 35 tokens fill up to 36, `tensor` works too, and the tokens' own mesh is enough.
check("m_tsa", (2, 1, 2, 2), 2, 5, 7, 8, P("data"), ambient=False)
check("tsa", (2, 1, 4, 1), 3, 3, 6, 8, P())  # a batch that does not divide: all 8 share the work of each
sweep.BLOCK = {"cpu": 32**2, "gpu": 0}  # a pair of frames is more than a block: the devices share its rows
flops = check("tsa", (1, 1, 8, 1), 1, 3, 61, 16, P())  # 61 rows for 8 devices: the last has 5 of 8
assert flops <= 1 / 6, flops
check("trd", (1, 1, 2, 2), 2, 3, 61, 16, P())
check("cold", (2, 1, 4, 1), 2, 3, 61, 16, P("data"))
