"""A config on a mesh: the source, the frozen networks and the state in their places, and the step that is compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import optax

from jaxalign.data.clips import Source
from jaxalign.tasks.aligning import init_gates, update_gates
from jaxalign.training import prompts, setup
from jaxalign.training.mesh import check_batch, coverage, make_mesh, shardings, spread_clips, token_axis
from jaxalign.training.optimizer import make_optimizer
from jaxalign.training.state import TrainState, create_state
from jaxalign.training.step import make_step


class Prepared(NamedTuple):
    """What a config stands for on these devices, before anything is allocated but the frozen networks."""

    source: Source
    run: setup.Run
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    abstract: TrainState  # shapes, dtypes and shardings
    fresh: Callable  # key -> TrainState at step 0, made in its shards


def prepare(config: ml_collections.ConfigDict) -> Prepared:
    """Open the source, load what is frozen, lay the state out on the mesh. Raises ValueError or OSError, one line."""
    source = prompts.open_told(config)
    mesh = make_mesh(**config.mesh)
    told = {"given": source.given, "with_text": source.embedded is None}
    run = setup.build(config, num_classes=len(source.classes), mesh=mesh, **told)
    if source.embedded is not None:  # prompts come as embeddings, so does the empty one
        run = dataclasses.replace(run, frozen=run.frozen | {"null_prompt": source.embedded("")})
    check_batch(mesh, config.batch_size, config.optimizer.grad_accum)
    optimizer = make_optimizer(config)
    run, abstract, fresh = lay_out(run, optimizer, mesh)
    return Prepared(source, run, mesh, optimizer, abstract, fresh)


def lay_out(run: setup.Run, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh):
    """The run on a mesh, the state's shapes with their shardings, and what makes the state in its shards from a key.

    Raises ValueError when the rules leave parameters whole that the mesh could split, or the tokens do not divide.
    """
    axis = token_axis(mesh, run.student_grid)
    if mesh.size > 1:
        place = functools.partial(spread_clips, mesh=mesh, axis=axis)
        run = dataclasses.replace(run, task=dataclasses.replace(run.task, place=place))
    run = dataclasses.replace(run, frozen=setup.place_frozen(run.frozen, mesh, run.student.sharding_rules))

    def init(key):
        return create_state(run.init(key), optimizer, init_gates(run.task.alignments))

    abstract = jax.eval_shape(init, jax.random.key(0))
    placed = shardings(abstract, run.sharding_rules, mesh)
    coverage(abstract.trainable, placed.trainable, mesh)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed)
    return run, abstract, jax.jit(init, out_shardings=placed)


def compiled_step(config: ml_collections.ConfigDict, run: setup.Run, optimizer, abstract: TrainState):
    """The jitted training step; the state keeps its placement and its buffers."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = make_step(
        in_place(run.task.loss, placed.trainable),
        optimizer,
        ema_decay=config.ema_decay,
        grad_accum=config.optimizer.grad_accum,
        update_gates=functools.partial(update_gates, run.task.alignments),
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))


def in_place(loss: Callable, placed) -> Callable:
    """`loss(trainable, ...)` whose parameters, and so their gradients, are cut as `placed` says.

    A constraint's cotangent has the same constraint: each device forms its own part of the gradient. And what is cast
    to the compute dtype is the part, so what fsdp gathers is the cast copy and not the fp32 master.
    """

    def constrained(trainable, *rest):
        return loss(jax.lax.with_sharding_constraint(trainable, placed), *rest)

    return constrained
