"""The identity codec keeps the contract of a codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import codecs


def test_latents_are_the_video():
    codec = codecs.load("pixels")
    video = jax.random.uniform(jax.random.key(0), (2, 3, 8, 6, 3), minval=-1, maxval=1)
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        latents = jax.jit(lambda codec, video, key: codec.encode(video, key))(codec, video, key)
        assert latents.shape[1:] == codec.latent_shape((3, 8, 6))
        np.testing.assert_array_equal(latents, video)
    np.testing.assert_array_equal(codec.decode(latents), video)


def test_no_parameters_and_usable_in_half_precision():
    codec = codecs.load("pixels")
    assert jax.tree.leaves(codec) == []
    assert codec.decode(jnp.zeros((1, 1, 2, 2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="'pixel' is not known; did you mean 'pixels'"):
        codecs.load("pixel")
    with pytest.raises(ValueError, match=r"write one of \['cogvideox_2b', .*'pixels'"):
        codecs.load("vae")
    with pytest.raises(ValueError, match="'pixels' has no weights; leave out 'vae'"):
        codecs.load("pixels", weights="vae")
