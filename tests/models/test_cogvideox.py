"""CogVideoX against diffusers: outputs, gradients, taps, weights at tiny sizes, names and shapes at real ones."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import mapping
from jaxalign.models import MODELS, cogvideox

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# The programs here run once or twice on tiny shapes: half of the time would go into optimising their machine code.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TINY = dict(
    input_size=(4, 6),
    num_frames=4,
    width=32,
    depth=3,
    num_heads=2,
    in_channels=4,
    sample_size=(4, 6),
    text_tokens=5,
    text_width=12,
    time_width=16,
)
CASES = {  # name -> what differs from TINY, and what differs in diffusers' config
    "2b": (dict(), dict()),
    "5b": (
        # A grid of another size and aspect than the trained one.
        dict(positions="rotary", sample_size=(10, 8), remat=True),
        dict(use_rotary_positional_embeddings=True, sample_height=10, sample_width=8),
    ),
    "5b_i2v": (
        dict(positions="rotary+learned", image_channels=3),
        dict(use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True, in_channels=7),
    ),
    "1.5_5b_i2v": (
        dict(positions="rotary", image_channels=3, patch_size_t=2, ofs_width=16, sample_size=(300, 300)),
        dict(
            use_rotary_positional_embeddings=True,
            in_channels=7,
            patch_size_t=2,
            ofs_embed_dim=16,
            sample_height=300,
            sample_width=300,
            patch_bias=False,
        ),
    ),
}
TAPS = {"2b": (0, 2), "5b": (1,), "5b_i2v": (), "1.5_5b_i2v": (0,)}


def tiny(name, **changes):
    return cogvideox.CogVideoXConfig(**TINY | CASES[name][0] | changes)


def abstract(config):
    return jax.eval_shape(lambda: cogvideox.CogVideoX(config, rngs=nnx.Rngs(0)))


def their_model(name):
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(
        **dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=12,
            num_layers=3,
            sample_height=4,
            sample_width=6,
            sample_frames=13,
            max_text_seq_length=5,
        )
        | CASES[name][1]
    ).float()


def draw(name, shape):
    return np.random.default_rng(sum(map(ord, name))).standard_normal(shape).astype(np.float32)


def draw_weight(name, shape):
    """No leaf is zero or one: scales around 1, kernels of about unit gain, biases and tables small."""
    values = draw(name, shape)
    if re.search(r"norm(_[qk]|_final|)\.weight$", name):
        return 1 + 0.2 * values
    return values / np.float32(np.prod(shape[1:]) ** 0.5) if name.endswith("weight") else 0.3 * values


def inputs(config, batch=2):
    shape = (batch, config.num_frames, *config.input_size, config.in_channels + config.image_channels)
    text = (batch, config.text_tokens, config.text_width)
    return jnp.asarray(draw("video", shape)), jnp.array([37.5, 941.0]), jnp.asarray(draw("text", text))


def random_model(config):
    module, rules = abstract(config), cogvideox.weight_rules(config)
    shapes = mapping.upstream_shapes(module, rules)
    return mapping.load_state_dict(module, {n: draw_weight(n, s.shape) for n, s in shapes.items()}, rules)


def their_rotary(model, config):
    """The tables as diffusers' pipeline prepares them."""
    host = SimpleNamespace(vae_scale_factor_spatial=8, transformer=model)
    prepare = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(host, 8 * config.input_size[0], 8 * config.input_size[1], config.num_frames, "cpu")


def close(found, expected, what):
    """Within 1e-4 of the largest value, which is not zero."""
    largest = np.abs(expected).max()
    assert largest > 1e-3, what
    assert found.shape == expected.shape, what
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4 * largest, what


@functools.cache
def run_theirs(name):
    """Their state dict, prediction, every block's video tokens, and the gradients by name."""
    config, model = tiny(name), their_model(name)
    state = {key: torch.from_numpy(draw_weight(key, tuple(value.shape))) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    video, timesteps, text = (torch.from_numpy(np.array(value)) for value in inputs(config))
    video = video.permute(0, 1, 4, 2, 3).requires_grad_()
    text.requires_grad_()
    tokens = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, arguments, output: tokens.append(output[0]))
    leaves = dict(model.named_parameters())
    if "learned" in config.positions:  # a buffer there
        leaves["patch_embed.pos_embedding"] = model.patch_embed.pos_embedding.requires_grad_()
    out = model(
        video,
        text,
        timesteps,
        ofs=torch.full((1,), 2.0) if config.ofs_width else None,
        image_rotary_emb=None if config.positions == "sincos" else their_rotary(model, config),
    ).sample.permute(0, 1, 3, 4, 2)
    objective = (out * torch.from_numpy(draw("probe", tuple(out.shape)))).sum()
    for tap in TAPS[name]:
        objective = objective + torch.sin(tokens[tap]).sum()
    objective.backward()
    grads = {key: leaf.grad.numpy() for key, leaf in leaves.items()}
    grads |= {"video": video.grad.permute(0, 1, 3, 4, 2).numpy(), "text": text.grad.numpy()}
    state = {key: value.numpy() for key, value in state.items()}
    return state, out.detach().numpy(), [value.detach().numpy() for value in tokens], grads


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name):
    config = tiny(name)
    rules = cogvideox.weight_rules(config)
    state, expected, their_tokens, their_grads = run_theirs(name)
    model = mapping.load_state_dict(abstract(config), state, rules)
    exported = mapping.state_dict(model, rules)  # torch -> Flax -> torch: the same bits under the same names
    assert set(exported) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)
    video, timesteps, text = inputs(config)

    def objective(model, video, text):
        out, tokens = model(video, timesteps, text, taps=TAPS[name])
        aligned = sum(jnp.sin(value).sum() for value in tokens.values())
        return (out * draw("probe", out.shape)).sum() + aligned, (out, tokens)

    gradient = quick_jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
    (grads, grad_video, grad_text), (out, tokens) = gradient(model, video, text)
    close(out, expected, "prediction")
    assert set(tokens) == set(TAPS[name])
    for tap, value in tokens.items():
        assert value.shape == (2, *config.grid, config.width)
        close(value.reshape(2, -1, config.width), their_tokens[tap], f"tap {tap}")
    close(grad_video, their_grads["video"], "gradient of the latents")
    close(grad_text, their_grads["text"], "gradient of the text")
    found = mapping.state_dict(grads, rules)
    assert set(found) | {"video", "text"} == set(their_grads)
    for key, value in found.items():
        if config.positions == "sincos" and key.endswith("norm_k.bias"):
            # The same vector on every key adds the same to every score: its gradient is rounding.
            assert max(np.abs(value).max(), np.abs(their_grads[key]).max()) < 1e-3, key
        else:
            close(value, their_grads[key], f"gradient of {key}")


@pytest.mark.parametrize("size", [(4, 6), (8, 6), (4, 4), (10, 16), (6, 20)])
@pytest.mark.parametrize("name", ["5b", "1.5_5b_i2v"])
def test_rotary_angles_of_other_sizes_are_those_of_the_pipeline(name, size):
    config = tiny(name, input_size=size)
    model = SimpleNamespace(
        config=SimpleNamespace(
            patch_size=config.patch_size,
            patch_size_t=config.patch_size_t,
            sample_height=config.sample_size[0],
            sample_width=config.sample_size[1],
            attention_head_dim=config.head_dim,
        )
    )
    cos, sin = their_rotary(model, config)
    angles = cogvideox.rotary_angles(config)
    assert angles.shape == (config.num_tokens, config.head_dim // 2)
    assert not angles[: config.text_tokens].any()
    video = np.repeat(angles[config.text_tokens :], 2, axis=1)
    np.testing.assert_allclose(np.cos(video), cos.numpy(), atol=2e-5)
    np.testing.assert_allclose(np.sin(video), sin.numpy(), atol=2e-5)


_5B = dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
REAL = {  # name -> settings in upstream's folder
    "2b": dict(num_attention_heads=30, num_layers=30),
    "5b": _5B,
    "5b_i2v": _5B | dict(in_channels=32, use_learned_positional_embeddings=True),
    "1.5_5b": _5B | dict(patch_size_t=2, sample_frames=81),
    "1.5_5b_i2v": _5B | dict(patch_size_t=2, sample_frames=81, in_channels=32, ofs_embed_dim=512),
}


@pytest.mark.parametrize("name", REAL)
def test_names_and_sizes_of_the_published_models(name):
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel(**REAL[name])
    frames = 22 if name.startswith("1.5") else 13
    config = cogvideox.CogVideoXConfig(input_size=(60, 90), num_frames=frames, **cogvideox.PRESETS[name])
    module = abstract(config)
    found = mapping.upstream_shapes(module, cogvideox.weight_rules(config))
    assert {key: s.shape for key, s in found.items()} == {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    count = sum(leaf.size for leaf in jax.tree.leaves(module))
    buffers = sum(value.numel() for key, value in theirs.state_dict().items() if "pos_embedding" in key)
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) + buffers
    assert {leaf.dtype for leaf in jax.tree.leaves(module)} == {jnp.dtype(jnp.float32)}


def test_a_real_clip_through_the_2b_model_has_the_shapes_of_the_paper():
    config = cogvideox.CogVideoXConfig(input_size=(60, 90), num_frames=13, **cogvideox.PRESETS["2b"])
    assert config.grid == (13, 30, 45) and config.num_tokens == 17776
    shapes = [(1, 13, 60, 90, 16), (1,), (1, 226, 4096)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract(config))
    out, tokens = jax.eval_shape(lambda model, *data: model(*data, taps=(17,)), half, *arrays)
    assert (out.shape, out.dtype) == ((1, 13, 60, 90, 16), jnp.float32)
    assert (tokens[17].shape, tokens[17].dtype) == ((1, 13, 30, 45, 1920), jnp.bfloat16)


def test_taps_do_not_change_the_prediction_and_half_precision_follows_the_parameters():
    config = tiny("5b")
    model = random_model(config)
    run = quick_jit(lambda model, taps: model(*inputs(config), taps=taps), static_argnums=1)
    plain, none = run(model, ())
    assert none == {} and plain.dtype == jnp.float32 and plain.shape == (2, 4, 4, 6, 4)
    out, tokens = run(model, (2, 0, 2, np.int64(1)))
    close(out, plain, "prediction")
    assert list(tokens) == [0, 1, 2] and all(type(tap) is int for tap in tokens)
    assert min(float(jnp.abs(tokens[tap] - tokens[tap - 1]).max()) for tap in (1, 2)) > 0.1  # every block is seen

    half, tokens = run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model), (1,))
    assert half.dtype == jnp.float32 and tokens[1].dtype == jnp.bfloat16
    assert 0 < jnp.abs(half - plain).max() < 0.1 * jnp.abs(plain).max()


def test_remat_saves_memory_and_a_tap_costs_one_layer():
    """In units of one layer's tokens, 12 blocks."""

    def memory(size, taps=(), *, remat=False, gradient=False):
        config = tiny("2b", depth=12, width=16, time_width=4, input_size=size, remat=remat, attention="head")
        data = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs(config)]

        def total(model, *data):
            out, tokens = model(*data, taps=taps)
            return jnp.square(out).sum() + sum(jnp.sum(jnp.sin(value)) for value in tokens.values())

        compiled = quick_jit(jax.grad(total) if gradient else total).lower(abstract(config), *data).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (2 * config.num_tokens * config.width * 4)

    large, small = (32, 48), (8, 12)
    assert memory(large, (6,)) - memory(large) < 2.5
    assert memory(small, (6,), remat=True, gradient=True) < 0.6 * memory(small, gradient=True)


def test_fresh_weights_start_as_the_identity_between_embedding_and_output():
    """adaLN starts at zero, so no gate is open; nothing else does, the output's Linear included."""
    config = tiny("5b_i2v")
    model = quick_jit(lambda: cogvideox.CogVideoX(config, rngs=nnx.Rngs(0)))()
    flat, _ = jax.tree_util.tree_flatten_with_path(model)
    for path, leaf in flat:
        path = jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        zero = path.endswith("bias") or path.endswith("pos_embedding") or re.search(r"norm(1|2|_out)\.linear", path)
        assert bool(np.any(leaf)) != bool(zero), path
    out, tokens = quick_jit(lambda model: model(*inputs(config), taps=(0, 2)))(model)
    np.testing.assert_array_equal(tokens[0], tokens[2])
    assert jnp.abs(out).max() > 0.01
    kernels = np.asarray(model.transformer_blocks.attn1.to_q.kernel)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1  # every block has a key of its own


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(depth=0), "depth must be at least 1"),
        (dict(width=40), "divisible by num_heads 2 and by 16, got 40"),
        (dict(positions="learned"), "'learned' is not known; write one of"),
        (dict(positions="rotary", num_heads=4), "a multiple of 16 channels, got 8"),
        (dict(input_size=(4, 7)), "4x7: model.patch_size 2 does not divide 7; the nearest size that fits is 8"),
        (dict(patch_size_t=2, num_frames=13), "does not divide 13 latent frames; pad them to 14"),
        (dict(ofs_width=8), "ofs_width 8 must be 0 or time_width 16"),
        (dict(attention="flash"), "attention 'flash' is not known; write one of"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        abstract(cogvideox.CogVideoXConfig(**TINY | change))


def test_wrong_inputs_are_refused():
    config = tiny("5b_i2v")
    model = abstract(config)
    video, timesteps, text = inputs(config)
    for data, options, message in [
        ((video[..., :4], timesteps, text), {}, r"config says \(4, 4, 6, 7\), of which 3 channels are the image's"),
        ((video, timesteps, None), {}, "conditioned on text: pass embeddings"),
        ((video, timesteps, text[:, :3]), {}, r"the text embeddings are \(2, 3, 12\), but the model's config"),
        ((video, timesteps, text), {"taps": (3,)}, "3 is no block of this model; write whole numbers from 0 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda model, data=data, options=options: model(*data, **options), model)


def test_sharding_rules_name_every_large_leaf():
    used = set()
    for name in CASES:
        flat, _ = jax.tree_util.tree_flatten_with_path(abstract(tiny(name)))
        for path, leaf in flat:
            path = jax.tree_util.keystr(path[:-1], simple=True, separator=".")
            rule, spec = next((rule, spec) for rule, spec in cogvideox.SHARDING_RULES if re.fullmatch(rule, path))
            used.add(rule)
            assert len(spec) in (0, leaf.ndim), path
            if path.startswith("transformer_blocks") and spec:
                assert spec[0] is None, path  # the scanned axis stays whole
            if path.endswith(("kernel", "pos_embedding")) and path != "patch_embed.proj.kernel":
                assert "fsdp" in spec, path
    assert used == {rule for rule, _ in cogvideox.SHARDING_RULES}
    assert MODELS["cogvideox"].sharding_rules is cogvideox.SHARDING_RULES
