"""Motion saliency and the choice of queries against loops over the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.alignment.saliency import motion_saliency, select_queries


def by_loops(video, t, h, w):
    """TSA eq. (11) on a video [T, H, W, 3] in [0, 1] that cuts evenly."""
    p, q, r = video.shape[0] // t, video.shape[1] // h, video.shape[2] // w
    delta = np.zeros((t, h, w))
    for f in range(1, t):
        for i in range(h):
            for j in range(w):
                now, before = (video[g * p : g * p + p, i * q : i * q + q, j * r : j * r + r] for g in (f, f - 1))
                delta[f, i, j] = np.abs(now - before).sum()
    delta[0] = delta[1]
    return delta


@pytest.mark.parametrize("frames", [6, 7, 5, 9])
def test_equals_the_formula(frames):
    """6 frames are 3 tubelets of 2; of 7 the first is dropped; of 5 and of 9 the first is a token frame alone."""
    video = np.asarray(jax.random.uniform(jax.random.key(0), (2, frames, 8, 6, 3)))
    cut = {6: video, 7: video[:, 1:]}.get(frames)
    if cut is None:  # the frames before it that would fill its tubelet are as it is
        cut = np.concatenate([video[:, :1]] * ((frames - 1) // 2 - 1) + [video], axis=1)
    wanted = np.stack([by_loops(clip, 3, 4, 2) for clip in cut])
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(motion_saliency(jnp.asarray(2 * video - 1), (3, 4, 2)), wanted, rtol=1e-5)


def test_cells_that_cut_pixels_share_them():
    video = np.zeros((1, 2, 5, 4, 3), np.float32)
    video[0, 1, 2, 1] = 1  # the middle row lies half in each of two cells
    found = motion_saliency(jnp.asarray(video), (2, 2, 2))
    np.testing.assert_allclose(found[0, 1], [[0.75, 0], [0.75, 0]])
    np.testing.assert_allclose(found.sum(), 2 * 1.5)


def test_one_token_frame_has_no_motion():
    assert not np.any(motion_saliency(jnp.ones((1, 4, 4, 4, 3)), (1, 2, 2)))


def test_queries_are_the_top_positions_of_each_frame():
    saliency = jax.random.uniform(jax.random.key(0), (2, 3, 5, 7))
    queries = select_queries(saliency, 0.2)
    assert queries.shape == (2, 3, 7) and queries.dtype == jnp.int32
    for sample, frame in np.ndindex(2, 3):
        values = np.asarray(saliency[sample, frame]).ravel()
        assert set(np.asarray(queries[sample, frame])) == set(np.argsort(values)[-7:])
    ties = select_queries(jnp.zeros((1, 2, 3, 3)), 0.3)
    np.testing.assert_array_equal(ties, [[[0, 1, 2]] * 2])  # exactly k of them, the earlier ones
    assert select_queries(saliency, 0.001).shape[-1] == 1 and select_queries(saliency, 1.0).shape[-1] == 35


def test_bad_input_is_named():
    video = jnp.zeros((1, 11, 8, 8, 3))
    with pytest.raises(ValueError, match="11 frames do not make 4 token frames"):
        motion_saliency(video, (4, 2, 2))
    with pytest.raises(ValueError, match=r"no token grid \(5, 9, 2\) on a video of \(11, 8, 8\)"):
        motion_saliency(video, (5, 9, 2))
    for ratio in (0.0, 1.5):
        with pytest.raises(ValueError, match="mask_ratio"):
            select_queries(jnp.zeros((1, 1, 2, 2)), ratio)
