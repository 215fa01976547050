"""SAM2.1's Hiera against transformers' Sam2VisionModel: every level, gradients, files, sizes, settings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Sam2HieraDetConfig, Sam2VisionConfig, Sam2VisionModel

from jaxalign.interop import mapping
from jaxalign.interop.weights import open_weights
from jaxalign.models.frames import normalised
from jaxalign.teachers import hiera
from jaxalign.teachers.hiera import PRESETS, RULES, Hiera, HieraConfig

TINY = dict(
    width=16,
    num_heads=1,
    stages=(1, 1, 4, 2),  # blocks 3 and 4 are a stack of more than one
    global_blocks=(5,),
    windows=(4, 4, 6, 3),
    background=24,
    fpn_width=24,
)
# 96x96 fills every window and is the grid of the position table; in 64x128 the windows of stages 2 and 3 stick out at
# the right and below, those of the block that leads to stage 3 too, and the table shrinks along one axis and grows
# along the other.
SIZES = ((96, 96), (64, 128))
WIDTHS = (16, 32, 64, 128)


def theirs(config):
    """transformers' network of the same settings; on the meta device where the caller says so."""
    stages = range(len(config.stages))
    backbone = Sam2HieraDetConfig(
        hidden_size=config.width,
        num_attention_heads=config.num_heads,
        window_positional_embedding_background_size=[config.background] * 2,
        blocks_per_stage=list(config.stages),
        embed_dim_per_stage=[config.width * 2**i for i in stages],
        num_attention_heads_per_stage=[config.num_heads * 2**i for i in stages],
        window_size_per_stage=list(config.windows),
        global_attention_blocks=list(config.global_blocks),
    )
    return Sam2VisionModel(
        Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=[config.width * 2**i for i in reversed(stages)],
            fpn_hidden_size=config.fpn_width,
            fpn_top_down_levels=list(config.top_down),
            num_feature_levels=len(config.stages),
        )
    ).eval()


def upstream_name(name):
    """SAM2's name of a parameter of transformers' network."""
    for pattern, to in (
        (r"^backbone\.", "trunk."),
        (r"patch_embed\.projection", "patch_embed.proj"),
        (r"layer_norm", "norm"),
        (r"mlp\.proj_in", "mlp.layers.0"),
        (r"mlp\.proj_out", "mlp.layers.1"),
        (r"^neck\.convs\.(\d)", r"neck.convs.\1.conv"),
        (r"^", "image_encoder."),
    ):
        name = re.sub(pattern, to, name)
    return name


def abstract(config):
    return jax.eval_shape(lambda: Hiera(config, rngs=nnx.Rngs(0)))


def load(state, **settings):
    return mapping.load_state_dict(abstract(HieraConfig(**(TINY | settings))), state, RULES)


def video_of(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def to_torch(frames):
    return torch.from_numpy(np.array(frames).transpose(0, 3, 1, 2).copy())


def close(ours, wanted, tolerance=1e-4):
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    assert ours.shape == wanted.shape
    assert np.abs(wanted).max() > 1e-3
    assert np.abs(ours - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.fixture(scope="module")
def network():
    """transformers' tiny network, every parameter random, and its state dict in SAM2's names."""
    model = theirs(HieraConfig(**TINY))
    random = np.random.default_rng(0)
    state = {}
    for name, parameter in model.state_dict().items():
        norm = "norm" in name and name.endswith("weight")
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "pos_embed" not in name else 0.3
        value = (random.standard_normal(parameter.shape) * scale + norm).astype(np.float32)
        state[upstream_name(name)] = value
        parameter.copy_(torch.from_numpy(value))
    return model, state


@pytest.fixture(scope="module")
def found(network):
    """For each size: the frames, what the stages give and the neck's maps."""
    teacher = load(network[1], size=None)
    levels = jax.jit(lambda teacher, x: (x, stages := teacher.stages(x), teacher.neck(stages)))
    return {size: levels(teacher, video_of(2, *size, 3)) for size in SIZES}


tokens = jax.jit(lambda teacher, video: teacher(video))


@pytest.mark.parametrize("size", SIZES)
def test_every_level_equals_transformers(network, found, size):
    model, _ = network
    x, stages, maps = found[size]
    with torch.no_grad():
        pixels = to_torch(normalised(x))
        wanted_stages = model.backbone(pixels).intermediate_hidden_states
        wanted = model(pixels).fpn_hidden_states
    assert len(maps) == len(wanted) == len(stages) == 4
    for level in range(4):
        grid = (size[0] // (4 * 2**level), size[1] // (4 * 2**level))
        assert maps[level].shape == (2, *grid, 24) and stages[level].shape == (2, *grid, WIDTHS[level])
        close(maps[level], wanted[level].permute(0, 2, 3, 1))
        close(stages[level], wanted_stages[level])


def test_gradients_equal_transformers(network):
    """Of all levels together, by every parameter and by the pixels, where windows stick out."""
    model, state = network
    x = video_of(1, *SIZES[1], 3)
    # a loss for which no gradient is zero by symmetry
    weights = [video_of(1, SIZES[1][0] // s, SIZES[1][1] // s, 24, seed=s) for s in (4, 8, 16, 32)]

    @jax.jit
    def gradients(teacher, x):
        def loss(teacher, x):
            return sum(jnp.sum(y * w) for y, w in zip(teacher.pyramid(x), weights, strict=True))

        return jax.grad(loss, argnums=(0, 1))(teacher, x)

    by_leaf, by_pixel = gradients(load(state, size=None, remat=True), x)
    pixels = to_torch(x).requires_grad_()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    maps = model(((pixels + 1) / 2 - mean) / std).fpn_hidden_states
    model.zero_grad()
    sum((y.permute(0, 2, 3, 1) * torch.from_numpy(w)).sum() for y, w in zip(maps, weights, strict=True)).backward()
    close(by_pixel, pixels.grad.permute(0, 2, 3, 1))
    by_name = mapping.state_dict(by_leaf, RULES)
    assert set(by_name) == set(state)
    for name, parameter in model.named_parameters():
        if not name.endswith("attn.qkv.bias"):
            close(by_name[upstream_name(name)], parameter.grad)
        else:  # the softmax does not see k's bias: zero but for rounding
            (q, k, v), (q2, k2, v2) = (
                np.split(np.asarray(g), 3) for g in (by_name[upstream_name(name)], parameter.grad)
            )
            close(np.concatenate([q, v]), np.concatenate([q2, v2]))
            assert max(np.abs(k).max(), np.abs(k2).max()) < 1e-4 * np.abs(v2).max()


def test_video_is_resized_and_cut_into_steps(network):
    """2 frames of each of 2 clips go through the network in one step, and the second step is filled up."""
    model, state = network
    video = video_of(2, 3, 40, 200, 3)
    with torch.no_grad():
        resized = torch.nn.functional.interpolate(
            to_torch(video.reshape(6, 40, 200, 3)), SIZES[1], mode="bilinear", antialias=True, align_corners=False
        )
        pixels = to_torch(normalised(jnp.asarray(resized.permute(0, 2, 3, 1).numpy())))
        wanted = model(pixels).fpn_hidden_states[2].permute(0, 2, 3, 1)
    teacher = load(state, size=list(SIZES[1]), frames_at_once=4)
    result = tokens(teacher, video)
    assert result.shape == (2, *teacher.grid((3, 40, 200)), teacher.width) == (2, 3, 4, 8, 24)
    close(result.reshape(6, 4, 8, 24), wanted)


def test_trunk_tokens_in_half_precision(network, found):
    x, stages, _ = found[SIZES[1]]
    teacher = load(network[1], size=SIZES[1], level=3, output="trunk")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), teacher)
    result = tokens(half, x[None])
    assert result.dtype == jnp.bfloat16
    assert result.shape == (1, *teacher.grid((2, *SIZES[1])), teacher.width) == (1, 2, 2, 4, 128)
    error = jnp.linalg.norm(result[0].astype(jnp.float32) - stages[3]) / jnp.linalg.norm(stages[3])
    assert 0 < error < 0.05


def test_torch_flax_torch_is_bit_exact(network, tmp_path):
    """From a file as SAM2 publishes it: 'model' holds the other networks' weights too."""
    _, state = network
    rest = (
        "memory_attention.layers.0.norm1.weight",
        "memory_encoder.out_proj.bias",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "sam_mask_decoder.iou_token.weight",
        "obj_ptr_proj.layers.0.weight",
        "obj_ptr_tpos_proj.weight",
        "mask_downsample.weight",
        "maskmem_tpos_enc",
        "no_mem_embed",
        "no_mem_pos_enc",
        "no_obj_ptr",
        "no_obj_embed_spatial",
    )
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    torch.save({"model": tensors | {name: torch.ones(2) for name in rest}}, tmp_path / "sam2.1.pt")
    exported = mapping.state_dict(load(open_weights(tmp_path / "sam2.1.pt", key="model")), RULES)
    assert set(exported) == set(state)
    for name, value in state.items():
        assert exported[name].dtype == value.dtype and exported[name].shape == value.shape
        assert exported[name].tobytes() == value.tobytes(), name
    with pytest.raises(ValueError, match=r"no place for: image_encoder\.trunk\.blocks\.8\.norm1\.weight"):
        load(state | {"image_encoder.trunk.blocks.8.norm1.weight": np.ones(128, np.float32)})
    with pytest.raises(ValueError, match=r"no place for: text_encoder\.weight"):
        load(state | {"text_encoder.weight": np.ones(2, np.float32)})


# ---- the real networks --------------------------------------------------------------------------------------------

# (keys, numbers) below image_encoder. of upstream's own model, counted once on the meta device
FACTS = {
    "sam21_hiera_t": (162, 27_219_136),
    "sam21_hiera_s": (210, 34_316_992),
    "sam21_hiera_bplus": (306, 69_106_816),
    "sam21_hiera_l": (594, 212_703_280),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_upstreams_keys(name):
    config = HieraConfig(**PRESETS[name])
    teacher = abstract(config)
    shapes = {key: spec.shape for key, spec in mapping.upstream_shapes(teacher, RULES).items()}
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == FACTS[name]
    with torch.device("meta"):
        model = theirs(config)
    assert shapes == {upstream_name(key): tuple(value.shape) for key, value in model.state_dict().items()}
    assert (teacher.grid((7, 480, 720)), teacher.width) == ((7, 64, 64), 256)


def test_blocks_are_grouped():
    found = hiera.runs(HieraConfig(**PRESETS["sam21_hiera_bplus"]))
    assert [(run.start, run.count, run.window) for run in found] == [
        (0, 2, 8),
        (2, 1, 8),  # leads to stage 1, with the windows of stage 0
        (3, 2, 4),
        (5, 1, 4),
        (6, 6, 14),
        (12, 1, 0),
        (13, 3, 14),
        (16, 1, 0),
        (17, 3, 14),
        (20, 1, 0),
        (21, 1, 14),
        (22, 2, 7),
    ]
    assert [run.start for run in found if run.pools] == [2, 5, 21]
    assert (found[-1].inputs, found[-1].outputs, found[-1].num_heads) == (896, 896, 16)


def test_grid_and_width():
    for level, side, fpn, trunk in ((0, 32, 24, 16), (2, 8, 24, 64)):
        for output, width in (("fpn", fpn), ("trunk", trunk)):
            teacher = abstract(HieraConfig(**TINY, size=128, level=level, output=output))
            assert (teacher.grid((5, 60, 80)), teacher.width) == ((5, side, side), width)
    teacher = abstract(HieraConfig(**TINY, size=None))
    assert teacher.grid((5, 64, 96)) == (5, 4, 6)
    with pytest.raises(ValueError, match=r"40x64 are no multiples of 32; set size=\(32, 64\)"):
        teacher.grid((2, 40, 64))


def test_settings_are_checked():
    for settings, message in (
        ({"size": 100}, r"100x100 are no multiples of 32; set size=\(96, 96\)"),
        ({"size": (64, 0)}, "64x0 are no multiples of 32"),
        ({"level": 4}, "level must be 0 to 3"),
        ({"output": "neck"}, "output 'neck' is not known; write 'fpn' or 'trunk'"),
        ({"frames_at_once": 0}, "frames_at_once must be at least 1"),
        ({"windows": (8, 4, 14)}, "one for each of the 4 stages"),
        ({"global_blocks": (5,)}, "block 5 pools its queries"),
        ({"windows": (8, 5, 14, 7)}, "block 5 pools its queries"),
        ({"attention": "flash"}, "attention 'flash' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            HieraConfig(**settings)
