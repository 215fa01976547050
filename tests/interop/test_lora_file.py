"""LoRA files: diffusers loads ours with the right scale, we load what diffusers, peft and others save."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import lora_file, mapping, safetensors_file
from jaxalign.models import cogvideox, lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = dict(input_size=(4, 6), num_frames=3, width=32, depth=2, num_heads=2, in_channels=4, time_width=16)
CONFIG = cogvideox.CogVideoXConfig(**TINY, text_tokens=5, text_width=12)
RULES = cogvideox.weight_rules(CONFIG)
SETTINGS = lora.LoRA(rank=4, alpha=10.0, sites=lora.SITES["cogvideox"])


def draw(shape, seed, scale=0.3):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def tiny():
    """(base, adapters): no leaf is zero."""
    base = jax.eval_shape(lambda: cogvideox.CogVideoX(CONFIG, rngs=nnx.Rngs(0)))
    adapters = jax.eval_shape(lambda: lora.init(base, SETTINGS, jax.random.key(0)))
    return tuple(jax.tree.map(lambda x: draw(x.shape, x.size), tree) for tree in (base, adapters))


def same(one, two):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def test_diffusers_loads_it_and_saves_the_same(tiny, tmp_path):
    """`load_lora_weights` of the pipeline; alpha is not the rank, and stands in the header alone.

    (What it then computes is compared in tests/test_convert_diffusers.py, whole videos in tests/test_cogvideox_run.py.)
    """
    pytest.importorskip("peft")
    base, adapters = tiny
    lora_file.write(tmp_path / lora_file.NAME, adapters, RULES, rank=4, alpha=10.0)
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=12,
        num_layers=2,
        sample_height=4,
        sample_width=6,
        sample_frames=9,
        max_text_seq_length=5,
    )
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in mapping.state_dict(base, RULES).items()})
    vae = diffusers.AutoencoderKLCogVideoX(block_out_channels=(8,) * 4, norm_num_groups=2, latent_channels=4)
    scheduler = diffusers.CogVideoXDDIMScheduler()
    parts = dict(transformer=theirs, vae=vae, scheduler=scheduler, tokenizer=None, text_encoder=None)
    pipeline = diffusers.CogVideoXPipeline(**parts)
    video, text, times = draw((1, 3, 4, 6, 4), 1, 1.0), draw((1, 5, 12), 2, 1.0), jnp.array([500])

    def run():
        inputs = (torch.from_numpy(np.array(x)) for x in (video.transpose(0, 1, 4, 2, 3), text, times))
        with torch.no_grad():
            return theirs(*inputs).sample.permute(0, 1, 3, 4, 2).numpy()

    before = run()
    pipeline.load_lora_weights(str(tmp_path))
    after = run()
    assert np.abs(after - before).max() > 0.1 * np.abs(after).max()

    # and back: what diffusers saves are the same adapters
    theirs.save_lora_adapter(str(tmp_path / "again"), adapter_name="default_0")
    abstract = jax.eval_shape(lambda: adapters)
    assert same(lora_file.load(tmp_path / "again", abstract, RULES, alpha=10), adapters)


@pytest.mark.parametrize("style", ["peft", "kohya", "flat", "no alpha"])
def test_files_of_others(tiny, tmp_path, style):
    _, adapters = tiny
    plain = mapping.state_dict(adapters, RULES)
    alpha = 10.0
    if style == "peft":
        tensors = {f"base_model.model.{name}": value for name, value in plain.items()}
        about = dict(r=4, lora_alpha=alpha, rank_pattern={}, use_dora=False)
        (tmp_path / "adapter_config.json").write_text(json.dumps(about))
        path, given = tmp_path / "adapter_model.safetensors", tmp_path
    else:
        kohya = style in ("kohya", "flat")
        words = {"lora_A": "lora_down", "lora_B": "lora_up"} if kohya else {"lora_A": "lora_A.default"}
        tensors = {}
        for name, value in plain.items():
            for ours, other in words.items():
                name = name.replace(ours, other)
            site, _, rest = name.partition(".lora_")
            tensors[f"lora_unet_{site.replace('.', '_')}.lora_{rest}" if style == "flat" else f"transformer.{name}"] = (
                value
            )
        path = given = tmp_path / "some.safetensors"
        alpha = alpha if kohya else 4.0
    if style in ("kohya", "flat"):
        downs = [name for name in tensors if "lora_down" in name]
        tensors |= {name.replace("lora_down.weight", "alpha"): np.asarray(alpha, np.float32) for name in downs}
    safetensors_file.write(path, tensors)
    sites = sorted({name.partition(".lora_")[0] for name in plain})
    assert lora_file.read(given, sites).alpha == alpha
    assert same(lora_file.load(given, jax.eval_shape(lambda: adapters), RULES, alpha=alpha), adapters)


def test_what_a_refusal_says_to_write_is_taken(tiny, tmp_path):
    """rsLoRA's alpha, 10·√4·√2 here, has no end that could be written."""
    _, adapters = tiny
    safetensors_file.write(tmp_path / "adapter_model.safetensors", mapping.state_dict(adapters, RULES))
    about = dict(r=4, lora_alpha=10 * 2**0.5, use_rslora=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    abstract = jax.eval_shape(lambda: adapters)
    with pytest.raises(ValueError, match=r"write --config\.lora\.rank=4 --config\.lora\.alpha=") as error:
        lora_file.load(tmp_path, abstract, RULES, alpha=28.28)
    said = float(str(error.value).split("lora.alpha=")[1])
    assert said != lora_file.read(tmp_path).alpha
    assert same(lora_file.load(tmp_path, abstract, RULES, alpha=said), adapters)


def test_what_does_not_fit_is_said(tiny, tmp_path):
    _, adapters = tiny
    path = lora_file.write(tmp_path / "l.safetensors", adapters, RULES, rank=4, alpha=10.0, dtype=ml_dtypes.bfloat16)
    assert {array.dtype for array in lora_file.read(path).arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    with pytest.raises(ValueError, match=r"rank 4 and alpha 10, here 4 and 4; write --config.lora.rank=4 .*alpha=10"):
        lora_file.load(path, adapters, RULES, alpha=4.0)
    fewer = {site: pair for site, pair in adapters.items() if "to_q" in site}
    with pytest.raises(ValueError, match=r"it is of transformer_blocks.\*.attn1.to_k, .*: write config.lora.sites so"):
        lora_file.load(path, fewer, RULES, alpha=10.0)
    plain = mapping.state_dict(adapters, RULES)
    for site in ("unet_transformer_blocks_0_ff_net_2", "te_encoder_block_0_layer_0_SelfAttention_q"):
        safetensors_file.write(tmp_path / "flat.safetensors", {f"lora_{site}.lora_down.weight": np.ones((4, 3))})
        said = (
            rf"'lora_{site}.lora_down.weight' is of no site that is asked \(transformer_blocks_0_attn1_to_k, .*sites as"
        )
        with pytest.raises(ValueError, match=said):
            lora_file.load(tmp_path / "flat.safetensors", adapters, RULES, alpha=10.0)
    for tensors, message in (
        ({"transformer.blocks.0.dora_scale": np.ones(2)}, "is no plain LoRA weight"),
        (plain | {"a.lora_A.weight": np.ones((2, 3))}, r"ranks \[2, 4\]; only plain LoRA of one rank"),
    ):
        safetensors_file.write(tmp_path / "odd.safetensors", tensors)
        with pytest.raises(ValueError, match=message):
            lora_file.read(tmp_path / "odd.safetensors")
