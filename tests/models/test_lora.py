"""LoRA on parameter trees: the function, its gradient, what it saves, merging and taking apart."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxalign.models import MODELS, cogvideox, lora, vdit
from jaxalign.training.flops import matmul_flops

TINY = dict(input_size=(4, 4), num_frames=2, patch_size=2, in_channels=3, width=32, depth=4, num_heads=2)
SETTINGS = lora.LoRA(rank=2, alpha=5.0, sites=lora.SITES["vdit"])


def random_like(tree, seed):
    """Numbers for the leaves of an abstract tree; no leaf is zero."""
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(0.1 * draw(x.shape), jnp.float32), tree)


@pytest.fixture(scope="module")
def tiny():
    """A V-DiT, adapters, neither with a zero, and what it is asked."""
    abstract = jax.eval_shape(lambda: vdit.VDiT(vdit.VDiTConfig(**TINY), rngs=nnx.Rngs(0)))
    adapters = jax.eval_shape(lambda: lora.init(abstract, SETTINGS, jax.random.key(0)))
    data = random_like(jax.ShapeDtypeStruct((2, 2, 4, 4, 3), jnp.float32), 7), jnp.array([3.0, 700.0])
    return random_like(abstract, 0), random_like(adapters, 1), data


@jax.jit
def plain(model, *data):
    return model(*data)[0]


@jax.jit
def adapted(base, adapters, *data):
    return lora.combine(base, adapters, SETTINGS.scale)(*data)[0]


def abstract_cogvideox():
    sizes = dict(input_size=(4, 4), num_frames=3, text_tokens=4, text_width=8, time_width=16)
    config = cogvideox.CogVideoXConfig(**sizes, width=32, depth=3, num_heads=2)
    return jax.eval_shape(lambda: cogvideox.CogVideoX(config, rngs=nnx.Rngs(0)))


def test_fresh_adapters_are_stacked_and_change_nothing(tiny):
    base, _, data = tiny
    fresh = lora.init(base, SETTINGS, jax.random.key(0))
    assert list(fresh) == [f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("proj", "qkv")]
    pair = fresh["blocks.1.attn.qkv"]
    a, b = pair["lora_A"]["kernel"], pair["lora_B"]["kernel"]
    assert a.shape == (2, 32, 2) and b.shape == (2, 2, 96) and not b.any()
    assert 0.9 / 32**0.5 < float(jnp.abs(a).max()) <= 1 / 32**0.5 and not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(adapted(base, fresh, *data), plain(base, *data))


def test_equals_the_merged_network_and_its_gradient(tiny):
    """And costs what LoRA costs: no product of the size of a weight's gradient is formed, of the sites or elsewhere."""
    base, adapters, data = tiny

    def objective(adapters, build):
        out, tokens = build(base, adapters, SETTINGS.scale)(*data, taps=(1,))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))) + jnp.sin(tokens[1]).sum(), out

    def gradient(build):
        return jax.jit(jax.grad(lambda a: objective(a, build), has_aux=True))(adapters)

    (grads, out), (merged_grads, merged_out) = gradient(lora.combine), gradient(lora.merge)
    assert np.abs(out - plain(base, *data)).max() > 0.01
    np.testing.assert_allclose(out, merged_out, atol=1e-5 * np.abs(out).max())
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(merged_grads), strict=True):
        assert np.abs(two).max() > 1e-3
        np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(two).max())

    forward = matmul_flops(lambda a: objective(a, lora.combine)[0], adapters)
    ours = matmul_flops(jax.grad(lambda a: objective(a, lora.combine)[0]), adapters)
    full = matmul_flops(jax.grad(lambda m: m(*data)[0].sum()), base)
    assert ours < 2.05 * forward and ours < 0.75 * full  # forward, and the gradient of the activations


def test_the_base_gets_no_gradient(tiny):
    base, adapters, data = tiny
    grads = jax.jit(jax.grad(lambda base: lora.combine(base, adapters, 1.0)(*data)[0].sum()))(base)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("dtype, unit", [(jnp.float32, 2.0**-23), (jnp.bfloat16, 2.0**-7)])
def test_unmerge_is_exact_to_a_unit_in_the_last_place(tiny, dtype, unit):
    base, adapters, _ = tiny
    base = jax.tree.map(lambda x: x.astype(dtype), base)
    merged = lora.merge(base, adapters, SETTINGS.scale)
    back = lora.unmerge(merged, adapters, SETTINGS.scale)
    changed = 0
    flat, _ = jax.tree_util.tree_flatten_with_path(base)
    for (path, w), m, b in zip(flat, jax.tree.leaves(merged), jax.tree.leaves(back), strict=True):
        name = jax.tree_util.keystr(path[:-1], simple=True, separator=".").removesuffix(".kernel")
        assert m.dtype == b.dtype == dtype
        if name in adapters:
            changed += 1
            assert not np.array_equal(m, w)
            w, m, b = (np.asarray(x, np.float32) for x in (w, m, b))
            assert (np.abs(b - w) <= unit * np.maximum(np.abs(w), np.abs(m))).all()
        else:
            assert m is w and b is w  # not even a copy
    assert changed == 4


def test_default_sites_are_the_projections_of_the_attention():
    found = lora.find_sites(abstract_cogvideox(), lora.SITES["cogvideox"])
    assert found == [f"transformer_blocks.attn1.{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]
    assert set(lora.SITES) == set(MODELS)
    everywhere = lora.find_sites(abstract_cogvideox(), r".*")
    assert {"time_embedding.linear_1", "transformer_blocks.ff.net.0.proj", "proj_out"} < set(everywhere)
    assert "patch_embed.proj" not in everywhere  # a convolution


def test_adapters_anywhere_run(tiny):
    """Code that asks a Linear for its kernel finds the frozen one."""
    base, _, data = tiny
    settings = lora.LoRA(2, 2.0, ".*")
    adapters = random_like(jax.eval_shape(lambda: lora.init(base, settings, jax.random.key(0))), 3)
    out = adapted(base, adapters, *data)
    merged = plain(lora.merge(base, adapters, SETTINGS.scale), *data)
    np.testing.assert_allclose(out, merged, atol=1e-5 * np.abs(merged).max())
    specs = dict(lora.sharding_rules(adapters))
    assert specs[re.escape("t_embedder.mlp.0") + r"\.lora_A\.kernel"] == PartitionSpec(("fsdp", "tensor"), None)


def test_mistakes_are_said(tiny):
    base, adapters, _ = tiny
    for settings, message in (
        (dict(rank=0), "must be positive"),
        (dict(alpha=-1.0), "must be positive"),
        (dict(sites="("), "is no regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.LoRA(**dict(rank=2, alpha=1.0, sites=".*") | settings)
    with pytest.raises(ValueError, match=r"'attn' matches none of the \d+ Linears, which are e.g. "):
        lora.find_sites(base, "attn")
    with pytest.raises(ValueError, match=r"another network's: this one has no blocks\.0\.attn\.qkv"):
        lora.combine(abstract_cogvideox(), {"blocks.0.attn.qkv": adapters["blocks.0.attn.qkv"]}, 1.0)
    with pytest.raises(ValueError, match="do not fit its"):
        lora.merge(base, {"blocks.0.attn.proj": adapters["blocks.0.attn.qkv"]}, 1.0)
