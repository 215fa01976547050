"""CLIP against transformers at random weights, both tables of names, upstream's preprocessing, sizes, tokens."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import manifests, mapping
from jaxalign.metrics.networks import clip

TINY = dict(
    width=32, depth=2, num_heads=2, patch_size=8, embedding=12, text_width=24, text_heads=3, text_depth=2, image_size=16
)
TINY |= dict(vocabulary=50, context=9)


def abstract(**settings):
    return jax.eval_shape(lambda: clip.CLIP(clip.CLIPConfig(**settings), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def random_clip():
    """Every leaf random, so that no zero and no equal number hides a mistake."""
    rng, leaves = np.random.default_rng(0), []
    flat, tree = jax.tree.flatten(abstract(**TINY))
    for leaf in flat:
        leaves.append(jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), jnp.float32))
    return jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="module")
def theirs(random_clip):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shared = dict(num_hidden_layers=2, hidden_act="quick_gelu", projection_dim=12, layer_norm_eps=1e-5)
    config = transformers.CLIPConfig(
        projection_dim=12,
        vision_config=dict(
            hidden_size=32, intermediate_size=128, num_attention_heads=2, patch_size=8, image_size=16, **shared
        ),
        text_config=dict(
            hidden_size=24,
            intermediate_size=96,
            num_attention_heads=3,
            vocab_size=50,
            max_position_embeddings=9,
            eos_token_id=49,
            bos_token_id=48,
            **shared,
        ),
    )
    model = transformers.CLIPModel(config).eval()
    state = mapping.state_dict(random_clip, clip.RULES["transformers"])
    wanted = {k for k in model.state_dict() if "position_ids" not in k}
    assert set(state) == wanted
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=False)
    return model


def test_image_tower_equals_transformers(random_clip, theirs):
    import torch

    pixels = np.random.default_rng(1).normal(0, 1, (3, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.get_image_features(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    expected = getattr(expected, "pooler_output", expected).numpy()
    found = np.asarray(jax.jit(lambda m, x: m.visual(x))(random_clip, pixels))
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_text_tower_equals_transformers(random_clip, theirs):
    import torch

    ids = np.array([[48, 3, 7, 49, 49, 49, 49, 49, 49], [48, 5, 6, 7, 8, 9, 10, 11, 49], [48, 49, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = theirs.get_text_features(torch.from_numpy(ids))
    expected = getattr(expected, "pooler_output", expected).numpy()
    found = np.asarray(jax.jit(lambda m, x: m.text(x))(random_clip, ids.astype(np.int32)))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(found[0] - found[1]).max() > 0.1


@pytest.mark.parametrize("layout", clip.RULES)
def test_there_and_back(random_clip, layout):
    state = mapping.state_dict(random_clip, clip.RULES[layout])
    extra = {"openai": {"input_resolution": np.array(16)}, "transformers": {}}[layout]
    back = mapping.load_state_dict(abstract(**TINY), state | extra, clip.RULES[layout])
    for one, other in zip(jax.tree.leaves(random_clip), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("preset", clip.PRESETS)
def test_published_sizes(preset):
    files = [file for file in manifests.files() if file.preset == preset]
    assert [file.layout for file in files] == ["openai", "transformers"]
    module = abstract(**clip.PRESETS[preset])
    for file in files:
        shapes = mapping.upstream_shapes(module, clip.RULES[file.layout])
        assert len(shapes) == file.keys
        assert sum(np.prod(s.shape, dtype=int) for s in shapes.values()) == file.parameters
        if file.name == "ViT-B-32.pt":
            check_openais_names(shapes)


def check_openais_names(shapes):
    for name, shape in (
        ("visual.conv1.weight", (768, 3, 32, 32)),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", (2304, 768)),
        ("transformer.resblocks.0.attn.in_proj_bias", (1536,)),
        ("transformer.resblocks.0.mlp.c_fc.weight", (2048, 512)),
        ("visual.proj", (768, 512)),
        ("text_projection", (512, 512)),
        ("token_embedding.weight", (49408, 512)),
        ("positional_embedding", (77, 512)),
        ("logit_scale", ()),
    ):
        assert shapes[name].shape == shape


def test_preprocessing_is_pillows():
    image, size = pytest.importorskip("PIL.Image"), (60, 81)
    pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)
    short = min(size)
    rows, columns = (int(32 * side / short) for side in size)
    resized = np.asarray(image.fromarray(pixels).resize((columns, rows), image.Resampling.BICUBIC), np.int32)
    top, left = round((rows - 32) / 2), round((columns - 32) / 2)
    expected = resized[top : top + 32, left : left + 32]
    found = clip.prepared(jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1, 32)[0]
    levels = np.rint((np.asarray(found) + 1) * 127.5).astype(int)
    assert np.abs(levels - expected).max() <= 1  # Pillow's weights have 22 bits
    assert (levels != expected).mean() < 0.01


def test_tokens_out_of_upstreams_file(tmp_path):
    pytest.importorskip("transformers")
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    pairs = ["a n", "an d</w>", *(f"{one} {two}" for one in letters for two in letters)]
    pairs += [f"{one} {two}</w>" for one in letters for two in letters]
    merges = list(dict.fromkeys(pairs))[: clip.MERGES]
    with gzip.open(tmp_path / "bpe.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version", *merges, "left out"]))
    settings = clip._bpe(tmp_path / "bpe.txt.gz")
    assert len(settings["vocab"]) == clip.CLIPConfig.vocabulary == 49408
    assert settings["vocab"]["<|endoftext|>"] == 49407 and settings["vocab"]["!"] == 0 and settings["vocab"]["a"] == 64
    ids = clip.tokenizer(tmp_path / "bpe.txt.gz")(["And", "and " * 100])
    assert ids.shape == (2, 77) and ids.dtype == np.int32
    assert ids[0, :3].tolist() == [49406, settings["vocab"]["and</w>"], 49407]
    assert ids[1, -1] == 49407 and (ids[1, 1:-1] == ids[0, 1]).all()
    with pytest.raises(FileNotFoundError, match="bpe_simple_vocab_16e6"):
        clip.tokenizer(tmp_path / "nothing")


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="image_size 224 in patches of 30"):
        clip.CLIPConfig(patch_size=30)
