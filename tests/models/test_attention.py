"""Every formulation of attention is the same function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxalign.models import attention as attention_lib
from jaxalign.models.attention import IMPLEMENTATIONS, attention, choose


def definition(q, k, v):
    """Softmax(q kᵀ / √d) v, in float64 NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


def draw(n, m, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (n, m, m, n)
    # Large scores, so that a softmax without its maximum taken off would overflow.
    return [(8 * jax.random.normal(key, (2, x, 3, 8))).astype(dtype) for key, x in zip(keys, lengths, strict=True)]


def test_every_formulation_has_the_values_and_gradients_of_the_definition():
    *qkv, probe = draw(70, 40)
    names = ("xla", "plain", "head", "auto")
    expected = definition(*qkv)
    assert np.abs(expected).max() > 1

    def plain_softmax(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8), axis=-1)
        return jnp.einsum("bhnm,bmhd->bnhd", weights, v)

    functions = {name: functools.partial(attention, implementation=name) for name in names}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
    def run(*qkv):
        results = {}
        for name, function in (functions | {"definition": plain_softmax}).items():
            out, backward = jax.vjp(function, *qkv)
            results[name] = (out, *backward(probe))
        return results

    results = run(*qkv)
    for name in names:
        np.testing.assert_allclose(results[name][0], expected, atol=2e-5 * np.abs(expected).max())
        for found, wanted in zip(results[name], results["definition"], strict=True):
            assert jnp.abs(wanted).max() > 0.1
            np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()), err_msg=name)


@pytest.mark.parametrize("name", ["xla", "plain", "head"])
def test_half_precision_keeps_an_exact_softmax(name):
    q, k, v, _ = draw(64, 64, jnp.bfloat16)
    found = jax.jit(functools.partial(attention, implementation=name))(q, k, v)
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - definition(q, k, v)).max()
    assert error < 0.02 * np.abs(definition(q, k, v)).max()


def test_heads_one_by_one_hold_one_heads_scores():
    shapes = [jax.ShapeDtypeStruct((1, 512, 8, 16), jnp.float32)] * 3

    def memory(name):
        grad = jax.grad(lambda q, k, v: attention(q, k, v, implementation=name).sum(), argnums=(0, 1, 2))
        return jax.jit(grad).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    scores = 512 * 512 * 4
    assert memory("head") < 4 * scores
    assert memory("plain") > 8 * scores


@pytest.mark.parametrize(
    "platform, capability, dtype, tokens, head_dim, expected",
    [
        ("cpu", "", jnp.float32, 8, 32, "xla"),
        ("cpu", "", jnp.float32, 256, 32, "plain"),
        ("cpu", "", jnp.float32, 1024, 32, "head"),
        ("gpu", "9.0", jnp.bfloat16, 256, 72, "cudnn"),
        ("gpu", "8.0", jnp.float16, 256, 64, "cudnn"),
        ("gpu", "7.5", jnp.bfloat16, 256, 64, "xla"),
        ("gpu", "12.0", jnp.bfloat16, 256, 64, "cudnn"),
        ("gpu", "gfx942", jnp.bfloat16, 256, 64, "xla"),
        ("gpu", "9.0", jnp.float32, 256, 64, "xla"),
        ("gpu", "9.0", jnp.bfloat16, 256, 36, "xla"),
        ("gpu", "9.0", jnp.bfloat16, 16, 64, "xla"),
        ("gpu", "9.0", jnp.float32, 17776, 64, "head"),
        ("tpu", "", jnp.bfloat16, 256, 64, "xla"),
        ("tpu", "", jnp.bfloat16, 4096, 64, "pallas"),
    ],
)
def test_choice(platform, capability, dtype, tokens, head_dim, expected):
    assert choose(platform, capability, jnp.dtype(dtype), tokens, head_dim) == expected
    assert expected in IMPLEMENTATIONS


def test_pallas_kernels_are_left_alone_where_xla_would_have_to_partition_them():
    assert choose("tpu", "", jnp.dtype(jnp.bfloat16), 4096, 64, num_devices=4) == "xla"
    assert choose("tpu", "", jnp.dtype(jnp.bfloat16), 17776, 64, num_devices=4) == "head"


def test_pallas_on_lengths_that_fill_no_block():
    """In the interpreter, against `plain`; and the kernels of a real clip's gradient are lowered for a TPU."""
    q, k, v, probe = (x[:1, :, :1] / 8 for x in draw(70, 40))

    def run(name):
        out, backward = jax.vjp(functools.partial(attention, implementation=name), q, k, v)
        return (out, *backward(probe))

    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(lambda: run("pallas"))()
    for a, b in zip(found, run("plain"), strict=True):
        assert jnp.abs(b).max() > 1e-2
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))

    shapes = [jax.ShapeDtypeStruct((1, 17776, 30, 64), jnp.bfloat16)] * 3
    gradient = jax.jit(jax.grad(lambda *qkv: attention(*qkv, implementation="pallas").sum(), argnums=(0, 1, 2)))
    assert jax.export.export(gradient, platforms=["tpu"])(*shapes).mlir_module().count("tpu_custom_call") == 3


def test_a_real_clip_fits_head_by_head():
    """CogVideoX-2B's 17,776 tokens and 30 heads: the gradient as compiled here, without running it."""
    shapes = [jax.ShapeDtypeStruct((1, 17776, 30, 64), jnp.bfloat16)] * 3
    gradient = jax.grad(lambda *qkv: attention(*qkv, implementation="head").sum(), argnums=(0, 1, 2))
    assert jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 7e9


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'flash' is not known; write one of"):
        attention(*(jnp.zeros((1, 4, 1, 8)),) * 3, implementation="flash")


def test_a_head_in_parts_is_the_whole_head():
    q, k, v, probe = (x[:, :, 0] for x in draw(64, 40))

    @jax.jit
    def run(*qkv):
        ways = attention_lib._core, functools.partial(attention_lib._in_parts, 4)
        return [(out, *backward(probe)) for out, backward in (jax.vjp(way, *qkv) for way in ways)]

    for wanted, found in zip(*run(q, k, v), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
    half = jax.eval_shape(functools.partial(attention_lib._in_parts, 4), *(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert half.dtype == jnp.bfloat16 and half.shape == q.shape


def test_long_heads_come_in_parts_that_devices_can_share():
    assert attention_lib._num_parts(4096, 4096) == 1
    assert attention_lib._num_parts(17_776, 17_776) == 2  # 4 would leave no whole number for each of 8 devices
    assert attention_lib._num_parts(17_775, 17_775) == 1
    assert attention_lib._num_parts(131_072, 131_072) == 128
