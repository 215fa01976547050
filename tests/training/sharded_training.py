"""Run by test_sharding.py in a process of its own, on 8 forced CPU devices: prints one line a check, fails loudly."""

import os

# No optimisation: the time goes into compiling, and sums of a few numbers do not depend on it.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Threads for every device to wait in several collectives at once: with one each, XLA's CPU client can lock itself up.
os.environ["NPROC"] = "64"

import dataclasses
import functools
import math
import sys
import tempfile
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from configs import base
from jaxalign.alignment.methods import AlignmentSettings
from jaxalign.alignment.projector import ProjectorConfig
from jaxalign.codecs.pixels import Pixels
from jaxalign.diffusion import PROCESSES
from jaxalign.models import MODELS
from jaxalign.models.vdit import PRESETS
from jaxalign.tasks.aligning import Alignment
from jaxalign.tasks.denoising import DenoisingTask
from jaxalign.training import mesh as mesh_lib
from jaxalign.training import prepare
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.mesh import (
    batch_sharding,
    check_batch,
    make_mesh,
    named_leaves,
    process_share,
    spread_clips,
    token_axis,
)
from jaxalign.training.optimizer import make_optimizer
from jaxalign.training.setup import Run
from jaxalign.training.state import TrainState

jax.config.update("jax_default_matmul_precision", "highest")
mesh_lib.WORTH_CUTTING = 0  # the tiny teacher is kept in pieces as a large one is
GRID, PATCH, BATCH = (2, 8, 4), 2, 8
TEXT = (5, 16)  # with the video 69 tokens, which no axis divides
WIDTH = {"vdit": 64, "cogvideox": 128}  # narrower, and biases are more than 2 % of the parameters


class Patches(nnx.Module):
    """A teacher: patches of each frame through a random linear map and tanh."""

    def __init__(self, rngs):
        self.proj = nnx.Conv(3, 12, (PATCH, PATCH), strides=(PATCH, PATCH), rngs=rngs)

    def __call__(self, video):
        b, t, h, w, _ = video.shape
        tokens = jnp.tanh(self.proj(video.reshape(b * t, h, w, 3)))
        return tokens.reshape(b, t, *tokens.shape[1:])


def tiny_run(name: str = "vdit") -> Run:
    """A student of four blocks with M-TSA at its last one; float32."""
    student = MODELS[name]
    t, h, w = GRID
    sizes = dict(input_size=(h * PATCH, w * PATCH), num_frames=t, patch_size=PATCH, in_channels=3, depth=4, num_heads=8)
    text = dict(text_tokens=TEXT[0], text_width=TEXT[1], time_width=64, sample_size=(h * PATCH, w * PATCH))
    model = student.config(**sizes, width=WIDTH[name], **(text if name == "cogvideox" else {}))
    alignment = Alignment(
        name="m_tsa",
        method="m_tsa",
        depth=3,
        grid=GRID,
        teachers=("patches",),
        head=ProjectorConfig(student_width=WIDTH[name], teacher_width=12, hidden=16),
        settings=AlignmentSettings(mask_ratio=0.25),
        weight=lambda step: jnp.float32(0.5),
    )
    task = DenoisingTask(process=PROCESSES["flow"](), alignments=(alignment,), text=name == "cogvideox")
    frozen = {"codec": Pixels(), "teachers": {"patches": Patches(nnx.Rngs(5))}}
    return Run(task, student, model, frozen, (t, h * PATCH, w * PATCH, 3), GRID)


def sgd_that_shows_gradients() -> optax.GradientTransformation:
    """SGD of rate 0.1 whose state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, _, params=None: (jax.tree.map(lambda g: -0.1 * g, grads), grads),
    )


class OnMesh(NamedTuple):
    """A run's own step, compiled for a mesh."""

    mesh: jax.sharding.Mesh
    run: Run
    abstract: TrainState
    compiled: jax.stages.Compiled

    @property
    def temporary(self) -> int:
        """Bytes on each device."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def step(self, state, number: int):
        """(metrics, state) after batch `number`; the state is donated."""
        state, metrics = self.compiled(state, self.run.frozen, batch_for(self, number), jax.random.key(7))
        return {k: float(v) for k, v in metrics.items()}, state


def on_mesh(name: str, **sizes: int) -> OnMesh:
    mesh = make_mesh(**({"data": 1} | sizes), devices=jax.devices()[: math.prod(sizes.values())])
    run, abstract, _ = prepare.lay_out(tiny_run(name), sgd_that_shows_gradients(), mesh)
    config = SimpleNamespace(ema_decay=0.9, optimizer=SimpleNamespace(grad_accum=1))
    step = prepare.compiled_step(config, run, sgd_that_shows_gradients(), abstract)
    built = OnMesh(mesh, run, abstract, None)
    return built._replace(compiled=step.lower(abstract, run.frozen, batch_for(built, 0), jax.random.key(7)).compile())


def batch_for(on: OnMesh, number: int):
    rng = np.random.default_rng(number)
    batch = {"video": rng.integers(0, 256, (BATCH, *on.run.latent_shape), np.uint8), "label": np.zeros(BATCH, np.int32)}
    batch["prompt"] = rng.normal(size=(BATCH, *TEXT)).astype(np.float32)
    return jax.device_put(batch, batch_sharding(on.mesh))


def drawn_state(on: OnMesh):
    """Every leaf random, the zero-initialised ones too."""
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=x.shape, scale=0.1).astype(x.dtype) for x in jax.tree.leaves(on.abstract.trainable)]
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), on.abstract)
    trainable = jax.tree.unflatten(jax.tree.structure(on.abstract.trainable), drawn)
    state = dataclasses.replace(state, trainable=trainable, ema=jax.tree.map(np.copy, trainable["model"]))
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, on.abstract)


def numbers(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def worst(found: dict, wanted: dict) -> float:
    """The largest deviation of a leaf, relative to its largest entry."""
    largest = {k: float(np.abs(value).max()) for k, value in wanted.items()}
    return max(float(np.abs(found[k] - wanted[k]).max()) / largest[k] for k in wanted)


def without_key_biases(grads: dict) -> dict:
    """What is added to all keys of a softmax cancels out: behind CogVideoX's norm of the keys it is rounding only."""
    assert all(np.abs(g).max() < 1e-8 for name, g in grads.items() if name.endswith("norm_k.bias"))
    return {name: g for name, g in grads.items() if not name.endswith("norm_k.bias")}


def check_equality(name: str, meshes: list[dict[str, int]]) -> list[OnMesh]:
    """The first step on one device and on each mesh; what was compiled, the one device's first."""
    one = on_mesh(name, data=1)
    metrics, state = one.step(drawn_state(one), 0)
    grads, params = without_key_biases(numbers(state.opt_state)), numbers(state.trainable)
    assert all(np.abs(g).max() > 0 for g in grads.values()) and metrics["align/m_tsa"] > 0
    compiled = [one]
    for sizes in meshes:
        many = on_mesh(name, **sizes)
        compiled.append(many)
        found, state = many.step(drawn_state(many), 0)
        loss = abs(found["loss"] / metrics["loss"] - 1)
        aligned = abs(found["align/m_tsa"] / metrics["align/m_tsa"] - 1)
        off = [loss, aligned, worst(numbers(state.opt_state), grads), worst(numbers(state.trainable), params)]
        share = many.temporary / one.temporary
        said = " ".join(f"{value:.1e}" for value in (*off, share))
        print(f"same {name} {sizes}: off in loss, alignment, gradients, parameters; share of memory: {said}")
        assert max(off) < 1e-5, (sizes, off)
        assert share < (0.75 if "tensor" in sizes else 0.5), (sizes, share)
    return compiled


def check_restore(one: OnMesh, others: list[OnMesh]) -> None:
    """A checkpoint of one device goes on on a mesh, and the mesh's on one device: the same bits, the same losses."""

    def saved(folder: str, number: int, state) -> dict[str, bytes]:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(number, state)
        return {name: leaf.tobytes() for name, leaf in numbers(state).items()}

    def restored(folder: str, on: OnMesh, number: int, expected: dict[str, bytes]):
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore_latest(on.abstract)
        assert found.step == number and int(found.state.step) == number
        placed = jax.tree.map(lambda x, a: x.sharding == a.sharding, found.state, on.abstract)
        assert all(jax.tree.leaves(placed))
        assert {name: leaf.tobytes() for name, leaf in numbers(found.state).items()} == expected
        return found.state

    with tempfile.TemporaryDirectory() as home:
        state = one.step(drawn_state(one), 0)[1]
        first = saved(f"{home}/one", 1, state)
        second, state = one.step(state, 1)
        third, _ = one.step(state, 2)
        for k, many in enumerate(others):
            assert process_share(many.mesh) == process_share(one.mesh)  # so the batches have the same clips
            there, state = many.step(restored(f"{home}/one", many, 1, first), 1)
            back, _ = one.step(restored(f"{home}/{k}", one, 2, saved(f"{home}/{k}", 2, state)), 2)
            off = abs(there["loss"] / second["loss"] - 1), abs(back["loss"] / third["loss"] - 1)
            sizes = " ".join(f"{axis} {size}" for axis, size in many.mesh.shape.items())
            print(f"restored on {sizes} and back: off in loss by {off[0]:.1e} and {off[1]:.1e}")
            assert max(off) < 1e-5 and abs(second["loss"] / third["loss"] - 1) > 1e-3


def check_memory() -> None:
    """Parameters and optimizer of the real V-DiT-XL with a head, by shape: nothing is allocated."""
    mesh = make_mesh(fsdp=8)
    config = base.get_config("vdit_xl")
    tiny, optimizer = tiny_run(), make_optimizer(config)
    model = dataclasses.replace(tiny.model_config, **PRESETS["XL"], input_size=(128, 128), num_frames=16, patch_size=8)
    head = ProjectorConfig(student_width=model.width, teacher_width=768)
    task = dataclasses.replace(tiny.task, alignments=(dataclasses.replace(tiny.task.alignments[0], head=head),))
    _, abstract, _ = prepare.lay_out(dataclasses.replace(tiny, task=task, model_config=model), optimizer, mesh)
    for what in ("trainable", "opt_state", "ema"):
        leaves = jax.tree.leaves(getattr(abstract, what))
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        mine = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        print(f"memory of {what}: {whole / 1e9:.3f} GB, on each of 8 devices 1/{whole / mine:.2f}")
        assert mine < whole / 6, what


def check_sentences() -> None:
    mesh = make_mesh(data=2, fsdp=2, context=2)
    assert process_share(mesh) == (0, 1)
    check_batch(mesh, 8, grad_accum=2)
    for call, said in (
        (lambda: check_batch(mesh, 8, grad_accum=4), "write a multiple of 16"),
        (lambda: check_batch(make_mesh(), 2), "mesh.data=8 × mesh.fsdp=1: write a multiple of 8"),
        (lambda: token_axis(make_mesh(data=1, context=8), (2, 4, 4)), "context = 8 divides none of the student's"),
    ):
        try:
            call()
        except ValueError as error:
            assert said in str(error), error
        else:
            raise AssertionError(said)
    # 16 x 16 tokens a frame of 5: time does not divide, so rows of the grid are cut, also where h is another number.
    axis = token_axis(mesh, (5, 16, 16))
    place = jax.jit(functools.partial(spread_clips, mesh=mesh, axis=axis))
    assert [place(np.zeros(shape)).sharding.shard_shape(shape) for shape in ((4, 5, 16, 16, 8), (1, 5, 7, 6, 3))] == [
        (1, 5, 8, 16, 8),
        (1, 5, 7, 3, 3),
    ]
    print("sentences")


EVERYTHING = dict(data=2, fsdp=2, context=2)

if __name__ == "__main__":
    if sys.argv[1:] == ["cogvideox"]:
        check_equality("cogvideox", [EVERYTHING, dict(context=8), dict(tensor=2)])
    else:
        check_sentences()
        check_memory()
        one, *meshes = check_equality("vdit", [dict(data=8), dict(fsdp=8), dict(context=8), dict(tensor=2), EVERYTHING])
        check_restore(one, [meshes[1], meshes[4]])
