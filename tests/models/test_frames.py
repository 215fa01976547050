"""Around the network: pixels normalised, frames in bounded steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import frames


def test_normalised_is_torchvisions():
    video = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5, 3)).astype(np.float32)
    wanted = ((video + 1) / 2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(frames.normalised(jnp.asarray(video)), wanted, atol=1e-6)
    assert frames.normalised(jnp.asarray(video, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("at_once", [1, 4, 7, 100])
def test_over_frames_gives_every_frame_its_own(at_once):
    """Two clips of five frames: 7 at once are three of each clip, the second step filled up."""
    video = jnp.arange(2 * 5 * 2 * 2 * 1, dtype=jnp.float32).reshape(2, 5, 2, 2, 1)
    sizes = []

    def function(x):
        sizes.append(x.shape[0])
        return x.sum(axis=(1, 2)) * 2

    found = frames.over_frames(function, video, at_once)
    np.testing.assert_array_equal(found, video.sum(axis=(2, 3)) * 2)
    assert max(sizes) == {1: 2, 4: 4, 7: 6, 100: 10}[at_once]
