"""Stable Diffusion's KL autoencoder against diffusers: values, gradients, bounded memory, both layouts of names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_parity import arrays, bits, close, draw, half, randomise, same_names_and_shapes

from jaxalign import codecs
from jaxalign.codecs import kl
from jaxalign.interop import mapping, safetensors_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

LEVELS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
CASES = {  # ours, theirs: Stable Diffusion's, and one without the 1 x 1 convolutions and with a shift (3's)
    "sd": (dict(), dict()),
    "shifted": (
        dict(quant_conv=False, post_quant_conv=False, shift=0.06),
        dict(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
    ),
}

encode = jax.jit(lambda vae, video, key: vae.encode(video, key))
decode = jax.jit(lambda vae, latents: vae.decode(latents))


@functools.cache
def theirs(case="sd"):
    torch.manual_seed(0)
    return randomise(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **LEVELS, **CASES[case][1]
        )
    )


@functools.cache
def abstract(case="sd", **settings):
    tiny = dict(widths=(8, 16), blocks=1, groups=4)
    return codecs.abstract("sd_kl", **tiny | CASES[case][0] | settings)


def ours(case="sd", **settings):
    return mapping.load_state_dict(abstract(case, **settings), arrays(theirs(case)), kl.RULES["to_q"])


def frames(video):
    """[b, t, h, w, c] -> [b * t, c, h, w]."""
    return torch.from_numpy(np.array(video)).flatten(0, 1).permute(0, 3, 1, 2)


def their_posterior(case, video):
    with torch.no_grad():
        return theirs(case).encode(frames(video)).latent_dist


@pytest.mark.parametrize("case", CASES)
def test_latents_equal_diffusers(case):
    vae, video = ours(case), jnp.tanh(draw((2, 3, 8, 12, 3)))
    assert vae.latent_shape((3, 8, 12)) == (3, 4, 6, 4)
    distribution, shift = their_posterior(case, video), CASES[case][1].get("shift_factor", 0.0)
    mean, deviation = (
        x.permute(0, 2, 3, 1).reshape(2, 3, 4, 6, 4).numpy() for x in (distribution.mean, distribution.std)
    )
    noise = np.asarray(jax.random.normal(jax.random.key(5), mean.shape))
    close(encode(vae, video, jax.random.key(5)), (mean + deviation * noise - shift) * 0.18215)
    close(vae.sample(jnp.concatenate([mean, mean], axis=-1)), (mean - shift) * 0.18215)


def test_memory_is_bounded_over_frames():
    """Two frames at a time, an odd number of frames: the same moments, by a program that holds less."""
    vaes, video = [ours(frames_at_once=n) for n in (32, 2)], jnp.tanh(draw((1, 17, 16, 16, 3)))
    programs = [jax.jit(lambda vae, video: vae.moments(video)).lower(vae, video).compile() for vae in vaes]
    whole, parts = (program(vae, video) for program, vae in zip(programs, vaes, strict=True))
    close(parts, np.asarray(whole), 1e-5)
    large, small = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert small < 0.5 * large


@pytest.mark.parametrize("case", CASES)
def test_video_and_gradients_equal_diffusers(case):
    vae, latents, probe = ours(case), draw((1, 2, 4, 6, 4)), draw((1, 2, 8, 12, 3), 1)
    shift = CASES[case][1].get("shift_factor", 0.0)
    given = torch.from_numpy(latents).requires_grad_()
    decoded = theirs(case).decode(given.flatten(0, 1).permute(0, 3, 1, 2) / 0.18215 + shift).sample
    video = decoded.permute(0, 2, 3, 1).unflatten(0, (1, 2))
    leaves = dict(theirs(case).decoder.named_parameters())
    wanted = torch.autograd.grad((video * torch.from_numpy(probe)).sum(), [given, *leaves.values()])

    @jax.jit
    def run(vae, latents):
        def objective(vae, latents):
            video = vae.decode(latents)
            return (video * probe).sum(), video

        return jax.grad(objective, (0, 1), has_aux=True)(vae, latents)

    (of_weights, of_latents), found = run(vae, jnp.asarray(latents))
    close(found, video)
    close(of_latents, wanted[0])
    named = mapping.state_dict(of_weights, kl.RULES["to_q"])
    for name, gradient in zip(leaves, wanted[1:], strict=True):
        if name != "mid_block.attentions.0.to_k.bias":  # a bias of the keys changes no attention
            close(named[f"decoder.{name}"], gradient)


def test_names_and_sizes_of_the_real_network():
    with torch.device("meta"):
        real = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    vae = codecs.abstract("sd_kl")
    assert same_names_and_shapes(vae, kl.RULES["to_q"], real) == 83_653_863
    assert vae.latent_shape((16, 256, 256)) == (16, 32, 32, 4)
    assert vae.config.scale == real.config.scaling_factor


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_goes_in_and_out_bit_for_bit(tmp_path, old):
    """Under diffusers' present names, and under those of Stable Diffusion's own files."""
    theirs().save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    stored = dict(safetensors_file.open_file(path))
    if old:
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            stored = {key.replace(f".{new}.", f".{name}."): np.array(array) for key, array in stored.items()}
        assert sum("proj_attn" in key for key in stored) == 4
        safetensors_file.write(path, stored)
    vae = codecs.load("sd_kl", tmp_path)
    after = mapping.state_dict(vae, codecs.layout("sd_kl", stored))
    assert {name: bits(array) for name, array in after.items()} == {name: bits(array) for name, array in stored.items()}
    video = jnp.tanh(draw((2, 3, 8, 12, 3)))
    assert np.array_equal(encode(vae, video, jax.random.key(5)), encode(ours(), video, jax.random.key(5)))
    # its weights alone, as somebody's trainer on several GPUs may have saved them
    parallel = {f"module.{name}": torch.from_numpy(np.array(array)) for name, array in stored.items()}
    torch.save({"net": parallel, "step": 3}, tmp_path / "alone.pt")
    settings = {field: getattr(vae.config, field) for field in vae.config.__dataclass_fields__}
    alone = codecs.load("sd_kl", tmp_path / "alone.pt", **settings)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(vae), strict=True))
    if old:  # diffusers takes what is written, and has the same weights
        safetensors_file.write(path, after)
        again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
        assert all(torch.equal(value, theirs().state_dict()[name]) for name, value in again.state_dict().items())


def test_half_precision():
    vae, video = half(ours()), jnp.tanh(draw((2, 3, 8, 12, 3)))
    latents = encode(vae, video, None)
    mean = their_posterior("sd", video).mean.permute(0, 2, 3, 1).reshape(2, 3, 4, 6, 4)
    close(latents, mean.numpy() * 0.18215, 0.05)
    assert latents.dtype == jnp.float32 and jax.eval_shape(kl.KL.moments, vae, video).dtype == jnp.bfloat16
    assert jax.eval_shape(decode, vae, latents).dtype == jnp.bfloat16


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="frames of 9x12 are no multiples of the codec's 2; the nearest size is 8x12"):
        ours().moments(jnp.zeros((1, 1, 9, 12, 3)))
    with pytest.raises(ValueError, match="frames_at_once must be at least 1"):
        codecs.abstract("sd_kl", frames_at_once=0)
    with pytest.raises(ValueError, match="AttnDownEncoderBlock2D is not what Stable Diffusion's"):
        kl.settings_from({"down_block_types": ["AttnDownEncoderBlock2D"]})
    with pytest.raises(ValueError, match="did you mean 'sd_kl'"):
        codecs.load("sd-kl")
