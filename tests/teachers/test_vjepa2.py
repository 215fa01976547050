"""V-JEPA 2 against upstream (golden results, make_videomae_golden.py) and transformers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import make_videomae_golden as golden
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import mapping, weights
from jaxalign.teachers import vjepa2
from jaxalign.teachers.vjepa2 import PRESETS, RULES, VJEPA2Config

FOLDER = Path(__file__).parent / "golden"

apply = jax.jit(lambda teacher, video: teacher(video))


def abstract(config):
    return jax.eval_shape(lambda: vjepa2.VJEPA2(config, rngs=nnx.Rngs(0)))


def drawn(config, layout="upstream"):
    shapes = mapping.upstream_shapes(abstract(config), RULES[layout])
    return {name: golden.draw_weight(name, spec.shape) for name, spec in shapes.items()}


def drawn_teacher(config):
    return mapping.load_state_dict(abstract(config), drawn(config), RULES["upstream"])


def close(found, expected, tolerance=1e-4):
    """Within 1e-4 of the largest value, which is not zero."""
    expected = np.asarray(expected)
    largest = np.abs(expected).max()
    assert largest > 1e-3
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * largest


def test_equals_upstream_on_frames_that_are_not_square():
    """Blocks and normed tokens; frame 0 dropped, and resized as VideoREPA does for all its video teachers."""
    stored = np.load(FOLDER / "vjepa2.npz")
    video = golden.in_range(golden.draw_video("vjepa2", golden.VJEPA2_CLIP))
    teacher = drawn_teacher(VJEPA2Config(**golden.VJEPA2, size=golden.VJEPA2_SIZE, layers=(0, 1)))
    tokens = apply(teacher, video)
    assert tokens.shape == (2, *teacher.grid(golden.VJEPA2_CLIP[1:4]), teacher.width) == (2, 3, 2, 3, 104)
    close(tokens[..., :52].reshape(2, 18, 52), stored["block_0"])
    close(tokens[..., 52:].reshape(2, 18, 52), stored["block_1"])
    teacher = drawn_teacher(VJEPA2Config(**golden.VJEPA2, size=golden.VJEPA2_SIZE, norm=True))
    close(apply(teacher, video).reshape(2, 18, 52), stored["normed"])


def test_names_and_size_of_the_real_network():
    expected = json.loads((FOLDER / "videomae_sizes.json").read_text())["vjepa2_l upstream"]
    module = abstract(VJEPA2Config(**PRESETS["vjepa2_l"]))
    shapes = {name: spec.shape for name, spec in mapping.upstream_shapes(module, RULES["upstream"]).items()}
    assert len(shapes) == expected["keys"]
    assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == expected["parameters"]
    assert golden.key_digest(shapes) == expected["digest"]
    assert module.grid((49, 480, 720)) == (24, 10, 15) and module.width == 1024


def test_values_and_gradients_equal_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.VJEPA2Model(
        transformers.VJEPA2Config(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            crop_size=48,
            frames_per_clip=6,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(golden.draw_weight(name, tuple(parameter.shape))))
    model.save_pretrained(tmp_path)
    arrays = weights.open_weights(tmp_path / "model.safetensors")
    config = VJEPA2Config(width=48, depth=2, num_heads=2, hidden=192, size=48, norm=True)
    teacher = mapping.load_state_dict(abstract(config), arrays, RULES["transformers"])
    exported = mapping.state_dict(teacher, RULES["transformers"])
    assert set(exported) == {name for name in arrays if name.startswith("encoder.")}
    assert all(exported[name].tobytes() == np.asarray(arrays[name]).tobytes() for name in exported)

    video = golden.in_range(golden.draw_video("transformers", (1, 6, 48, 48, 3)))
    probe = golden.draw("probe", (1, 27, 48))
    x = torch.from_numpy(video).requires_grad_()
    pixels = ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    tokens = model.get_vision_features(pixels.permute(0, 1, 4, 2, 3))
    (tokens * torch.from_numpy(probe)).sum().backward()

    def objective(teacher, video):
        found = teacher(video)
        return (found.reshape(probe.shape) * probe).sum(), found

    gradient = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    (by_leaf, by_video), found = gradient(teacher, video)
    close(found.reshape(1, 27, 48), tokens.detach())
    close(by_video, x.grad)
    by_name = mapping.state_dict(by_leaf, RULES["transformers"])
    theirs = dict(model.named_parameters())
    scale = max(np.abs(array).max() for array in by_name.values())
    for name, array in by_name.items():
        # adding the same to all keys changes no softmax: what is there is rounding, in both
        if name.endswith("key.bias"):
            assert np.abs(array).max() < 0.05 * scale
        else:
            close(array, theirs[name].grad, 2e-4)


def test_torch_flax_torch_is_bit_exact(tmp_path):
    """vitl.pt's form: the encoder among other parts, names below module.backbone., and a table that is not used."""
    torch = pytest.importorskip("torch")
    config = VJEPA2Config(**golden.VJEPA2)
    state = {name: torch.from_numpy(array) for name, array in drawn(config).items()}
    table = {"module.backbone.pos_embed": torch.zeros(1, 4, 52)}
    torch.save({"encoder": state | table, "target_encoder": {}, "epoch": 3}, tmp_path / "w.pt")
    arrays = weights.open_weights(tmp_path / "w.pt", key="encoder")
    exported = mapping.state_dict(
        mapping.load_state_dict(abstract(config), arrays, RULES["upstream"]), RULES["upstream"]
    )
    assert set(exported) == set(state)
    assert all(exported[name].tobytes() == state[name].numpy().tobytes() for name in state)
    bare = {name.removeprefix("module.backbone."): array for name, array in exported.items()}
    again = mapping.state_dict(mapping.load_state_dict(abstract(config), bare, RULES["plain"]), RULES["plain"])
    assert all(again[name].tobytes() == bare[name].tobytes() for name in bare)


def test_rotation():
    cos, sin = vjepa2.rotary_table(14, (3, 2, 4))
    assert cos.shape == sin.shape == (24, 14)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    # token (2, 1, 3): four channels of each axis at frequencies 1, 1/100, 1, 1/100; the last two stay
    angles = np.array([n * f for n in (2, 1, 3) for f in (1, 0.01, 1, 0.01)] + [0, 0])
    np.testing.assert_allclose(cos[-1], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[-1], np.sin(angles), atol=1e-6)
    x = jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    quarter = vjepa2.rotated(x, jnp.zeros((1, 6)), jnp.ones((1, 6)))
    np.testing.assert_array_equal(quarter.ravel(), [-2, 1, -4, 3, -6, 5])


def test_compute_dtype_is_the_parameters():
    teacher = drawn_teacher(VJEPA2Config(**golden.VJEPA2, size=golden.VJEPA2_SIZE))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), teacher)
    found = apply(half, golden.in_range(golden.draw_video("vjepa2", golden.VJEPA2_CLIP)))
    assert found.dtype == jnp.bfloat16
    wanted = np.load(FOLDER / "vjepa2.npz")["block_1"]
    assert 0 < np.abs(np.asarray(found, np.float32).reshape(wanted.shape) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_settings_are_checked():
    for settings, message in (
        (dict(size=100), r"size \(100, 100\) is no multiple of the patch size 16; take \(96, 96\)"),
        (dict(resize="area"), "resize 'area' is not known"),
        (dict(layers=24), "24 is no block"),
        (dict(width=64), "heads of 4 channels have no pairs"),
        (dict(width=112), "heads of 7 channels have no pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            VJEPA2Config(**settings)
    with pytest.raises(ValueError, match="9 frames is no number of tubelets"):
        abstract(VJEPA2Config(drop_first=False)).grid((9, 64, 64))
