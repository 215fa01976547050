"""V-DiT against the public Latte (results made by make_latte_golden.py), and what this package adds to it: taps."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import make_latte_golden as golden
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import mapping
from jaxalign.models import MODELS, vdit

# The programs here run once or twice on tiny shapes: half of the time would go into optimising their machine code.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FOLDER = Path(__file__).parent / "golden"
TINY = dict(
    input_size=(8, 12),
    num_frames=3,
    patch_size=2,
    in_channels=4,
    width=32,
    depth=6,
    num_heads=4,
    learn_sigma=True,
)


def abstract(config):
    return jax.eval_shape(lambda: vdit.VDiT(config, rngs=nnx.Rngs(0)))


def leaves_by_path(module):
    flat, _ = jax.tree_util.tree_flatten_with_path(module)
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="."): leaf for path, leaf in flat}


def random_model(config):
    """A model whose every leaf is random, from the stream that made the golden results."""
    rules = vdit.weight_rules(config)
    module = abstract(config)
    shapes = mapping.upstream_shapes(module, rules)
    weights = {n: golden.draw_weight(n, s.shape) for n, s in shapes.items() if n not in ("pos_embed", "temp_embed")}
    return mapping.load_state_dict(module, weights, rules)


def inputs(config, batch=2):
    shape = (batch, config.num_frames, *config.input_size, config.in_channels)
    labels = jnp.array(golden.LABELS) if config.num_classes else None
    return jnp.asarray(golden.draw("video", shape)), jnp.array(golden.TIMESTEPS), labels


def close(found, expected, what):
    """Within 1e-4 of the largest value, which is not zero."""
    largest = np.abs(expected).max()
    assert largest > 1e-3, what
    assert found.shape == expected.shape, what
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4 * largest, what


@pytest.mark.parametrize("name, remat, taps", [("unconditional", False, (0, 3)), ("class_conditional", True, (1, 4))])
def test_equals_latte(name, remat, taps):
    config = vdit.VDiTConfig(**golden.CASES[name], remat=remat)
    stored = np.load(FOLDER / f"latte_{name}.npz")
    video, timesteps, labels = inputs(config)

    def objective(model, video):
        out, tokens = model(video, timesteps, labels, taps=taps)
        return (out * golden.draw("probe", out.shape)).sum(), (out, tokens)

    gradient = quick_jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    (grads, grad_input), (out, tokens) = gradient(random_model(config), video)
    close(out, stored["out"], "prediction")
    for tap in taps:
        close(tokens[tap][..., ::3], stored[f"tap_{tap}"], f"tap {tap}")
    close(grad_input, stored["grad_input"], "gradient of the input")
    exported = mapping.state_dict(grads, vdit.weight_rules(config))
    compared = 0
    for key in (key for key in exported if key not in ("pos_embed", "temp_embed")):
        norm, projection = stored[f"grad_of {key}"]
        assert norm > 1e-3, key
        assert abs(np.linalg.norm(exported[key]) - norm) <= 1e-4 * norm, key
        probe = golden.draw("projection " + key, exported[key].shape)
        assert abs(np.vdot(exported[key].astype(np.float64), probe) - projection) <= 2e-4 * norm, key
        if f"grad {key}" in stored:
            close(exported[key], stored[f"grad {key}"], f"gradient of {key}")
            compared += 1
    assert compared >= 7
    assert {f"grad_of {key}" for key in exported} >= {key for key in stored if key.startswith("grad_of ")}


@pytest.mark.parametrize("name", golden.CASES)
def test_position_tables_are_written_and_checked_for_latte(name):
    config = vdit.VDiTConfig(**golden.CASES[name])
    stored = np.load(FOLDER / f"latte_{name}.npz")
    model, rules = random_model(config), vdit.weight_rules(config)
    exported = mapping.state_dict(model, rules)
    for table in ("pos_embed", "temp_embed"):
        np.testing.assert_allclose(exported[table], stored[table], atol=1e-6)
    loaded = mapping.load_state_dict(abstract(config), exported, rules)
    jax.tree.map(np.testing.assert_array_equal, loaded, model)
    with pytest.raises(ValueError, match="pos_embed"):
        mapping.load_state_dict(model, exported | {"pos_embed": exported["pos_embed"][:, ::-1]}, rules)


@pytest.mark.parametrize("name", golden.SIZES)
def test_names_and_sizes_of_latte_l_and_xl(name):
    size, expected = golden.SIZES[name], json.loads((FOLDER / "latte_sizes.json").read_text())[name]
    config = vdit.VDiTConfig(
        input_size=(32, 32),
        num_frames=16,
        patch_size=2,
        in_channels=4,
        learn_sigma=True,
        num_classes=size["num_classes"],
        **vdit.PRESETS[size["name"]],
    )
    module = abstract(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(module)) == expected["parameters"]
    shapes = mapping.upstream_shapes(module, vdit.weight_rules(config))
    assert len(shapes) == expected["keys"]
    assert golden.key_digest({name: shape.shape for name, shape in shapes.items()}) == expected["digest"]
    assert {shape.dtype for shape in shapes.values()} == {np.dtype(np.float32)}


def test_initial_weights_are_distributed_as_in_latte():
    config = vdit.VDiTConfig(**TINY | dict(width=64, num_classes=40))
    model = quick_jit(lambda: vdit.VDiT(config, rngs=nnx.Rngs(0)))()
    for path, leaf in leaves_by_path(model).items():
        leaf = np.asarray(leaf)
        if path.endswith("bias") or "adaLN" in path or "final_layer" in path:
            assert not leaf.any(), path
        elif "t_embedder" in path or "y_embedder" in path:
            assert abs(leaf.std() / 0.02 - 1) < 0.1, path
        else:  # xavier: uniform within ±sqrt(6 / (fan in + fan out))
            fan_in = np.prod(leaf.shape[:-1]) if "x_embedder" in path else leaf.shape[-2]
            limit = np.sqrt(6 / (fan_in + leaf.shape[-1]))
            assert 0.97 * limit < np.abs(leaf).max() <= limit, path
    first, second = np.asarray(getattr(model.blocks, "0").attn.qkv.kernel)[:2]
    assert np.abs(first - second).max() > 0.1  # every pair has a key of its own


def test_taps_do_not_change_the_prediction_and_come_in_any_order():
    config = vdit.VDiTConfig(**TINY)
    model = random_model(config)
    run = quick_jit(lambda model, taps: model(*inputs(config), taps=taps), static_argnums=1)
    plain, none = run(model, ())
    assert none == {} and plain.dtype == jnp.float32
    assert plain.shape == (2, 3, 8, 12, 8)
    _, every = run(model, tuple(range(6)))
    for taps in ((3,), (5, 2, 5, np.int64(1))):
        out, tokens = run(model, taps)
        close(out, plain, taps)
        assert set(tokens) == {int(tap) for tap in taps}
        for tap, value in tokens.items():
            assert type(tap) is int and value.shape == (2, *config.grid, 32)
            close(value, every[tap], tap)
    spread = [float(jnp.abs(every[tap] - every[tap - 1]).max()) for tap in range(1, 6)]
    assert min(spread) > 0.1  # every block is seen


def test_memory_of_a_tap_is_one_layers_tokens_and_remat_saves_memory():
    """In units of one layer's tokens: one tap of 12 blocks costs about one, all taps at once would cost twelve."""

    def memory(taps=(), *, remat=False, gradient=False):
        settings = dict(depth=12, width=16, input_size=(32, 32), num_frames=4, remat=remat)
        config = vdit.VDiTConfig(**TINY | settings)
        video = jax.ShapeDtypeStruct((4, 4, 32, 32, 4), jnp.float32)

        def total(model, video):
            out, tokens = model(video, jnp.zeros(4), taps=taps)
            return jnp.square(out).sum() + sum(jnp.sum(jnp.sin(value)) for value in tokens.values())

        compiled = quick_jit(jax.grad(total) if gradient else total).lower(abstract(config), video).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * 4 * 16 * 16 * 16 * 4)

    assert memory((6,)) - memory() < 2.5
    assert memory((6,), remat=True, gradient=True) < 0.6 * memory(gradient=True)


def test_non_square_frames_keep_rows_and_columns_apart(monkeypatch):
    """The model on turned frames, with turned patches and a turned position table, gives the turned result."""
    config, turned = vdit.VDiTConfig(**TINY), vdit.VDiTConfig(**TINY | dict(input_size=(12, 8)))
    table = vdit.positions.sincos_2d(32, 4, 6).reshape(4, 6, 32)
    tables = {(4, 6): table.reshape(24, 32), (6, 4): table.swapaxes(0, 1).reshape(24, 32)}
    monkeypatch.setattr(vdit.positions, "sincos_2d", lambda width, h, w: tables[h, w])

    model, other = random_model(config), random_model(turned)
    other.x_embedder.proj.kernel = nnx.Param(other.x_embedder.proj.kernel.swapaxes(0, 1))
    for name in ("kernel", "bias"):  # the channels of a patch are (row, column, channel)
        values = getattr(other.final_layer.linear, name)[...]
        values = values.reshape(-1, 2, 2, 8).swapaxes(1, 2).reshape(values.shape)
        setattr(other.final_layer.linear, name, nnx.Param(values))
    video, timesteps, _ = inputs(config)
    run = quick_jit(lambda model, video: model(video, timesteps, taps=(3,)))
    out, tokens = run(model, video)
    out2, tokens2 = run(other, video.swapaxes(2, 3))
    close(out2, out.swapaxes(2, 3), "prediction")
    close(tokens2[3], tokens[3].swapaxes(2, 3), "tap")
    unturned, _ = run(random_model(turned), video.swapaxes(2, 3))
    assert jnp.abs(unturned - out.swapaxes(2, 3)).max() > 0.1


def test_gradient_reaches_every_leaf_through_a_tap_only():
    config = vdit.VDiTConfig(**TINY | dict(num_classes=5))
    grads = quick_jit(jax.grad(lambda model: jnp.sin(model(*inputs(config), taps=(2,))[1][2]).sum()))
    for path, leaf in leaves_by_path(grads(random_model(config))).items():
        leaf = np.asarray(leaf)
        if "final_layer" in path:
            assert not leaf.any(), path
        elif path.startswith("blocks"):
            used = 2 if path.startswith("blocks.0") else 1  # pairs whose spatial (0) or temporal (1) block is reached
            assert all(leaf[pair].any() for pair in range(used)), path
            assert not leaf[used:].any(), path
        else:
            assert leaf.any(), path


def test_labels_matter_and_half_precision_follows_the_parameters():
    config = vdit.VDiTConfig(**TINY | dict(num_classes=5))
    model = random_model(config)
    assert model.y_embedder.embedding_table.embedding.shape == (6, 32)
    video, timesteps, _ = inputs(config)
    run = quick_jit(lambda model, labels: model(video, timesteps, labels, taps=(2, 5)))
    first, _ = run(model, jnp.array((5, 2)))  # the null label and another
    second, _ = run(model, jnp.array((1, 2)))
    assert jnp.abs(first - second)[0].max() > 1e-2
    np.testing.assert_allclose(first[1], second[1], atol=1e-5)

    half, tokens = run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model), jnp.array((5, 2)))
    assert half.dtype == jnp.float32
    assert {value.dtype for value in tokens.values()} == {jnp.dtype(jnp.bfloat16)}
    assert 0 < jnp.abs(half - first).max() < 0.1 * jnp.abs(first).max()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(depth=7), "must be even, got 7"),
        (dict(width=30), "divisible by num_heads 4 and by 4, got 30"),
        (dict(patch_size=3), "patch_size 3 does not divide latents of 8x12"),
        (dict(attention="flash"), "attention 'flash' is not known; write one of"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vdit.VDiTConfig(**TINY | change)


@pytest.mark.parametrize("taps", [(6,), (-1,), (2.0,), ("3",), (True,), (None,)])
def test_wrong_taps_are_refused(taps):
    config = vdit.VDiTConfig(**TINY)
    with pytest.raises(
        ValueError, match=re.escape(f"{taps[0]!r} is no block of this model; write whole numbers from 0")
    ):
        jax.eval_shape(lambda model: model(*inputs(config), taps=taps), abstract(config))


def test_wrong_inputs_are_refused():
    config = vdit.VDiTConfig(**TINY)
    video, timesteps, _ = inputs(config)
    model = random_model(config)
    with pytest.raises(ValueError, match=r"\(2, 8, 12, 4\), but the model's config says \(3, 8, 12, 4\)"):
        model(video[:, :2], timesteps)
    with pytest.raises(ValueError, match="unconditional"):
        model(video, timesteps, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="class-conditional: pass labels"):
        random_model(vdit.VDiTConfig(**TINY | dict(num_classes=5)))(video, timesteps)


def test_sharding_rules_name_every_large_leaf():
    config = vdit.VDiTConfig(**TINY | dict(num_classes=5))
    used = set()
    for path, leaf in leaves_by_path(abstract(config)).items():
        rule, spec = next((rule, spec) for rule, spec in vdit.SHARDING_RULES if re.fullmatch(rule, path))
        used.add(rule)
        assert len(spec) in (0, leaf.ndim), path
        if path.startswith("blocks"):
            assert spec[0] is None, path  # the scanned axis stays whole
        if path.endswith(("kernel", "embedding")):
            assert "fsdp" in spec, path
    assert used == {rule for rule, _ in vdit.SHARDING_RULES}
    assert MODELS["vdit"].sharding_rules is vdit.SHARDING_RULES
