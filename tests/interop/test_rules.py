"""Layers turned by rank, against PyTorch's own; and every rule in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interop_modules import leaves_of, random_like, same

from jaxalign.interop import mapping
from jaxalign.interop.rules import (
    BATCH_NORM_COUNTS,
    Ignored,
    Join,
    Rename,
    Reshape,
    Split,
    Stack,
    Tied,
    Transpose,
)

torch = pytest.importorskip("torch")

# ---- every kind of layer against PyTorch's own -------------------------------------------------------------


def _numpy_state(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def _rngs():
    return nnx.Rngs(0)


LAYERS = {
    "linear": (lambda: nnx.Linear(3, 4, rngs=_rngs()), lambda: torch.nn.Linear(3, 4), (2, 3)),
    "conv1d": (
        lambda: nnx.Conv(3, 4, (5,), padding="VALID", rngs=_rngs()),
        lambda: torch.nn.Conv1d(3, 4, 5),
        (2, 7, 3),
    ),
    "conv2d": (
        lambda: nnx.Conv(3, 4, (3, 2), padding="VALID", rngs=_rngs()),
        lambda: torch.nn.Conv2d(3, 4, (3, 2)),
        (2, 5, 6, 3),
    ),
    "conv3d": (
        lambda: nnx.Conv(3, 4, (2, 3, 1), padding="VALID", rngs=_rngs()),
        lambda: torch.nn.Conv3d(3, 4, (2, 3, 1)),
        (2, 4, 5, 6, 3),
    ),
    "depthwise": (
        lambda: nnx.Conv(4, 4, (3, 3), padding="VALID", feature_group_count=4, rngs=_rngs()),
        lambda: torch.nn.Conv2d(4, 4, 3, groups=4),
        (2, 5, 6, 4),
    ),
    "grouped": (
        lambda: nnx.Conv(4, 8, (3, 3), padding="VALID", feature_group_count=2, rngs=_rngs()),
        lambda: torch.nn.Conv2d(4, 8, 3, groups=2),
        (2, 5, 6, 4),
    ),
    "layernorm": (
        lambda: nnx.LayerNorm(4, epsilon=1e-5, rngs=_rngs()),
        lambda: torch.nn.LayerNorm(4),
        (2, 4),
    ),
}


@pytest.mark.parametrize("which", LAYERS)
def test_layer_computes_the_same(which):
    ours, theirs, shape = LAYERS[which]
    module = random_like(jax.eval_shape(ours))
    original = theirs()
    exported = mapping.state_dict(module)
    original.load_state_dict({name: torch.from_numpy(array) for name, array in exported.items()})
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    first, last = (x, lambda y: y) if len(shape) == 2 else (np.moveaxis(x, -1, 1), lambda y: np.moveaxis(y, 1, -1))
    wanted = last(original(torch.from_numpy(np.ascontiguousarray(first))).detach().numpy())
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(module(x), wanted, atol=1e-5)
    loaded = mapping.load_state_dict(jax.eval_shape(ours), _numpy_state(original))
    same(mapping.state_dict(loaded), exported)


def test_embedding():
    module = random_like(nnx.Embed(5, 3, rngs=_rngs()))
    original = torch.nn.Embedding(5, 3)
    original.load_state_dict({n: torch.from_numpy(a) for n, a in mapping.state_dict(module).items()})
    np.testing.assert_array_equal(module(jnp.array([4, 0])), original(torch.tensor([4, 0])).detach().numpy())


# ---- rules -------------------------------------------------------------------------------------------------


def _round_trip(module, rules):
    exported = mapping.state_dict(module, rules)
    shapes = mapping.upstream_shapes(module, rules)
    assert {n: s.shape for n, s in shapes.items()} == {n: a.shape for n, a in exported.items()}
    back = mapping.load_state_dict(jax.eval_shape(lambda: module), exported, rules)
    for ours, theirs in zip(jax.tree.leaves(module), jax.tree.leaves(back), strict=True):
        assert np.array_equal(ours, theirs)
    return exported


def test_split_of_a_stacked_fused_kernel():
    module = leaves_of(blocks__attn__qkv__kernel=(2, 4, 12), blocks__attn__qkv__bias=(2, 12))
    rules = (Stack("blocks"), Split(r"(.*)\.qkv\.(.*)", (r"\1.q.\2", r"\1.k.\2", r"\1.v.\2")))
    exported = _round_trip(module, rules)
    kernel = np.asarray(module.blocks.attn.qkv.kernel[...])
    assert np.array_equal(exported["blocks.1.attn.k.weight"], kernel[1, :, 4:8].T)
    assert np.array_equal(exported["blocks.0.attn.v.bias"], np.asarray(module.blocks.attn.qkv.bias[...])[0, 8:])
    assert len(exported) == 12


def test_join_of_parts_of_different_size():
    shapes = {f"blocks__attn__{part}__kernel": (2, 4, size) for part, size in (("q", 8), ("k", 4), ("v", 2))}
    module = leaves_of(**shapes)
    rules = (Stack("blocks"), Join(r"(.*)\.(?P<part>[qkv])\.(weight)", r"\1.qkv.\3", ("q", "k", "v")))
    exported = _round_trip(module, rules)
    assert list(exported) == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    wanted = [np.asarray(getattr(module.blocks.attn, part).kernel[...])[1].T for part in "qkv"]
    assert np.array_equal(exported["blocks.1.attn.qkv.weight"], np.concatenate(wanted))


def test_rename_transpose_reshape():
    module = leaves_of(pos=(2, 3, 4, 5), up__kernel=(2, 2, 3, 7), norm__scale=(4,))
    rules = (
        Rename(r"^norm\.", "ln."),
        Transpose(r"up\.weight", (1, 0, 2, 3)),  # a transposed convolution: PyTorch has [in, out, *spatial]
        Reshape("pos", (1, -1, 5)),
    )
    exported = _round_trip(module, rules)
    assert {n: a.shape for n, a in exported.items()} == {
        "ln.weight": (4,),
        "up.weight": (3, 7, 2, 2),
        "pos": (1, 24, 5),
    }
    assert np.array_equal(exported["up.weight"], np.asarray(module.up.kernel[...]).transpose(2, 3, 0, 1))


def test_transpose_then_reshape():
    module = leaves_of(blocks__table=(2, 3, 4, 5))
    exported = _round_trip(module, (Stack("blocks"), Transpose(r".*table", (2, 0, 1)), Reshape(r".*table", (5, 12))))
    wanted = np.asarray(module.blocks.table[...])[1].transpose(2, 0, 1).reshape(5, 12)
    assert np.array_equal(exported["blocks.1.table"], wanted)


def test_stacks_with_names_offsets_and_nesting():
    module = leaves_of(
        early__kernel=(2, 3, 4),
        late__kernel=(3, 3, 4),
        stages__blocks__layers__bias=(2, 3, 5),
    )
    rules = (
        Stack("early", name="layers"),
        Stack("late", name="layers", start=2),
        Stack(r"stages"),
        Stack(r"stages\.(\d+)\.blocks\.layers", name=r"stages.\1.l"),
    )
    exported = _round_trip(module, rules)
    assert sorted(exported) == [f"layers.{i}.weight" for i in range(5)] + sorted(
        f"stages.{i}.l.{j}.bias" for i in range(2) for j in range(3)
    )
    assert np.array_equal(exported["layers.3.weight"], np.asarray(module.late.kernel[...])[1].T)
    assert np.array_equal(exported["stages.1.l.2.bias"], np.asarray(module.stages.blocks.layers.bias[...])[1, 2])


def test_batch_norm_counts_tied_and_ignored():
    module = leaves_of(
        bn__scale=(4,), bn__bias=(4,), bn__running_mean=(4,), bn__running_var=(4,), embed__embedding=(5, 4)
    )
    rules = (BATCH_NORM_COUNTS, Tied("lm_head.weight", "embed.weight"), Ignored(r"head\..*"))
    exported = mapping.state_dict(module, rules)
    assert exported["bn.num_batches_tracked"].dtype == np.int64 and exported["bn.num_batches_tracked"].shape == ()
    assert np.array_equal(exported["lm_head.weight"], exported["embed.weight"])
    torch.nn.BatchNorm1d(4).load_state_dict(
        {n.removeprefix("bn."): torch.from_numpy(a) for n, a in exported.items() if n.startswith("bn.")}
    )
    state = exported | {"bn.num_batches_tracked": np.array(812), "head.weight": np.zeros(3)}
    loaded = mapping.load_state_dict(module, state, rules)
    same(mapping.state_dict(loaded, rules), exported)
    kept = mapping.kept_arrays(module, state, rules)
    same(mapping.state_dict(loaded, rules, kept=kept), exported | {"bn.num_batches_tracked": np.array(812)})
    with pytest.raises(ValueError, match=r"'head.weight' was kept of a file, and no rule Fixed"):
        mapping.state_dict(module, rules, kept={"head.weight": np.zeros(3)})
    with pytest.raises(ValueError, match=r"bn.num_batches_tracked \(file float32, model int64\)"):
        mapping.load_state_dict(module, state | {"bn.num_batches_tracked": np.float32(8)}, rules)
    with pytest.raises(ValueError, match=r"lm_head.weight \(differs from embed.weight"):
        mapping.load_state_dict(module, exported | {"lm_head.weight": np.zeros((5, 4), np.float32)}, rules)
    with pytest.raises(ValueError, match=r"no place for: head.weight"):
        mapping.load_state_dict(module, state, rules[:2])


def test_rules_that_cannot_be():
    module = leaves_of(a__kernel=(3, 4), b__kernel=(3, 4), blocks__2__bias=(3,))
    for rules, message in (
        ((Rename("^b", "a"),), "makes? 'a.weight' out of a.kernel, b.kernel"),
        ((Stack("blocks", children=2),), "leaf blocks.2.bias has no child 0..1"),
        ((Transpose(r"a\.weight", (0, 1, 2)),), r"leaf a.kernel has shape \(4, 3\)"),
        ((Reshape(r"a\.weight", (5, -1)),), r"leaf a.kernel has shape \(4, 3\)"),
        ((Split(r"a\.weight", ("x", "y", "z")),), "leaf a.kernel has 4 there, no multiple of 3"),
        ((Reshape(r"a\.weight", (12,)), Split(r"a\.weight", ("x", "y"))), "put Reshape last"),
        ((Join(r"(?P<part>[ab])\.weight", "c", ("a", "x")),), "part 'b', not in order"),
        ((Join(r"(?P<part>[ab])\.weight", "c", ("x", "a", "b")),), "one lacks"),
        ((Stack("blocks.2"), Stack(r"blocks\.2\.\d+", name="x")), "no axis left"),
    ):
        with pytest.raises(ValueError, match=message):
            mapping.upstream_shapes(module, rules)
