"""One training step, and the diagnostics that look inside one: pure functions of (state, frozen, batch)."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxalign.training.state import TrainState, update_ema


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    grad_accum: int = 1,
    update_gates: Callable = lambda gates, metrics: gates,
):
    """`step(state, frozen, batch, root_key) -> (state, metrics)`; `update_gates(gates, metrics)` follows the loss.

    A step whose loss or gradient is not finite leaves parameters, moments and average as they were and says so in
    `metrics['nonfinite']`; the counter advances all the same, for the counter is the position in the data.
    """

    def gradients(state, frozen, batch, key):
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = gradient(state.trainable, frozen, batch, key, state.step, state.gates)
        return grads, {**metrics, "loss": value}

    def step(state: TrainState, frozen, batch, root_key) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(root_key, state.step)
        grads, metrics = _mean(gradients, state, frozen, batch, key, grad_accum)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = update_ema(state.ema, trainable["model"], state.step, ema_decay)
        new = (trainable, opt_state, ema, update_gates(state.gates, metrics))
        old = (state.trainable, state.opt_state, state.ema, state.gates)
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = {
            **metrics,
            "grad_norm": grad_norm,
            "grad_norm_model": optax.global_norm(grads["model"]),
            "nonfinite": 1.0 - finite.astype(jnp.float32),
        }
        return TrainState(state.step + 1, *kept), metrics

    return step


def _mean(gradients, state, frozen, batch, key, parts: int):
    """The mean of `gradients`, any pytree, over `parts` slices of the batch, one at a time.

    Slice i takes rows i, i + parts, ... : when the batch is split over devices each of them keeps its own rows.
    """
    if parts == 1:
        return gradients(state, frozen, batch, key)
    sliced = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    keys = jax.random.split(key, parts)

    def body(total, part):
        rows, k = part
        out = gradients(state, frozen, rows, k)
        return jax.tree.map(jnp.add, total, out), None

    shapes = jax.eval_shape(lambda: gradients(state, frozen, jax.tree.map(lambda x: x[0], sliced), key))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zero, (sliced, keys))
    return jax.tree.map(lambda x: x / parts, total)


def make_gradient_cosine(denoising: Callable, aligning: Callable, *, grad_accum: int = 1):
    """`f(state, frozen, batch, root_key) -> {name: scalar}`: do denoising and alignment pull the student the same way?

    Cosine and norms of the two gradients on the student's parameters; two backward passes, so it is run now and then
    and not in every step. Slices and draws are those of a step with `grad_accum`, and so is the memory: the two
    gradients, which add up to the step's, are taken one after the other.
    """

    def gradients(state, frozen, batch, key):
        def gradient(loss):
            value = lambda trainable: loss(trainable, frozen, batch, key, state.step, state.gates)[0]  # noqa: E731
            return lambda: jax.grad(value)(state.trainable)["model"]

        # Side by side in one program, each would keep its own tokens for the way back.
        one = functools.partial(jax.lax.switch, branches=(gradient(denoising), gradient(aligning)))
        return jax.lax.map(one, jnp.arange(2))

    def diagnose(state: TrainState, frozen, batch, root_key) -> dict:
        key = jax.random.fold_in(root_key, state.step)
        both = _mean(gradients, state, frozen, batch, key, grad_accum)
        d, a = (jax.tree.map(operator.itemgetter(k), both) for k in range(2))
        dot = sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(d), jax.tree.leaves(a), strict=True))
        norm_d, norm_a = optax.global_norm(d), optax.global_norm(a)
        return {
            "gradients/cosine": dot / jnp.maximum(norm_d * norm_a, 1e-30),
            "gradients/denoising_norm": norm_d,
            "gradients/alignment_norm": norm_a,
        }

    return diagnose
