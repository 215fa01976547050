"""The shared trunk: its variants against plain formulas, layers by index, rotary hook, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop import mapping
from jaxalign.interop.rules import Stack
from jaxalign.teachers import vit

torch = pytest.importorskip("torch")

BASE = vit.ViTConfig(width=32, depth=4, num_heads=2, hidden=48, layer_scale=True)
VARIANTS = {
    "dinov2": BASE,
    "swiglu": dataclasses.replace(BASE, mlp="swiglu", hidden=24),
    "videomae": dataclasses.replace(BASE, qkv_bias="qv", layer_scale=False),
    "no_bias": dataclasses.replace(BASE, qkv_bias="none", eps=1e-2, layer_scale=False),
}


def random_blocks(config):
    """Blocks with every leaf random, and the same as a torch state dict."""
    random = np.random.default_rng(0)
    blocks = jax.eval_shape(lambda: vit.stacked(config, jax.random.key(0)))
    leaves, treedef = jax.tree.flatten(blocks)
    filled = [jnp.asarray(random.normal(0.3, 0.3, leaf.shape) / leaf.shape[-2] ** 0.25, jnp.float32) for leaf in leaves]
    blocks = jax.tree.unflatten(treedef, filled)
    state = mapping.state_dict({"blocks": blocks}, [Stack("blocks")])
    return blocks, {name: torch.from_numpy(array) for name, array in state.items()}


def reference(config, state, x, rotary=None):
    """Output of every block, in torch, from upstream's formulas and names."""
    functional, found = torch.nn.functional, []
    for i in range(config.depth):
        part = {n.removeprefix(f"blocks.{i}."): a for n, a in state.items() if n.startswith(f"blocks.{i}.")}

        def norm(name, x, part=part):
            return functional.layer_norm(x, x.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"], config.eps)

        def linear(name, x, part=part):
            return functional.linear(x, part[f"{name}.weight"], part.get(f"{name}.bias"))

        qkv = linear("attn.qkv", norm("norm1", x))
        if "attn.q_bias" in part:
            zero = torch.zeros_like(part["attn.q_bias"])
            qkv = qkv + torch.cat([part["attn.q_bias"], zero, part["attn.v_bias"]])
        q, k, v = qkv.reshape(*x.shape[:2], 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + linear("attn.proj", mixed) * part.get("ls1.gamma", 1)
        y = norm("norm2", x)
        if config.mlp == "swiglu":
            gate, value = linear("mlp.w12", y).chunk(2, dim=-1)
            y = linear("mlp.w3", functional.silu(gate) * value)
        else:
            y = linear("mlp.fc2", functional.gelu(linear("mlp.fc1", y)))
        x = x + y * part.get("ls2.gamma", 1)
        found.append(x)
    return found


def tokens(n=6, seed=1):
    return np.random.default_rng(seed).standard_normal((2, n, 32)).astype(np.float32)


def close(found, wanted, tolerance=1e-4):
    wanted = np.asarray(wanted)
    assert np.abs(wanted).max() > 1e-2
    assert np.abs(np.asarray(found) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_and_layer(name):
    config = VARIANTS[name]
    blocks, state = random_blocks(config)
    x = tokens()
    wanted = reference(config, state, torch.from_numpy(x))
    found = jax.jit(lambda blocks, x: vit.run(blocks, x, (2, 0, 3)))(blocks, x)
    for ours, layer in zip(found, (2, 0, 3), strict=True):
        close(ours, wanted[layer])
    assert ("blocks.0.attn.q_bias" in state) == (config.qkv_bias == "qv")
    assert ("blocks.0.attn.qkv.bias" in state) == (config.qkv_bias == "full")


def test_rotary_turns_queries_and_keys_only():
    blocks, state = random_blocks(BASE)
    x, signs = tokens(), np.random.default_rng(2).standard_normal((6, 16)).astype(np.float32)
    wanted = reference(BASE, state, torch.from_numpy(x), rotary=lambda q: q * torch.from_numpy(signs))[1]
    turn = lambda q, k: (q * signs[:, None], k * signs[:, None])  # noqa: E731
    found = jax.jit(lambda blocks, x: vit.run(blocks, x, (1,), rotary=turn)[0])(blocks, x)
    close(found, wanted)
    assert np.abs(found - jax.jit(lambda blocks, x: vit.run(blocks, x, (1,))[0])(blocks, x)).max() > 1e-2


def test_long_sequences_take_the_loop_over_heads():
    """From a thousand tokens on the CPU goes head by head; the result is the same."""
    blocks, state = random_blocks(BASE)
    x = tokens(n=1040)
    found = jax.jit(lambda blocks, x: vit.run(blocks, x, (0,))[0])(blocks, x)
    close(found, reference(BASE, state, torch.from_numpy(x))[0])


def test_only_what_is_asked_for_runs_and_is_kept():
    blocks, _ = random_blocks(BASE)
    jaxpr = jax.make_jaxpr(lambda blocks, x: vit.run(blocks, x, (1, 0)))(blocks, tokens())
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in scans] == [1, 1]  # blocks 2 and 3 never run
    assert all(out.aval.shape == (2, 6, 32) for eqn in scans for out in eqn.outvars)  # no stack of outputs


def test_a_cut_copies_no_weights():
    config = dataclasses.replace(BASE, depth=12)
    blocks = jax.eval_shape(lambda: vit.stacked(config, jax.random.key(0)))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(blocks))
    cut = jax.jit(lambda blocks, x: vit.run(blocks, x, (4, 11))).lower(blocks, tokens(n=1)).compile()
    assert cut.memory_analysis().temp_size_in_bytes < 0.3 * size


def test_remat_changes_memory_and_nothing_else():
    blocks, state = random_blocks(BASE)
    x = tokens(n=40)
    found = {}
    for remat in (False, True):
        again = jax.eval_shape(lambda r=remat: vit.stacked(dataclasses.replace(BASE, remat=r), jax.random.key(0)))
        again = jax.tree.unflatten(jax.tree.structure(again), jax.tree.leaves(blocks))
        gradient = jax.jit(jax.grad(lambda x, blocks: jnp.square(vit.run(blocks, x, (3,))[0]).sum()))
        compiled = gradient.lower(x, again).compile()
        found[remat] = compiled(x, again), compiled.memory_analysis().temp_size_in_bytes
    x_torch = torch.from_numpy(x).requires_grad_()
    reference(BASE, state, x_torch)[3].square().sum().backward()
    close(found[False][0], x_torch.grad)
    close(found[True][0], x_torch.grad)
    assert found[True][1] < found[False][1]


def test_compute_dtype_is_the_parameters():
    blocks, _ = random_blocks(BASE)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), blocks)
    run = jax.jit(lambda blocks, x: vit.run(blocks, x, (3,))[0])
    found, wanted = run(half, jnp.asarray(tokens(), jnp.bfloat16)), run(blocks, tokens())
    assert found.dtype == jnp.bfloat16
    error, scale = jnp.abs(found - wanted).max(), jnp.abs(wanted).max()
    assert 0 < error < 0.05 * scale


def test_tubelets_are_a_convolution():
    embed = vit.TubeletEmbed(2, 4, 8, rngs=vit.nnx.Rngs(0))
    embed.proj.bias[...] = jnp.arange(8.0)
    state = {n: torch.from_numpy(a) for n, a in mapping.state_dict(embed).items()}
    video = np.random.default_rng(0).standard_normal((2, 4, 8, 12, 3)).astype(np.float32)
    channels_first = torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())
    wanted = torch.nn.functional.conv3d(channels_first, state["proj.weight"], state["proj.bias"], stride=(2, 4, 4))
    found = embed(jnp.asarray(video))
    assert found.shape == (2, 2, 2, 3, 8)
    close(found, wanted.permute(0, 2, 3, 4, 1))


def test_layers_by_index():
    assert vit.checked_layers(None, 12) == (11,)
    assert vit.checked_layers(-1, 12) == (11,)
    assert vit.checked_layers([2, -1, 2], 12) == (2, 11, 2)
    for wrong in (12, -13, 1.0, True, "last"):
        with pytest.raises(ValueError, match="is no block here; write whole numbers from 0 to 11"):
            vit.checked_layers([wrong], 12)
    with pytest.raises(ValueError, match="layers is empty"):
        vit.checked_layers([], 12)


def test_settings_are_checked():
    for settings, message in (
        ({"num_heads": 3}, "num_heads 3 does not divide width 32"),
        ({"mlp": "relu"}, "mlp 'relu' is not known; write one of gelu, swiglu"),
        ({"qkv_bias": "k"}, "qkv_bias 'k' is not known; write one of full, qv, none"),
        ({"attention": "flash"}, "attention 'flash' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(BASE, **settings)
