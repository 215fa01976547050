"""CogVideoX's VAE against diffusers: chunks in time, tiles, gradients, names and bits of the weights, bad input."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_parity import arrays, bits, close, draw, from_torch, half, randomise, same_names_and_shapes, to_torch

from jaxalign import codecs
from jaxalign.codecs import cogvideox
from jaxalign.interop import mapping, safetensors_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = dict(widths=(4, 8, 8), latent_channels=3, blocks=1, groups=2, scale=0.7)
TILES = dict(tiling=True, tile=(16, 16), overlap=(0.25, 0.25))

moments = jax.jit(lambda vae, video: vae.moments(video))
decode = jax.jit(lambda vae, latents: vae.decode(latents))


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return randomise(
        diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4, 8, 8),
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            latent_channels=3,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=32,
            sample_width=32,
            scaling_factor=0.7,
        )
    )


@functools.cache
def abstract(**settings):
    return codecs.abstract("cogvideox_2b", **TINY | settings)


def ours(theirs, **settings):
    return mapping.load_state_dict(abstract(**settings), arrays(theirs), cogvideox.RULES)


def their_moments(theirs, video):
    with torch.no_grad():
        return from_torch(theirs.encode(to_torch(video)).latent_dist.parameters)


def their_video(theirs, latents):
    """As the pipeline decodes: latents over the scale."""
    return from_torch(theirs.decode(to_torch(latents) / 0.7).sample)


@pytest.mark.parametrize("frames", [17, 16])
def test_moments_over_several_chunks(theirs, frames):
    """9 + 8 frames, and 8 + 8; two clips."""
    vae, video = ours(theirs), jnp.tanh(draw((2, frames, 8, 12, 3)))
    found = moments(vae, video)
    assert found.shape == (2, *vae.latent_shape((frames, 8, 12))[:3], 6)
    close(found, their_moments(theirs, video))


def test_latents_are_scaled_draws_of_the_posterior(theirs):
    vae, stored = ours(theirs), jnp.asarray(8 * draw((2, 2, 3, 2, 6)))  # some log variances are clipped
    theirs_drawn = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(to_torch(stored))
    mean, deviation = from_torch(theirs_drawn.mean).numpy(), from_torch(theirs_drawn.std).numpy()
    noise = np.asarray(jax.random.normal(jax.random.key(3), mean.shape))
    close(vae.sample(stored), 0.7 * mean)
    close(vae.sample(stored, jax.random.key(3)), 0.7 * (mean + deviation * noise), 1e-6)
    assert np.array_equal(vae.sample(stored, jax.random.PRNGKey(3)), vae.sample(stored, jax.random.key(3)))


def test_encode_an_image(theirs):
    vae, video = ours(theirs), jnp.tanh(draw((2, 1, 8, 12, 3)))
    latents = jax.jit(lambda vae, video, key: vae.encode(video, key))(vae, video, jax.random.key(3))
    assert latents.shape == (2, *vae.latent_shape((1, 8, 12)))
    close(latents, vae.sample(jnp.asarray(their_moments(theirs, video)), jax.random.key(3)))


@pytest.mark.parametrize("frames", [2, 1])
def test_decode_an_even_chunk_and_an_image(theirs, frames):
    vae, latents = ours(theirs), draw((2, frames, 2, 3, 3))
    with torch.no_grad():
        close(decode(vae, jnp.asarray(latents)), their_video(theirs, latents))


def test_decode_and_its_gradient(theirs):
    """3 + 2 latents are 9 + 8 frames. Codecs are frozen: what a loss on pixels needs is the gradient of the latents."""
    vae, latents, probe = ours(theirs, remat=True), draw((2, 5, 2, 2, 3)), draw((2, 17, 8, 8, 3), 1)
    given = torch.from_numpy(latents).requires_grad_()
    video = from_torch(theirs.decode(given.permute(0, 4, 1, 2, 3) / 0.7).sample)
    (wanted,) = torch.autograd.grad((video * torch.from_numpy(probe)).sum(), given)

    @jax.jit
    def run(vae, latents):
        video, pull_back = jax.vjp(vae.decode, latents)
        return video, *pull_back(jnp.asarray(probe))

    found, gradient = run(vae, jnp.asarray(latents))
    close(found, video)
    close(gradient, wanted)
    assert (np.abs(gradient).reshape(10, -1).min(1) > 0).all()  # through every latent frame


def test_tiles_with_blending(theirs):
    """Two rows and two columns of tiles, smaller at the edge; an image, and 3 latents."""
    vae, video, latents = ours(theirs, **TILES), jnp.tanh(draw((1, 1, 20, 20, 3))), draw((1, 3, 5, 5, 3))
    untiled = their_moments(theirs, video).numpy()
    theirs.enable_tiling(16, 16, 0.25, 0.25)
    try:
        expected = their_moments(theirs, video)
        close(moments(vae, video), expected)
        assert np.abs(untiled - expected.numpy()).max() > 0.01  # it makes a difference
        with torch.no_grad():
            close(decode(vae, jnp.asarray(latents)), their_video(theirs, latents))
    finally:
        theirs.disable_tiling()


def test_names_and_sizes_of_the_real_network():
    vae = codecs.abstract("cogvideox_2b")
    with torch.device("meta"):
        real = diffusers.AutoencoderKLCogVideoX()
    assert same_names_and_shapes(vae, cogvideox.RULES, real) == 215_583_907
    assert vae.latent_shape((49, 480, 720)) == (13, 60, 90, 16)
    assert vae.config.scale == real.config.scaling_factor == cogvideox.PRESETS["cogvideox_2b"]["scale"]
    assert cogvideox.PRESETS["cogvideox_5b"] == dict(scale=0.7)  # it is the same network
    # diffusers' tiles at 480 x 720
    tiles = vae.config.tiles(of_latents=True)
    assert tiles == dict(tile=(30, 45), stride=(25, 36), blend=(40, 72), keep=(200, 288))
    assert vae.config.tiles(of_latents=False) == dict(tile=(240, 360), stride=(200, 288), blend=(5, 9), keep=(25, 36))


def test_a_folder_goes_in_and_out_bit_for_bit(theirs, tmp_path):
    kept = {name: value.to(torch.bfloat16) for name, value in theirs.state_dict().items()}
    model = diffusers.AutoencoderKLCogVideoX.from_config(theirs.config).to(dtype=torch.bfloat16)
    model.load_state_dict(kept)
    model.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    vae = codecs.load("cogvideox_2b", tmp_path, dtype="keep")
    assert vae.config == ours(theirs, tile=(16, 16)).config  # the folder's config.json says what it holds
    before = safetensors_file.open_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    after = mapping.state_dict(vae, cogvideox.RULES)
    assert {name: bits(array) for name, array in after.items()} == {name: bits(before[name]) for name in before}
    # and diffusers takes what is written
    safetensors_file.write(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", after)
    again = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae", torch_dtype=torch.bfloat16)
    assert all(torch.equal(value, kept[name]) for name, value in again.state_dict().items())


def test_half_precision(theirs):
    vae, video = ours(theirs), jnp.tanh(draw((2, 1, 8, 12, 3)))
    found = moments(half(vae), video)
    assert found.dtype == jnp.bfloat16
    close(found, their_moments(theirs, video), 0.05)
    latents = vae.sample(found)
    assert latents.dtype == jnp.float32
    # What goes on from chunk to chunk keeps its dtype.
    several = jax.eval_shape(decode, half(vae), jax.ShapeDtypeStruct((2, 5, 2, 3, 3), jnp.float32))
    assert several.dtype == jnp.bfloat16 and several.shape == (2, 17, 8, 12, 3)
    assert jax.eval_shape(moments, half(vae), several).dtype == jnp.bfloat16


def test_wrong_requests_are_refused(theirs, tmp_path):
    vae = abstract()
    with pytest.raises(
        ValueError, match="frames of 482x720 are no multiples of the codec's 4; the nearest size is 480x"
    ):
        vae.latent_shape((49, 482, 720))
    with pytest.raises(ValueError, match=r"45 frames: this codec takes .* write 40 or 41 or 48"):
        vae.latent_shape((45, 480, 720))
    with pytest.raises(ValueError, match=r"\(100, 100\) and its steps \(83, 80\) must be multiples of 8"):
        codecs.abstract("cogvideox_2b", tiling=True, tile=(100, 100))
    with pytest.raises(ValueError, match="time_factor 3"):
        codecs.abstract("cogvideox_2b", time_factor=3)
    with pytest.raises(ValueError, match="use_quant_conv is not what CogVideoX's"):
        cogvideox.settings_from({"use_quant_conv": True})
    with pytest.raises(FileNotFoundError, match="'cogvideox_2b' needs weights; give the published folder"):
        codecs.load("cogvideox_2b")
    with pytest.raises(ValueError, match="no setting 'scaling'; it has widths"):
        codecs.abstract("cogvideox_2b", scaling=1.0)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="a pipeline without a folder vae/"):
        codecs.load("cogvideox_2b", tmp_path)
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        codecs.load("cogvideox_2b", tmp_path)
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="this is a AutoencoderKL; AutoencoderKLCogVideoX is wanted"):
        codecs.load("cogvideox_2b", tmp_path)
    theirs.save_config(tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match="there are no weights in it"):
        codecs.load("cogvideox_2b", tmp_path)
    state = arrays(theirs)
    state["encoder.conv_in.bias"] = state.pop("encoder.conv_in.conv.bias")
    safetensors_file.write(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", state)
    with pytest.raises(ValueError, match=r"cogvideox_2b: .*no place for: encoder\.conv_in\.bias"):
        codecs.load("cogvideox_2b", tmp_path)
