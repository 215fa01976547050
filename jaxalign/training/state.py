"""What a run is at one step: exactly what a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step; trainable = {'model': student, 'heads': {name: projector}}; optimizer state; EMA of the student; gates.

    The heads have no average: nothing of them is left when videos are sampled. gates: {alignment's name: state} of
    the alignments that a similarity shuts off; most runs have none.
    """

    step: Any  # an int32 scalar; a shape where the state is abstract
    trainable: Any
    opt_state: Any
    ema: Any
    gates: Any


def create_state(trainable, optimizer: optax.GradientTransformation, gates: dict | None = None) -> TrainState:
    """The state at step 0; the average starts as a copy of the student (a copy, since the step donates its input)."""
    ema = jax.tree.map(jnp.copy, trainable["model"])
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), ema, gates or {})


def update_ema(ema, model, step, decay: float):
    """ema + (1 - d)(model - ema) with d = min(decay, (1 + step)/(10 + step)).

    The warmup keeps a short run's average from remembering its random start.
    """
    step = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, model)
