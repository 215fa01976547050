"""One step: accumulation equals the whole batch, a non-finite step changes nothing, the average warms up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from jaxalign.training import optimizer as optimizer_lib
from jaxalign.training.state import create_state, update_ema
from jaxalign.training.step import make_gradient_cosine, make_step


def quadratic(trainable, frozen, batch, key, step, gates):
    error = batch["x"] @ trainable["model"]["kernel"] - batch["y"]
    loss = jnp.mean(error**2)
    return loss, {"denoising": loss}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    batch = {"x": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), "y": jnp.ones(8)}
    return {"model": {"kernel": jnp.ones(3)}, "heads": {}}, batch


def test_accumulated_slices_equal_the_batch(problem):
    trainable, batch = problem
    sgd = optax.sgd(0.1)
    states = []
    for parts in (1, 4):
        step = jax.jit(make_step(quadratic, sgd, ema_decay=0.9, grad_accum=parts))
        state, metrics = step(create_state(trainable, sgd), {}, batch, jax.random.key(0))
        states.append((state.trainable["model"]["kernel"], metrics["loss"]))
    np.testing.assert_allclose(states[0][0], states[1][0], rtol=1e-6)
    np.testing.assert_allclose(states[0][1], states[1][1], rtol=1e-6)


def test_a_non_finite_step_is_not_applied(problem):
    trainable, batch = problem
    adam = optax.adam(0.1)
    state = create_state(trainable, adam)
    step = jax.jit(make_step(quadratic, adam, ema_decay=0.9))
    after, metrics = step(state, {}, {**batch, "y": batch["y"].at[0].set(jnp.nan)}, jax.random.key(0))
    assert metrics["nonfinite"] == 1 and int(after.step) == 1
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if old.shape or old.dtype != jnp.int32:
            np.testing.assert_array_equal(old, new)
    after, metrics = step(after, {}, batch, jax.random.key(0))
    assert metrics["nonfinite"] == 0 and np.isfinite(after.trainable["model"]["kernel"]).all()


def test_the_average_warms_up():
    ema = {"w": jnp.zeros(())}
    assert float(update_ema(ema, {"w": jnp.ones(())}, jnp.asarray(0), 0.999)["w"]) == pytest.approx(0.9)
    assert float(update_ema(ema, {"w": jnp.ones(())}, jnp.asarray(10**6), 0.999)["w"]) == pytest.approx(0.001, rel=1e-3)


def test_schedules_start_and_end_where_they_say():
    config = base.get_config()
    config.steps = 100
    config.optimizer.update(learning_rate=1.0, warmup_steps=10)
    for kind, end in (("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)):
        config.optimizer.schedule = kind
        rate = optimizer_lib.learning_rate(config)
        assert float(rate(0)) == pytest.approx(0.1) and float(rate(10)) == pytest.approx(1.0)
        assert float(rate(100)) == pytest.approx(end, abs=1e-6)


def test_late_clipping_and_decay_of_kernels_only():
    config = base.get_config()
    config.optimizer.update(schedule="constant", warmup_steps=0, grad_clip=0.1, grad_clip_from=1, weight_decay=0.5)
    config.optimizer.update(b1=0.0, b2=0.0, eps=1.0, learning_rate=1.0)  # update = g / (|g| + 1): the clip shows
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((3, 2))}}
    optimizer = optimizer_lib.make_optimizer(config)
    state = optimizer.init(params)
    grads = jax.tree.map(lambda p: 10 * jnp.ones_like(p), params)
    first, state = optimizer.update(grads, state, params)
    second, _ = optimizer.update(grads, state, params)
    assert float(first["a"]["bias"][0, 0]) == pytest.approx(-10 / 11, rel=1e-5)
    assert abs(float(second["a"]["bias"][0, 0])) < 0.1
    assert float(first["a"]["kernel"][0, 0]) == pytest.approx(-10 / 11 - 0.5, rel=1e-5)


def opposite(*arguments):
    return -2 * quadratic(*arguments)[0], {}


@pytest.mark.parametrize("parts", [1, 4])
def test_gradient_cosine(problem, parts):
    trainable, batch = problem
    state = create_state(trainable, optax.sgd(0.1))
    rows = []

    def seen(trainable, frozen, batch, *rest):
        rows.append(batch["x"].shape[0])
        return quadratic(trainable, frozen, batch, *rest)

    found = make_gradient_cosine(seen, opposite, grad_accum=parts)(state, {}, batch, jax.random.key(0))
    assert set(rows) == {8 // parts}, "no more at once than a step has"
    assert float(found["gradients/cosine"]) == pytest.approx(-1, abs=1e-6)
    whole = optax.global_norm(jax.grad(lambda t: quadratic(t, {}, batch, None, None, None)[0])(trainable))
    assert float(found["gradients/denoising_norm"]) == pytest.approx(float(whole), rel=1e-6)
    assert float(found["gradients/alignment_norm"]) == pytest.approx(2 * float(whole), rel=1e-6)


def test_the_two_gradients_take_the_memory_of_one(problem):
    trainable, batch = problem

    def deep(slope, trainable, frozen, batch, key, step, gates):
        def layer(x, _):
            return jnp.tanh(slope * x @ w), None

        w = trainable["model"]["kernel"][:, None] * jnp.ones(3)
        x, _ = jax.lax.scan(layer, batch["x"], length=64)
        return jnp.mean(x**2), {}

    state = create_state(trainable, optax.sgd(0.1))
    losses = (functools.partial(deep, slope) for slope in (0.5, 0.7))
    both = jax.jit(make_gradient_cosine(*losses)).lower(state, {}, batch, jax.random.key(0)).compile()
    one = jax.jit(jax.grad(lambda t: deep(0.5, t, {}, batch, None, None, None)[0])).lower(trainable).compile()
    assert both.memory_analysis().temp_size_in_bytes < 1.5 * one.memory_analysis().temp_size_in_bytes
