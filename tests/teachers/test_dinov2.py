"""DINOv2 against transformers (both variants, SwiGLU too), upstream's names, sizes and position tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import mapping, weights
from jaxalign.teachers import dinov2
from jaxalign.teachers.dinov2 import DINOv2, DINOv2Config

torch = pytest.importorskip("torch")

# transformers resamples positions without upstream's offset, which test_positions_are_upstreams has instead
TINY = dict(width=48, depth=3, num_heads=3, position_grid=5, position_offset=0.0, size=None)
CASES = {
    "plain": TINY,
    "registers": TINY | dict(registers=4, position_antialias=True),
    "swiglu": TINY | dict(mlp="swiglu"),
}

# Keys and parameters of facebookresearch/dinov2's own modules (dinov2/hub/backbones.py), counted on the meta device.
UPSTREAM = {
    "dinov2_s": (175, 22_056_576),
    "dinov2_b": (175, 86_580_480),
    "dinov2_l": (343, 304_368_640),
    "dinov2_g": (567, 1_136_480_768),
    "dinov2_s_reg": (176, 22_058_112),
    "dinov2_b_reg": (176, 86_583_552),
    "dinov2_l_reg": (344, 304_372_736),
    "dinov2_g_reg": (568, 1_136_486_912),
}

apply = jax.jit(lambda teacher, video: teacher(video))


def abstract(**settings):
    config = DINOv2Config(**settings)
    return jax.eval_shape(lambda: DINOv2(config, rngs=nnx.Rngs(0)))


def random_state(**settings):
    """Upstream's state dict with every entry random."""
    random = np.random.default_rng(0)
    state = {}
    for name, spec in mapping.upstream_shapes(abstract(**settings), dinov2.RULES).items():
        centre = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")) else 0.0
        scale = np.prod(spec.shape[1:]) ** -0.5 if name.endswith("weight") and len(spec.shape) > 1 else 0.3
        state[name] = random.normal(centre, scale, spec.shape).astype(np.float32)
    return state


def load(state, **settings):
    return mapping.load_state_dict(abstract(**settings), state, dinov2.RULES)


def transformers_model(case, state):
    """transformers' network with upstream's weights under its own names."""
    import transformers

    kind = "Dinov2WithRegisters" if case == "registers" else "Dinov2"
    settings = dict(use_swiglu_ffn=case == "swiglu", image_size=70, patch_size=14)
    settings |= dict(num_register_tokens=4) if case == "registers" else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, **settings
    )
    theirs = {}
    for name, array in state.items():
        array = torch.from_numpy(array)
        head, _, leaf = name.rpartition(".")
        head = head.replace("blocks.", "encoder.layer.").replace(
            "patch_embed.proj", "embeddings.patch_embeddings.projection"
        )
        if head == "":
            theirs["embeddings." + {"pos_embed": "position_embeddings"}.get(leaf, leaf)] = array
        elif head.endswith("attn.qkv"):
            for part, piece in zip("qkv", array.chunk(3), strict=True):
                theirs[f"{head[:-8]}attention.{part}_proj.{leaf}"] = piece
        elif head.endswith("mlp.w12"):
            for part, piece in zip(("gate", "up"), array.chunk(2), strict=True):
                theirs[f"{head[:-4]}.{part}_proj.{leaf}"] = piece
        else:
            head = head.replace("attn.proj", "attention.o_proj").replace("mlp.w3", "mlp.down_proj")
            head = "layernorm" if head == "norm" else head
            theirs[
                f"{head}.{leaf}".replace("ls1.gamma", "layer_scale1.lambda1").replace(
                    "ls2.gamma", "layer_scale2.lambda1"
                )
            ] = array
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.load_state_dict(theirs, strict=True)
    return model


def pixels(video):
    """[t, h, w, 3] in [-1, 1] -> what the processor gives: channels first, ImageNet's mean and deviation."""
    rgb = (torch.from_numpy(video).permute(0, 3, 1, 2) + 1) / 2
    mean, std = ([[[v]] for v in values] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (rgb - torch.tensor(mean)) / torch.tensor(std)


def video_of(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def close(found, wanted, tolerance=1e-4):
    wanted = np.asarray(wanted.detach() if hasattr(wanted, "detach") else wanted)
    assert np.abs(wanted).max() > 1e-3
    assert np.abs(np.asarray(found).reshape(wanted.shape) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    """Every layer raw, the last one normed, and the gradient of the video; positions resampled to 3 x 6 patches."""
    state = random_state(**CASES[case])
    model, prefix = transformers_model(case, state), 5 if case == "registers" else 1
    video = video_of(1, 2, 42, 84)
    video_torch = torch.from_numpy(video[0]).requires_grad_()
    rgb = (video_torch.permute(0, 3, 1, 2) + 1) / 2
    shift, factor = pixels(np.full((1, 1, 1, 3), -1, np.float32)), pixels(np.ones((1, 1, 1, 3), np.float32))
    out = model(shift + rgb * (factor - shift), output_hidden_states=True)
    wanted = torch.cat([out.hidden_states[i][:, prefix:] for i in (1, 3)], dim=-1)
    probe = np.random.default_rng(1).standard_normal(wanted.shape).astype(np.float32)
    (wanted * torch.from_numpy(probe)).sum().backward()

    raw = load(state, **CASES[case], layers=(0, 2), norm=False)

    def objective(video, teacher):
        tokens = teacher(video)
        return (tokens * probe.reshape(tokens.shape)).sum(), tokens

    gradient, tokens = jax.jit(jax.grad(objective, has_aux=True))(video, raw)
    assert tokens.shape == (1, *raw.grid((2, 42, 84)), raw.width) == (1, 2, 3, 6, 96)
    close(tokens, wanted)
    close(gradient, video_torch.grad)
    close(apply(load(state, **CASES[case]), video), out.last_hidden_state[:, prefix:])


def test_positions_are_as_trained_on_their_own_grid():
    state = random_state(**TINY)
    video = video_of(1, 1, 70, 70)
    with torch.no_grad():
        wanted = transformers_model("plain", state)(pixels(video[0])).last_hidden_state[:, 1:]
    # an offset has no say there
    close(apply(load(state, **TINY | dict(position_offset=0.1)), video), wanted)


@pytest.mark.parametrize("name", ["dinov2_b", "dinov2_b_reg"])
def test_positions_are_upstreams(name):
    """What each published variant asks of torch's interpolate (dinov2/hub/backbones.py, interpolate_pos_encoding)."""
    settings = dinov2.PRESETS[name] | dict(width=24, depth=1, num_heads=1)
    teacher = load(random_state(**settings), **settings)
    table = torch.from_numpy(np.array(teacher.pos_embed[...]))
    for rows, columns in ((16, 16), (30, 45), (37, 20)):
        if name.endswith("_reg"):
            how = dict(size=(rows, columns), antialias=True)
        else:
            how = dict(scale_factor=((rows + 0.1) / 37, (columns + 0.1) / 37))
        grid = torch.nn.functional.interpolate(
            table[:, 1:].reshape(1, 37, 37, 24).permute(0, 3, 1, 2), mode="bicubic", **how
        )
        assert grid.shape[2:] == (rows, columns)
        wanted = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        close(teacher._positions(rows, columns), wanted, 2e-5)


def test_frames_are_resized_as_torch_does():
    state = random_state(**TINY)
    video = video_of(1, 2, 50, 64)
    clip = torch.from_numpy(video[0]).permute(0, 3, 1, 2)
    found = {}
    for antialias in (False, True):
        resized = torch.nn.functional.interpolate(clip, size=(28, 42), mode="bicubic", antialias=antialias)
        wanted = apply(load(state, **TINY), resized.permute(0, 2, 3, 1).numpy()[None])
        teacher = load(state, **TINY | dict(size=(28, 42), antialias=antialias))
        found[antialias] = apply(teacher, video)
        assert found[antialias].shape == (1, *teacher.grid((2, 50, 64)), 48) == (1, 2, 2, 3, 48)
        close(found[antialias], wanted)
    assert np.abs(found[True] - found[False]).max() > 1e-2


def test_frames_at_once_changes_nothing():
    state = random_state(**TINY)
    video = video_of(2, 5, 28, 42)
    whole = np.asarray(apply(load(state, **TINY), video))
    teacher = load(state, **TINY, frames_at_once=4)
    assert teacher.grid((5, 28, 42)) == (5, 2, 3)
    close(apply(teacher, video), whole)


def test_compute_dtype_is_the_parameters():
    state = random_state(**CASES["registers"])
    teacher = load(state, **CASES["registers"])
    half = mapping.load_state_dict(teacher, state, dinov2.RULES, dtype=jnp.bfloat16)
    video = video_of(1, 1, 28, 28)
    found, wanted = apply(half, video), apply(teacher, video)
    assert found.dtype == jnp.bfloat16 and wanted.dtype == jnp.float32
    error, scale = jnp.abs(found - wanted).max(), jnp.abs(wanted).max()
    assert 0 < error < 0.05 * scale


@pytest.mark.parametrize("case", CASES)
def test_torch_flax_torch_is_bit_exact(case, tmp_path):
    state = random_state(**CASES[case])
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, tmp_path / "w.pth")
    teacher = load(weights.open_weights(tmp_path / "w.pth"), **CASES[case])
    exported = mapping.state_dict(teacher, dinov2.RULES)
    assert set(exported) == set(state) and "mask_token" in state
    assert all(exported[name].tobytes() == state[name].tobytes() for name in state)


@pytest.mark.parametrize("name", dinov2.PRESETS)
def test_real_sizes_are_upstreams(name):
    keys, parameters = UPSTREAM[name]
    settings = dinov2.PRESETS[name]
    shapes = mapping.upstream_shapes(abstract(**settings), dinov2.RULES)
    blocks = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    blocks += ["ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma"]
    blocks += [
        f"mlp.{m}.{leaf}" for m in (("w12", "w3") if "_g" in name else ("fc1", "fc2")) for leaf in ("weight", "bias")
    ]
    wanted = {f"blocks.{i}.{leaf}" for i in range(settings["depth"]) for leaf in blocks}
    wanted |= {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    wanted |= {"norm.weight", "norm.bias"} | ({"register_tokens"} if name.endswith("_reg") else set())
    assert set(shapes) == wanted and len(shapes) == keys
    assert sum(np.prod(spec.shape, dtype=int) for spec in shapes.values()) == parameters
    assert shapes["pos_embed"].shape == (1, 1370, settings["width"])


def test_a_wrong_file_names_its_keys():
    state = random_state(**TINY)
    with pytest.raises(ValueError, match=r"lacks: register_tokens"):
        load(state, **CASES["registers"])
    with pytest.raises(ValueError, match=r"no place for: head\.weight"):
        load(state | {"head.weight": np.zeros((2, 2), np.float32)}, **TINY)


def test_settings_are_checked():
    assert DINOv2Config(size=[224, 336], layers=[2, 11]) == DINOv2Config(size=(224, 336), layers=(2, -1))
    hash(DINOv2Config(size=[224, 336], layers=[2, 11]))
    for settings, message in (
        ({"size": 225}, r"frames of 225x225 are no multiples of the patch size 14; set size=\(224, 224\)"),
        ({"layers": (12,)}, "12 is no block here; write whole numbers from 0 to 11"),
        ({"frames_at_once": 0}, "frames_at_once must be at least 1"),
        ({"attention": "flash"}, "attention 'flash' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            DINOv2Config(**settings)
    teacher = abstract(size=None)
    with pytest.raises(
        ValueError, match=r"frames of 480x720 are no multiples of the patch size 14; set size=\(476, 714\)"
    ):
        teacher.grid((4, 480, 720))
    assert abstract(size=(420, 630)).grid((49, 480, 720)) == (49, 30, 45)
