"""Run by test_placement.py in a process of its own, on 8 forced CPU devices: prints one line a check, fails loudly."""

import os
import re

# No optimisation: the time goes into compiling.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Threads for every device to wait in several collectives at once: with one each, XLA's CPU client can lock itself up.
os.environ["NPROC"] = "64"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models import cogvideox

jax.config.update("jax_default_matmul_precision", "highest")
AXES = ("data", "fsdp", "context", "tensor")
CONFIG = cogvideox.CogVideoXConfig(
    input_size=(16, 16),
    num_frames=4,
    width=32,
    depth=3,
    num_heads=2,
    in_channels=4,
    text_tokens=7,  # 263 tokens in all: an odd number, which context=2 has to cut unevenly
    text_width=16,
    time_width=16,
    positions="rotary",
    remat=True,
    attention="head",
)


def place(module, mesh):
    def sharding(path, leaf):
        name = jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        return NamedSharding(mesh, next(spec for rule, spec in cogvideox.SHARDING_RULES if re.search(rule, name)))

    return jax.tree_util.tree_map_with_path(sharding, module)


def objective(model, latents, timesteps, text):
    out, tokens = model(latents, timesteps, text, taps=(1,))
    return jnp.square(out).mean() + jnp.sin(tokens[1]).mean()


def measure(args, **kwargs):
    compiled = jax.jit(jax.value_and_grad(objective), **kwargs).lower(*args).compile()
    return compiled(*args), compiled.memory_analysis().temp_size_in_bytes


def draw(shape, seed):
    return jnp.asarray(0.3 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


abstract = jax.eval_shape(lambda: cogvideox.CogVideoX(CONFIG, rngs=nnx.Rngs(0)))
leaves, structure = jax.tree.flatten(abstract)
model = jax.tree.unflatten(structure, [draw(leaf.shape, seed) for seed, leaf in enumerate(leaves)])
data = (draw((4, 4, 16, 16, 4), 100), jnp.array([3.0, 400.0, 700.0, 999.0]), draw((4, 7, 16), 101))
(loss, grads), memory_one = measure((model, *data))
assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))

mesh = jax.make_mesh((1, 2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
placed, rows = place(abstract, mesh), NamedSharding(mesh, P(("data", "fsdp")))
args = jax.device_put(model, placed), *(jax.device_put(x, rows) for x in data)
(mesh_loss, mesh_grads), memory = measure(args, out_shardings=(None, placed))
np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
for found, expected in zip(jax.tree.leaves(mesh_grads), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
print("loss", float(loss), "memory", memory / memory_one)
assert memory < 0.3 * memory_one, memory / memory_one
