"""Position tables, embeddings and the recomputed pieces of models/layers.py, against their plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.models import layers, positions
from jaxalign.models.vdit import unpatchify


def test_sincos_1d_by_its_formula():
    table = positions.sincos_1d(8, np.array([0, 1, 5]))
    for row, position in enumerate((0, 1, 5)):
        angles = [position / 10000 ** (i / 4) for i in range(4)]
        np.testing.assert_allclose(table[row], np.r_[np.sin(angles), np.cos(angles)], atol=1e-7)
    with pytest.raises(ValueError, match="even width, got 7"):
        positions.sincos_1d(7, np.arange(3))


def test_sincos_2d_puts_the_column_first_in_raster_order():
    table = positions.sincos_2d(12, 2, 5).reshape(2, 5, 12)
    line = positions.sincos_1d(6, np.arange(5))
    for row in range(2):
        for column in range(5):
            np.testing.assert_array_equal(table[row, column], np.r_[line[column], line[row]])
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        positions.sincos_2d(6, 2, 2)


def test_timestep_frequencies_are_cos_then_sin():
    found = layers.timestep_frequencies(jnp.array([0.5, 999.0]), 6)
    angles = np.array([[0.5], [999.0]]) * 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(found, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=1e-4)
    np.testing.assert_array_equal(
        layers.timestep_frequencies(jnp.array([7]), 4), layers.timestep_frequencies(jnp.array([7.0]), 4)
    )
    with pytest.raises(ValueError, match="5 channels are odd"):
        layers.timestep_frequencies(jnp.zeros(1), 5)


def test_layer_norm_is_fp32_inside():
    x = 100 + jax.random.normal(jax.random.key(0), (3, 64))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.layer_norm(x), expected, atol=1e-4)
    faint = jnp.array([[1e-3, -1e-3]])  # as large as epsilon, so the result is 1/√2
    np.testing.assert_allclose(layers.layer_norm(faint), [[0.5**0.5, -(0.5**0.5)]], atol=1e-5)
    half = layers.layer_norm(x.astype(jnp.bfloat16))
    exact = layers.layer_norm(x.astype(jnp.bfloat16).astype(jnp.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


def test_patches_are_a_convolution_and_unpatchify_inverts_them():
    """The matmul equals the convolution with the same weights; identity weights and unpatchify give the video back."""
    video = jax.random.normal(jax.random.key(0), (2, 3, 4, 6, 3))
    embed = layers.PatchEmbed(2, 3, 5, rngs=nnx.Rngs(1))
    embed.proj.bias = nnx.Param(jnp.arange(5.0))
    expected = embed.proj(video.reshape(6, 4, 6, 3)).reshape(2, 3, 6, 5)
    np.testing.assert_allclose(embed(video), expected, atol=1e-5)
    embed = layers.PatchEmbed(2, 3, 12, rngs=nnx.Rngs(1))
    embed.proj.kernel = nnx.Param(jnp.eye(12).reshape(2, 2, 3, 12))
    np.testing.assert_array_equal(unpatchify(embed(video).reshape(2, 3, 2, 3, 12), 2), video)


@pytest.mark.parametrize("devices", [1, 8])
def test_linear_is_the_same_flat_or_not(devices, monkeypatch):
    """Tokens are flattened for one CPU device only; values and gradients do not depend on it."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    linear = layers.Linear(4, 6, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
    x, probe = (jax.random.normal(jax.random.key(i), (2, 3, 5, width)) for i, width in ((0, 4), (1, 6)))
    np.testing.assert_allclose(linear(x), nnx.Linear.__call__(linear, x), atol=1e-5)
    found = jax.grad(lambda module: (module(x) * probe).sum())(linear)
    np.testing.assert_allclose(found.kernel[...], np.einsum("btni,btno->io", x, probe), atol=1e-4)
    np.testing.assert_allclose(found.bias[...], probe.sum((0, 1, 2)), atol=1e-4)
    assert ("reshape" in str(jax.make_jaxpr(linear)(x))) == (devices == 1)


def test_recomputed_pieces_equal_their_formulas_and_save_only_their_inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 4, 8))
    shift, scale = (jax.random.normal(key, (2, 8)) for key in keys[1:])
    mlp = layers.Mlp(8, 16, rngs=nnx.Rngs(0))

    def plain(x, shift, scale, mlp):
        norm = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        hidden = (norm * (1 + scale[:, None, None]) + shift[:, None, None]) @ mlp.fc1.kernel[...] + mlp.fc1.bias[...]
        gelu = 0.5 * hidden * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        return gelu @ mlp.fc2.kernel[...] + mlp.fc2.bias[...]

    def both(function):
        gradient = jax.value_and_grad(lambda *a: jnp.sin(function(*a)).sum(), argnums=(0, 1, 2, 3))
        return jax.jit(gradient, compiler_options={"xla_backend_optimization_level": 0})(x, shift, scale, mlp)

    found, expected = both(lambda x, shift, scale, mlp: mlp(x, shift, scale)), both(plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
    # Of the token-sized arrays the gradient holds x, the hidden layer, and nothing in between.
    saved = jax.eval_shape(lambda *a: jax.vjp(lambda x: mlp(x, shift, scale), *a)[1], x)
    large = [leaf.shape for leaf in jax.tree.leaves(saved) if leaf.size >= x.size]
    assert sorted(large) == [(2, 3, 4, 8), (2, 3, 4, 16)]
