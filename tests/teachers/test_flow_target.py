"""MoAlign's flow target: which flows belong to a token frame, how large the grid is, and what it is measured in."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.teachers.flow_target import flow_target, target_grid

torch = pytest.importorskip("torch")


def test_a_clip_of_49_frames():
    """48 flows, 24 tubelets of VideoMAEv2, 480x720 pooled by 12: against torch's area interpolation of the means."""
    flow = np.random.default_rng(0).normal(0, 5, (1, 4, 480, 720, 2)).astype(np.float32)
    found = np.asarray(flow_target(jnp.asarray(flow), 2))
    means = (flow[:, 0::2] + flow[:, 1::2]) / 2 / np.array([720, 480], np.float32)
    x = torch.from_numpy(means[0].transpose(0, 3, 1, 2).copy())
    wanted = torch.nn.functional.interpolate(x, size=(40, 60), mode="area").permute(0, 2, 3, 1)
    assert found.shape == (1, 2, 40, 60, 2) and np.abs(found).max() > 1e-3
    np.testing.assert_allclose(found[0], wanted, atol=1e-7)


def test_the_last_tubelet_of_an_even_clip_has_one_flow():
    flow = np.arange(5, dtype=np.float32)[None, :, None, None, None] * np.ones((2, 1, 4, 8, 2), np.float32)
    found = np.asarray(flow_target(jnp.asarray(flow), 3))
    assert found.shape == (2, 3, 4, 8, 2)  # less than 40x60 stays as it is
    np.testing.assert_allclose(found[0, :, 0, 0, 0] * 8, [0.5, 2.5, 4.0])
    np.testing.assert_allclose(found[0, :, 0, 0, 1] * 4, [0.5, 2.5, 4.0])


@pytest.mark.parametrize(
    ("frame", "grid"),
    [
        ((480, 720), (40, 60)),
        ((320, 576), (40, 72)),
        ((160, 240), (40, 60)),
        ((250, 250), (62, 62)),
        ((64, 64), (64, 64)),
    ],
)
def test_grid_has_at_least_40x60_where_the_frame_has(frame, grid):
    assert target_grid(frame) == grid
    flow = jnp.ones((1, 2, *frame, 2), np.float32)
    found = np.asarray(flow_target(flow, 1))
    assert found.shape == (1, 1, *grid, 2)
    np.testing.assert_allclose(found[..., 0] * frame[1], 1, rtol=1e-5)
    np.testing.assert_allclose(found[..., 1] * frame[0], 1, rtol=1e-5)


def test_other_numbers_of_flows_are_refused():
    with pytest.raises(ValueError, match="24 token frames of two frames each have 47 flows between frames, or 48"):
        flow_target(jnp.zeros((1, 49, 8, 8, 2)), 24)


def test_a_frame_of_an_image_teacher_has_the_flow_to_the_next_one():
    flow = np.random.default_rng(0).normal(size=(1, 3, 4, 8, 2)).astype(np.float32)
    found = np.asarray(flow_target(jnp.asarray(flow), 4))
    np.testing.assert_allclose(found, flow[:, [0, 1, 2, 2]] / [8, 4], rtol=1e-6)
