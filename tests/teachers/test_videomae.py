"""VideoMAE V2 and VideoMAE against upstream (golden results, make_videomae_golden.py), transformers, and torch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import make_videomae_golden as golden
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import mapping, weights
from jaxalign.teachers import videomae
from jaxalign.teachers.videomae import PRESETS, RULES, VideoMAEConfig

FOLDER = Path(__file__).parent / "golden"
TINY = VideoMAEConfig(**golden.TINY, size=48)

apply = jax.jit(lambda teacher, video: teacher(video))


@pytest.fixture(scope="module")
def stored():
    return np.load(FOLDER / "videomae.npz")


def abstract(config):
    return jax.eval_shape(lambda: videomae.VideoMAE(config, rngs=nnx.Rngs(0)))


def drawn(config, layout="finetuned"):
    """What upstream's file of this network holds, from the stream that made the golden results."""
    shapes = mapping.upstream_shapes(abstract(config), RULES[layout])
    return {name: golden.draw_weight(name, spec.shape) for name, spec in shapes.items()}


def drawn_teacher(config, layout="finetuned"):
    return mapping.load_state_dict(abstract(config), drawn(config, layout), RULES[layout])


def close(found, expected, tolerance=1e-4):
    """Within 1e-4 of the largest value, which is not zero."""
    expected = np.asarray(expected)
    largest = np.abs(expected).max()
    assert largest > 1e-3
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * largest


# ---- against upstream's code --------------------------------------------------------------------------------------


def test_every_block_equals_upstreams(stored):
    teacher = drawn_teacher(VideoMAEConfig(**golden.TINY, size=48, layers=(0, 1, -1)))
    video = golden.in_range(golden.draw_video("clip", golden.CLIP))
    tokens = apply(teacher, video)
    assert tokens.shape == (2, *teacher.grid((8, 48, 48)), teacher.width) == (2, 4, 3, 3, 96)
    for block in range(3):
        close(tokens[..., 32 * block : 32 * (block + 1)].reshape(2, 36, 32), stored[f"finetuned_block_{block}"])


def test_pretrained_file_and_final_norm(stored):
    teacher = drawn_teacher(VideoMAEConfig(**golden.TINY, size=48, norm=True), "pretrained")
    tokens = apply(teacher, golden.in_range(golden.draw_video("clip", golden.CLIP)))
    close(tokens.reshape(2, 36, 32), stored["pretrained_normed"])


def test_videorepas_tokens(stored):
    """Frame 0 dropped, normalised, resized, positions resampled in space and time: all as the authors' code has it."""
    config = VideoMAEConfig(**golden.REPA, size=golden.REPA_SIZE)
    teacher = drawn_teacher(config)
    tokens = apply(teacher, golden.in_range(golden.draw_video("repa", golden.REPA_CLIP)))
    assert tokens.shape == (1, 24, 2, 3, 32) and teacher.grid(golden.REPA_CLIP[1:4]) == (24, 2, 3)
    close(tokens.reshape(1, 144, 32), stored["videorepa_tokens"])
    table = videomae.resampled_positions(32, config.trained_grid, (24, 2, 3))
    np.testing.assert_allclose(table.reshape(1, 144, 32), stored["videorepa_positions"], atol=2e-6)


def test_features_of_content_debiased_fvd(stored):
    teacher = drawn_teacher(VideoMAEConfig(**golden.FVD, size=(140, 210)))
    video = jnp.asarray(golden.in_range(golden.draw_video("fvd", golden.FVD_CLIP)))
    found = jax.jit(lambda teacher, video: teacher.features(video))(teacher, video)
    close(found, stored["fvd_features"])
    with pytest.raises(ValueError, match="19 frames is no number of tubelets"):
        teacher.features(video[:, 1:])


@pytest.mark.parametrize("layout", ["finetuned", "pretrained"])
@pytest.mark.parametrize("letter", "sblhg")
def test_names_and_sizes_of_the_real_networks(letter, layout):
    expected = json.loads((FOLDER / "videomae_sizes.json").read_text())[f"videomaev2_{letter} {layout}"]
    classes = 710 if layout == "finetuned" else 0
    for preset in (f"videomaev2_{letter}", f"videomae_v1_{letter}"):
        if preset in PRESETS:
            module = abstract(VideoMAEConfig(**PRESETS[preset], num_classes=classes))
            shapes = {name: spec.shape for name, spec in mapping.upstream_shapes(module, RULES[layout]).items()}
            assert len(shapes) == expected["keys"]
            assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == expected["parameters"]
            assert golden.key_digest(shapes) == expected["digest"]
            assert module.grid((49, 480, 720)) == (24, 10, 15)


# ---- against torch and transformers -------------------------------------------------------------------------------


def test_real_input_path_is_torchs():
    """480x720 to 160x240, five frames to four: mean and deviation first, then bicubic without antialiasing."""
    torch = pytest.importorskip("torch")
    video = golden.in_range(golden.draw_video("large", (1, 5, 480, 720, 3)))
    expected = golden.shrunk(golden.normalised(video), (160, 240)).permute(0, 2, 3, 4, 1)
    prepare = jax.jit(lambda x: videomae.prepared(x, (160, 240), method="bicubic", drop_first=True))
    found = prepare(video)
    assert found.shape == (1, 4, 160, 240, 3)
    close(found, expected, 1e-5)
    linear = jax.jit(lambda x: videomae.prepared(x, (48, 56), method="bilinear", drop_first=None))(video[:, :2])
    frames = golden.normalised(video)[0, :, :2].transpose(0, 1)
    close(linear[0], torch.nn.functional.interpolate(frames, (48, 56), mode="bilinear").permute(0, 2, 3, 1))


def test_real_positions_are_torchs():
    """The table of 8x14x14 tokens, brought to 24x10x15."""
    torch = pytest.importorskip("torch")
    index, channel = np.arange(1568.0)[:, None], np.arange(768)
    angles = index / 10000 ** (2 * (channel // 2) / 768)
    table = np.where(channel % 2, np.cos(angles), np.sin(angles)).astype(np.float32)
    assert np.abs(videomae.position_table(768, 1568) - table).max() < 1e-6
    x = torch.from_numpy(table).reshape(8, 14, 14, 768).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (10, 15), mode="bicubic", align_corners=False)
    x = torch.nn.functional.interpolate(x.transpose(0, 1)[None], (24, 10, 15), mode="trilinear", align_corners=False)
    config = VideoMAEConfig(**PRESETS["videomaev2_b"])
    found = jax.jit(lambda: videomae.resampled_positions(768, config.trained_grid, (24, 10, 15)))()
    close(found, x[0].permute(1, 2, 3, 0), 1e-5)
    # the trained grid has the table itself
    same = videomae.resampled_positions(64, (8, 14, 14), (8, 14, 14)).reshape(1568, 64)
    np.testing.assert_array_equal(same, videomae.position_table(64, 1568))


@pytest.fixture(scope="module")
def transformers_model():
    """transformers' classifier, whose `videomae` is its VideoMAEModel, every weight drawn."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.VideoMAEForVideoClassification(
        transformers.VideoMAEConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=48,
            num_frames=8,
            num_labels=golden.NUM_CLASSES,
            layer_norm_eps=1e-6,
            use_mean_pooling=True,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(golden.draw_weight(name, tuple(parameter.shape))))
    return model


def test_values_and_gradients_equal_transformers(transformers_model, tmp_path):
    import torch

    rules = RULES["transformers_finetuned"]
    transformers_model.save_pretrained(tmp_path)
    arrays = weights.open_weights(tmp_path / "model.safetensors")
    config = VideoMAEConfig(**golden.TINY, size=48, num_classes=golden.NUM_CLASSES)
    teacher = mapping.load_state_dict(abstract(config), arrays, rules)
    exported = mapping.state_dict(teacher, rules)
    assert set(exported) == set(arrays)
    assert all(exported[name].tobytes() == np.asarray(array).tobytes() for name, array in arrays.items())

    video = golden.in_range(golden.draw_video("transformers", (1, 8, 48, 48, 3)))
    probe = golden.draw("probe", (1, 36, 32))
    x = torch.from_numpy(video).requires_grad_()
    pixels = ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    tokens = transformers_model.videomae(pixels.permute(0, 1, 4, 2, 3)).last_hidden_state
    (tokens * torch.from_numpy(probe)).sum().backward()

    def objective(teacher, video):
        found = teacher(video)
        return (found.reshape(probe.shape) * probe).sum(), found

    gradient = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    (by_leaf, by_video), found = gradient(teacher, video)
    close(found.reshape(1, 36, 32), tokens.detach())
    close(by_video, x.grad)
    by_name = mapping.state_dict(by_leaf, rules)
    compared = 0
    for name, parameter in transformers_model.videomae.named_parameters():
        saved = "videomae." + name.replace("query.bias", "q_bias").replace("value.bias", "v_bias")
        close(by_name[saved], parameter.grad, 2e-4)
        compared += 1
    assert compared == len(by_name) - 4  # without fc_norm and the classifier


def test_transformers_pretraining_file_without_its_decoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=48,
            num_frames=8,
            use_mean_pooling=False,
            decoder_num_hidden_layers=1,
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        )
    )
    model.save_pretrained(tmp_path)
    arrays = weights.open_weights(tmp_path / "model.safetensors")
    rules = RULES["transformers_pretrained"]
    exported = mapping.state_dict(mapping.load_state_dict(abstract(TINY), arrays, rules), rules)
    assert set(exported) == {name for name in arrays if name.startswith("videomae.")}
    assert all(exported[name].tobytes() == np.asarray(arrays[name]).tobytes() for name in exported)


# ---- files --------------------------------------------------------------------------------------------------------


def test_torch_flax_torch_is_bit_exact(tmp_path):
    """Upstream's distilled file: half precision, under 'module', with a classifier."""
    torch = pytest.importorskip("torch")
    config = VideoMAEConfig(**golden.TINY, num_classes=golden.NUM_CLASSES)
    state = {name: torch.from_numpy(array).half() for name, array in drawn(config).items()}
    torch.save({"module": state}, tmp_path / "w.pth")
    arrays = weights.open_weights(tmp_path / "w.pth", key="module")
    teacher = mapping.load_state_dict(abstract(config), arrays, RULES["finetuned"])
    assert {leaf.dtype for leaf in jax.tree.leaves(teacher)} == {jnp.dtype("float32")}
    exported = mapping.state_dict(teacher, RULES["finetuned"], dtype=np.float16)
    assert set(exported) == set(state)
    assert all(exported[name].tobytes() == state[name].numpy().tobytes() for name in state)
    # who does not want the classifier gets the rest
    exported = mapping.state_dict(mapping.load_state_dict(abstract(TINY), arrays, RULES["finetuned"]))
    assert not any(name.startswith("head.") for name in exported) and exported


@pytest.mark.parametrize("layout", ["pretrained", "hub"])
def test_other_layouts_come_back_as_they_were(layout):
    state = drawn(TINY, layout)
    more = {
        "decoder.blocks.0.norm1.weight": np.ones(3),
        "mask_token": np.ones(1),
        "encoder_to_decoder.weight": np.ones(2),
    }
    teacher = mapping.load_state_dict(abstract(TINY), state | (more if layout == "pretrained" else {}), RULES[layout])
    exported = mapping.state_dict(teacher, RULES[layout])
    assert set(exported) == set(state)
    assert all(exported[name].tobytes() == state[name].tobytes() for name in state)
    others = [other for other in RULES if other != layout]
    for other in others:
        with pytest.raises(ValueError, match="do not fit the model"):
            mapping.load_state_dict(abstract(TINY), state, RULES[other])


# ---- as a teacher -------------------------------------------------------------------------------------------------


def test_frames_that_are_no_tubelets():
    for drop_first, frames, grid in ((None, 9, 4), (None, 8, 4), (True, 9, 4), (False, 8, 4)):
        assert abstract(VideoMAEConfig(size=48, drop_first=drop_first)).grid((frames, 99, 99)) == (grid, 3, 3)
    for drop_first, frames, message in (
        (True, 8, "8 frames without the first is no number .* drop_first=False"),
        (False, 9, "9 frames is no number of tubelets of 2 frames; write drop_first=True"),
        (None, 1, "1 frames without the first"),
    ):
        with pytest.raises(ValueError, match=message):
            abstract(VideoMAEConfig(size=48, drop_first=drop_first)).grid((frames, 99, 99))


def test_first_frame_counts_where_it_is_kept():
    pytest.importorskip("torch")
    video = jnp.asarray(golden.in_range(golden.draw_video("first", (1, 9, 16, 16, 3))))
    expected = golden.normalised(np.array(video)).permute(0, 2, 3, 4, 1)
    for drop_first, clip, wanted in (
        (None, video, expected[:, 1:]),
        (True, video, expected[:, 1:]),
        (None, video[:, :8], expected[:, :8]),
        (False, video[:, :8], expected[:, :8]),
    ):
        close(videomae.prepared(clip, (16, 16), method="bicubic", drop_first=drop_first), wanted, 1e-6)


def test_compute_dtype_is_the_parameters(stored):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn_teacher(TINY))
    found = apply(half, golden.in_range(golden.draw_video("clip", golden.CLIP)))
    assert found.dtype == jnp.bfloat16
    wanted = stored["finetuned_block_2"]
    assert 0 < np.abs(np.asarray(found, np.float32).reshape(wanted.shape) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_settings_are_checked():
    for settings, message in (
        (dict(size=(160, 250)), r"size \(160, 250\) is no multiple of the patch size 16; take \(160, 256\)"),
        (dict(resize="area"), "resize 'area' is not known; write one of bicubic, bilinear"),
        (dict(layers=12), "12 is no block"),
        (dict(frames=15), "15 frames of 224² are no tubelets"),
        (dict(num_heads=5), "num_heads 5 does not divide width 768"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoMAEConfig(**settings)
