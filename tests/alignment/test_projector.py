"""Projector and grid functions against PyTorch's layers, and the check that student and teacher can meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.alignment.grids import pool_time, resample_time, resize_space
from jaxalign.alignment.projector import CONVS, Projector, ProjectorConfig, check_grids

torch = pytest.importorskip("torch")


def channels_first(x):
    return torch.from_numpy(np.array(x)).permute(0, 4, 1, 2, 3)


def channels_last(x):
    return x.detach().permute(0, 2, 3, 4, 1).numpy()


def test_resampling_is_torchs():
    tokens = jax.random.normal(jax.random.key(0), (2, 4, 5, 6, 3))
    for scale in (1, 2, 3):
        wanted = torch.nn.functional.interpolate(
            channels_first(tokens), scale_factor=(scale, 1, 1), mode="trilinear", align_corners=False
        )
        np.testing.assert_allclose(resample_time(tokens, scale), channels_last(wanted), atol=1e-6)
    for size in ((3, 4), (10, 9), (5, 6)):
        wanted = torch.nn.functional.interpolate(
            channels_first(tokens).transpose(1, 2).flatten(0, 1), size=size, mode="bilinear", align_corners=False
        )
        wanted = wanted.unflatten(0, (2, 4)).permute(0, 1, 3, 4, 2).numpy()
        np.testing.assert_allclose(resize_space(tokens, size), wanted, atol=1e-6)


def test_pooling_in_time_keeps_the_first_frame():
    tokens = jax.random.normal(jax.random.key(0), (1, 9, 2, 2, 3))
    pooled = pool_time(tokens, 4)
    assert pooled.shape == (1, 3, 2, 2, 3)
    np.testing.assert_array_equal(pooled[:, 0], tokens[:, 0])
    np.testing.assert_allclose(pooled[:, 2], tokens[:, 5:9].mean(axis=1), atol=1e-6)
    with pytest.raises(ValueError, match="9 frames are not 1 \\+ a multiple of 3"):
        pool_time(tokens, 3)


@pytest.mark.parametrize("conv", CONVS)
def test_projector_is_torchs(conv):
    """MLP, drop, ×2 in time and convolution, with random biases too; gradients of all parameters."""
    hidden = 0 if conv == "frame" else 10
    config = ProjectorConfig(6, 5, hidden=hidden, drop_first=True, time_scale=2, conv=conv)
    projector = Projector(config, rngs=nnx.Rngs(0))
    leaves, treedef = jax.tree.flatten(projector)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    projector = jax.tree.unflatten(treedef, drawn)
    tokens = jax.random.normal(jax.random.key(2), (2, 4, 7, 9, 6))  # 7 is no multiple of 3

    def loss(projector):
        output = projector(tokens)
        return jnp.sum(jnp.sin(output)), output

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(projector)
    assert found.shape == (2, *config.grid((4, 7, 9)), 5)

    layers, x = {}, torch.from_numpy(np.array(tokens))
    for name in ("0", "2", "4") if hidden else ():
        layer = getattr(projector, name)
        layers[name] = torch.nn.Linear(*layer.kernel.shape)
        layers[name].weight.data = torch.from_numpy(np.array(layer.kernel[...])).T
        layers[name].bias.data = torch.from_numpy(np.array(layer.bias[...]))
        x = layers[name](x if name == "0" else torch.nn.functional.silu(x))
    x = torch.nn.functional.interpolate(x.permute(0, 4, 1, 2, 3)[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear")
    if CONVS[conv] is not None:
        kernel, stride, padding = CONVS[conv]
        layers["conv"] = torch.nn.Conv3d(x.shape[1], 5, kernel, stride, padding)
        layers["conv"].weight.data = torch.from_numpy(np.array(projector.conv.kernel[...])).permute(4, 3, 0, 1, 2)
        layers["conv"].bias.data = torch.from_numpy(np.array(projector.conv.bias[...]))
        x = layers["conv"](x)
    x.sin().sum().backward()
    wanted = channels_last(x)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert layers
    for name, layer in layers.items():
        weight, bias = layer.weight.grad.numpy(), layer.bias.grad.numpy()
        weight = weight.T if weight.ndim == 2 else weight.transpose(2, 3, 4, 1, 0)
        grad = getattr(grads, name)
        assert np.abs(weight).max() > 0
        np.testing.assert_allclose(grad.kernel[...], weight, atol=2e-5 * np.abs(weight).max())
        np.testing.assert_allclose(grad.bias[...], bias, atol=2e-5 * np.abs(bias).max())


def test_compute_follows_the_dtype_of_parameters_and_tokens():
    projector = Projector(ProjectorConfig(6, 5, hidden=8, time_scale=2, conv="tsa"), rngs=nnx.Rngs(0))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), projector)
    for module, dtype in ((half, jnp.bfloat16), (projector, jnp.float32)):
        assert jax.eval_shape(lambda m, x: m(x), module, jnp.ones((1, 2, 6, 6, 6), dtype)).dtype == dtype


def test_grids_of_the_papers():
    """CogVideoX's 13×30×45 meets VideoMAEv2's 24×10×15 by way of the strided convolutions (methods.md §2, §3)."""
    for conv in ("trd", "tsa"):
        config = ProjectorConfig(1920, 768, drop_first=True, time_scale=2, conv=conv)
        assert config.grid((13, 30, 45)) == (24, 10, 15)
        check_grids((13, 30, 45), (24, 10, 15), config)
    full = ProjectorConfig(1920, 768, drop_first=True, time_scale=2)
    check_grids((13, 30, 45), (24, 30, 45), full)
    with pytest.raises(ValueError, match=r"\(13, 30, 45\) into \(24, 30, 45\).*is \(24, 10, 15\).*change conv or"):
        check_grids((13, 30, 45), (24, 10, 15), full)
    with pytest.raises(ValueError, match=r"\(13, 30, 45\).*\(24, 30, 45\).*change drop_first, time_scale or"):
        check_grids((13, 30, 45), (24, 30, 45), ProjectorConfig(1920, 768))
    assert ProjectorConfig(8, 8, drop_first=True, conv="trd").grid((1, 2, 2)) == (0, 0, 0)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="no conv 'tsaa'; there are none, trd, tsa"):
        ProjectorConfig(8, 8, conv="tsaa")
    with pytest.raises(ValueError, match="time_scale = 0"):
        ProjectorConfig(8, 8, time_scale=0)
    with pytest.raises(ValueError, match="leave no layer"):
        ProjectorConfig(8, 8, hidden=0)
