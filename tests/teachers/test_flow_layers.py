"""Upsampling, pooling and normalisation of the flow networks against PyTorch's functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.teachers import flow_layers

torch = pytest.importorskip("torch")


def torch_of(x):
    """[b, h, w, c] -> PyTorch's order."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def test_convex_upsampling():
    random = np.random.default_rng(0)
    b, h, w, c = 2, 4, 5, 3
    x, mask = (random.standard_normal((b, h, w, d)).astype(np.float32) for d in (c, 576))
    weights = torch.softmax(torch_of(mask).view(b, 1, 9, 8, 8, h, w), dim=2)
    neighbours = torch.nn.functional.unfold(torch_of(x), 3, padding=1).view(b, c, 9, 1, 1, h, w)
    wanted = (weights * neighbours).sum(2).permute(0, 4, 2, 5, 3, 1).reshape(b, 8 * h, 8 * w, c)
    np.testing.assert_allclose(jax.jit(flow_layers.upsample_convex)(x, mask), wanted, atol=1e-5)


def test_bilinear_upsampling_keeps_the_corners():
    x = np.random.default_rng(0).standard_normal((1, 5, 7, 2)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch_of(x), scale_factor=8, mode="bilinear", align_corners=True)
    np.testing.assert_allclose(flow_layers.upsample_bilinear(jnp.asarray(x)), wanted.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(5, 4), (20, 28), (3, 9)])
def test_area_pooling(size):
    x = np.random.default_rng(0).standard_normal((2, 10, 14, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch_of(x), size=size, mode="area")
    np.testing.assert_allclose(flow_layers.area_pool(jnp.asarray(x), size), wanted.permute(0, 2, 3, 1), atol=1e-6)


def test_resized_flow_is_counted_in_new_pixels():
    flow = jnp.ones((1, 2, 8, 16, 2), np.float32)
    found = np.asarray(flow_layers.resize_flow(flow, (4, 48)))
    assert found.shape == (1, 2, 4, 48, 2)
    np.testing.assert_allclose(found[..., 0], 3, rtol=1e-6)
    np.testing.assert_allclose(found[..., 1], 0.5, rtol=1e-6)


def test_instance_norm():
    x = (5 + 2 * np.random.default_rng(0).standard_normal((2, 6, 5, 3))).astype(np.float32)
    wanted = torch.nn.functional.instance_norm(torch_of(x)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(flow_layers.instance_norm(jnp.asarray(x)), wanted, atol=1e-5)


def test_strided_convolutions_are_padded_as_pytorch_does():
    random = np.random.default_rng(0)
    for size, stride in (((7, 7), 2), ((3, 3), 2), ((1, 5), 1), ((1, 1), 2)):
        x, kernel = random.standard_normal((1, 8, 9, 3)), random.standard_normal((*size, 3, 4))
        x, kernel = x.astype(np.float32), kernel.astype(np.float32)
        weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        padding = tuple(side // 2 for side in size)
        wanted = torch.nn.functional.conv2d(torch_of(x), weight, stride=stride, padding=padding)
        found = flow_layers.convolve(jnp.asarray(x), jnp.asarray(kernel), stride=stride)
        np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), atol=1e-4)
