"""Correlation features against PyTorch's grid_sample on the whole volume, as the originals read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.teachers import correlation

torch = pytest.importorskip("torch")


def theirs(first, second, targets, radius):
    """All pairs, average pooling, and bilinear sampling with zeros outside, in double precision."""
    b, h, w, c = first.shape
    first, second, targets = (torch.from_numpy(x.astype(np.float64)) for x in (first, second, targets))
    volume = torch.einsum("bhwc,byxc->bhwyx", first, second).reshape(b * h * w, 1, h, w) / c**0.5
    offsets = torch.arange(-radius, radius + 1).double()
    # the first index moves x, the second y
    offsets = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)
    found = []
    for level in range(correlation.LEVELS):
        at = targets.reshape(-1, 1, 1, 2) / 2**level + offsets
        side = torch.tensor([volume.shape[3] - 1, volume.shape[2] - 1])
        sampled = torch.nn.functional.grid_sample(volume, 2 * at / side - 1, align_corners=True)
        found.append(sampled.reshape(b, h, w, -1))
        volume = torch.nn.functional.avg_pool2d(volume, 2)
    return torch.cat(found, dim=-1).numpy()


@pytest.mark.parametrize("radius", [3, 4])
def test_lookup_is_bilinear_sampling_of_all_pairs(radius):
    """Odd sides, levels smaller than the window, targets on positions, between them, at and far beyond the border."""
    random = np.random.default_rng(radius)
    b, h, w, c = 2, 17, 22, 8
    first, second = (random.standard_normal((b, h, w, c)).astype(np.float32) for _ in range(2))
    grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), axis=-1).astype(np.float32)
    targets = grid + random.normal(0, 6, (b, h, w, 2)).astype(np.float32)
    targets[0, :3] = grid[:3]
    targets[1, 0, :4] = [[-300, 5], [4, 1e4], [-0.5, -0.5], [w - 0.5, h - 1]]

    def ours(first, second, targets):
        return correlation.look_up(correlation.all_pairs(first, second), targets, radius)

    found = np.asarray(jax.jit(ours)(first, second, targets))
    wanted = theirs(first, second, targets, radius)
    assert found.shape == (b, h, w, 4 * (2 * radius + 1) ** 2)
    assert np.abs(wanted).max() > 1 and (wanted[1, 0, :2] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_volumes_are_fp32_in_half_precision():
    x = jnp.ones((1, 16, 16, 4), jnp.bfloat16)
    assert [v.dtype for v in correlation.all_pairs(x, x)] == [jnp.float32] * 4
    assert [v.shape[3:] for v in correlation.all_pairs(x, x)] == [(16, 16), (8, 8), (4, 4), (2, 2)]
