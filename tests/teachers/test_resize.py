"""Resizing against torch.nn.functional.interpolate."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.teachers.resize import resize, resize_matrix

torch = pytest.importorskip("torch")


def interpolated(x, **settings):
    channels_first = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    return np.moveaxis(torch.nn.functional.interpolate(channels_first, align_corners=False, **settings).numpy(), 1, -1)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("method", "mode"), [("linear", "bilinear"), ("cubic", "bicubic")])
def test_equals_torch(method, mode, antialias):
    x = np.random.default_rng(0).standard_normal((2, 17, 11, 3)).astype(np.float32)
    for size in ((5, 20), (40, 3), (16, 11), (17, 12)):
        found = resize(jnp.asarray(x), size, method=method, antialias=antialias)
        np.testing.assert_allclose(found, interpolated(x, size=size, mode=mode, antialias=antialias), atol=3e-5)
    # as DINOv2 asks for it: the step between samples is not the ratio of the sizes
    factors = ((8 + 0.1) / 17, (22 + 0.1) / 11)
    found = resize(jnp.asarray(x), (8, 22), method=method, antialias=antialias, scale_factors=factors)
    wanted = interpolated(x, scale_factor=factors, mode=mode, antialias=antialias)
    np.testing.assert_allclose(found, wanted, atol=3e-5)
    other = resize(jnp.asarray(x), (8, 22), method=method, antialias=antialias)
    assert np.abs(other - wanted).max() > 1e-2


def test_any_axis():
    """Linear in time, as VideoREPA resamples positions and student tokens."""
    x = np.random.default_rng(1).standard_normal((2, 13, 4)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(x.transpose(0, 2, 1).copy()), size=24, mode="linear")
    found = resize(jnp.asarray(x), (24,), axes=(1,), method="linear")
    np.testing.assert_allclose(found, wanted.numpy().transpose(0, 2, 1), atol=1e-5)


def test_half_precision_is_rounded_once():
    x = np.random.default_rng(2).standard_normal((7, 9, 2)).astype(np.float32)
    half = jnp.asarray(x, jnp.bfloat16)
    found = resize(half, (7, 20))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, resize(half.astype(jnp.float32), (7, 20)).astype(jnp.bfloat16))


def test_nothing_to_do_does_nothing():
    x = jnp.ones((3, 4, 5, 1))
    assert resize(x, (4, 5)) is x
    assert resize(x, (4, 5), antialias=True) is x


def test_rows_sum_to_one():
    for antialias in (False, True):
        np.testing.assert_allclose(resize_matrix(37, 16, antialias=antialias).sum(axis=1), 1, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="resize method 'bicubic' is not known; write 'linear' or 'cubic'"):
        resize(jnp.ones((4, 4, 1)), (2, 2), method="bicubic")
