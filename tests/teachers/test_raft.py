"""RAFT against torchvision's networks and the original's golden flow (make_raft_golden.py): updates, files, video."""

import json
from pathlib import Path

import flow_streams as streams
import jax
import jax.numpy as jnp
import make_raft_golden as golden
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import mapping
from jaxalign.teachers import raft
from jaxalign.teachers.raft import RAFTConfig

torch = pytest.importorskip("torch")
flow_models = pytest.importorskip("torchvision.models.optical_flow")

FOLDER = Path(__file__).parent / "golden"
SHAPE = (1, 128, 136)  # the smallest that torchvision takes, and one that differs
ITERATIONS = 3


def abstract(**settings):
    return jax.eval_shape(lambda: raft.RAFT(RAFTConfig(**settings), rngs=nnx.Rngs(0)))


def load(variant, layout="torchvision", **settings):
    """A module whose every leaf is random."""
    module, rules = abstract(variant=variant, **settings), raft.RULES[variant][layout]
    shapes = mapping.upstream_shapes(module, rules)
    own = {key: key.replace("downsample.1.", "norm3.") if layout == "original" else key for key in shapes}
    state = {key: streams.draw_weight(own[key], spec.shape) for key, spec in shapes.items()}
    return mapping.load_state_dict(module, state, rules), state


updates = jax.jit(lambda module, first, second: module.updates(first, second))


def torchvisions(variant, state):
    network = getattr(flow_models, f"raft_{variant}")().eval()
    network.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}, strict=True)
    return network


def images(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("variant", ["small", "large"])
def test_every_update_equals_torchvisions(variant):
    module, state = load(variant, iterations=ITERATIONS)
    first, second = (streams.frames(which, (*SHAPE, 3)) for which in ("first", "second"))
    with torch.no_grad():
        wanted = torchvisions(variant, state)(images(first), images(second), num_flow_updates=ITERATIONS)
    found = updates(module, first, second)
    for ours, theirs in zip(found, wanted, strict=True):
        streams.assert_close(ours, theirs.permute(0, 2, 3, 1))
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_gradients_equal_torchvisions():
    """With respect to the frames: SMRABooth trains through a flow network."""
    module, state = load("small", iterations=2, remat=True)
    first, second = (streams.frames(which, (*SHAPE, 3)) for which in ("first", "second"))
    probe = streams.draw("probe", (*SHAPE, 2))
    gradients = jax.grad(lambda first, second, module: (module.flow(first, second) * probe).sum(), argnums=(0, 1))
    inputs = [images(x).requires_grad_() for x in (first, second)]
    flow = torchvisions("small", state)(*inputs, num_flow_updates=2)[-1].permute(0, 2, 3, 1)
    (flow * torch.from_numpy(probe)).sum().backward()
    found = jax.jit(gradients, compiler_options=streams.COMPILER_OPTIONS)(first, second, module)
    for ours, x in zip(found, inputs, strict=True):
        streams.assert_mostly_close(ours, x.grad.permute(0, 2, 3, 1))


@pytest.mark.parametrize("variant", ["small", "large"])
def test_original_files_give_the_originals_flow(variant):
    """Names with 'module.', and frames that are padded at all four sides."""
    wanted = np.load(FOLDER / "raft.npz")[variant]
    module, _ = load(variant, "original", iterations=golden.ITERATIONS)
    first, second = (streams.frames(f"{variant} {which}", (*golden.SHAPE, 3)) for which in ("first", "second"))
    flows = updates(module, first, second)
    assert flows.shape == (golden.ITERATIONS, *golden.SHAPE, 2)
    streams.assert_close(flows[..., golden.ROWS, golden.COLUMNS, :], wanted)


@pytest.mark.parametrize("variant", ["small", "large"])
def test_keys_and_counts_are_upstreams(variant):
    sizes = json.loads((FOLDER / "raft_sizes.json").read_text())[f"raft_{variant}"]
    with torch.device("meta"):
        there = streams.sizes(getattr(flow_models, f"raft_{variant}")())
    for layout, wanted in (("original", sizes), ("torchvision", there)):
        found = mapping.upstream_shapes(abstract(**raft.PRESETS[f"raft_{variant}"]), raft.RULES[variant][layout])
        shapes = {key: spec.shape for key, spec in found.items()}
        assert (len(shapes), streams.key_digest(shapes)) == (wanted["keys"], wanted["digest"])
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == wanted["elements"]
    leaves = mapping.upstream_shapes(abstract(variant=variant), raft.RULES[variant]["torchvision"])
    trained = [v.shape for k, v in leaves.items() if not k.endswith(("_mean", "_var", "_tracked"))]
    assert sum(int(np.prod(shape)) for shape in trained) == sizes["parameters"] == there["parameters"]


@pytest.mark.parametrize("layout", ["torchvision", "original"])
@pytest.mark.parametrize("variant", ["small", "large"])
def test_torch_flax_torch_is_bit_exact(variant, layout):
    module, state = load(variant, layout)
    rules = raft.RULES[variant][layout]
    kept = mapping.kept_arrays(module, state, rules)
    assert len([name for name in kept if name.endswith("num_batches_tracked")]) == (15 if variant == "large" else 0)
    exported = mapping.state_dict(module, rules, kept=kept)
    assert set(exported) == set(state)
    for name, array in state.items():
        assert exported[name].dtype == array.dtype and exported[name].tobytes() == array.tobytes(), name
    # and from one project's file into the other's
    other = "original" if layout == "torchvision" else "torchvision"
    crossed = mapping.state_dict(module, raft.RULES[variant][other])
    again = mapping.load_state_dict(abstract(variant=variant), crossed, raft.RULES[variant][other])
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(module), jax.tree.leaves(again), strict=True))


# ---- as a teacher --------------------------------------------------------------------------------------------------


def test_flow_of_a_video_is_that_of_its_pairs():
    """However many pairs run at once; two clips do not see each other."""
    video = streams.frames("video", (2, 3, 128, 128, 3))
    module, _ = load("small", iterations=1)
    singly, _ = load("small", iterations=1, pairs_at_once=1)
    both = jax.jit(lambda module, singly, video: (singly(video), module.flow(video[:, 1], video[:, 2])))
    flow, second = both(module, singly, video)
    assert flow.shape == (2, *module.grid((3, 128, 128)), module.width) == (2, 2, 128, 128, 2)
    streams.assert_close(flow[:, 1], second)
    assert np.abs(flow[:, 0] - flow[:, 1]).max() > 0.1


@pytest.mark.parametrize("variant", ["small", "large"])
def test_half_precision_keeps_the_flow_in_fp32(variant):
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract(variant=variant))
    video = jax.ShapeDtypeStruct((1, 2, 128, 128, 3), jnp.float32)
    assert jax.eval_shape(lambda module, video: module(video), half, video).dtype == jnp.float32


def test_settings_are_checked():
    for settings, message in (
        ({"variant": "big"}, "variant 'big' is not known; write 'small' or 'large'"),
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"size": (64, 256)}, r"size must be at least \(128, 128\), not \(64, 256\)"),
        ({"pairs_at_once": 0}, "pairs_at_once must be at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RAFTConfig(**settings)
    small = abstract(variant="small")
    for shape, message in (
        ((1, 1, 128, 128, 3), "needs two frames, this video has 1"),
        ((1, 2, 64, 128, 3), r"needs 128 pixels a side, frames have 64x128; set size=\(height, width\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda m, v: m(v), small, jax.ShapeDtypeStruct(shape, jnp.float32))
