"""SEA-RAFT against upstream's golden results (make_sea_raft_golden.py): updates, mixture, gradients, files, sizes."""

import json
from pathlib import Path

import flow_streams as streams
import jax
import jax.numpy as jnp
import make_sea_raft_golden as golden
import numpy as np
import pytest
from flax import nnx

from jaxalign.interop import mapping
from jaxalign.teachers import flow_layers, sea_raft
from jaxalign.teachers.sea_raft import PRESETS, RULES, SEARAFT, SEARAFTConfig

FOLDER = Path(__file__).parent / "golden"
TWIN, KEPT = "downsample.1.", "bn3."  # the two names of the shortcut's BatchNorm


def abstract(**settings):
    return jax.eval_shape(lambda: SEARAFT(SEARAFTConfig(**settings), rngs=nnx.Rngs(0)))


def load(preset, **settings):
    """A module whose every leaf is random, with upstream's state dict."""
    module = abstract(**(PRESETS[preset] | settings))
    shapes = mapping.upstream_shapes(module, RULES)
    state = {key: streams.draw_weight(key.replace(TWIN, KEPT), spec.shape) for key, spec in shapes.items()}
    return mapping.load_state_dict(module, state, RULES), state


@pytest.fixture(scope="module")
def wanted():
    return np.load(FOLDER / "sea_raft.npz")


def inputs(name):
    shape = golden.CASES[name][2]
    frames = [jnp.asarray(streams.frames(f"{name} {which}", (*shape, 3))) for which in ("first", "second")]
    return *frames, jnp.asarray(5 * streams.draw(f"{name} truth", (*shape, 2)))


@pytest.mark.parametrize("name", golden.CASES)
def test_every_update_equals_upstreams(name, wanted):
    """Flow, mixture and likelihood of the first guess and of every iteration; S with frames that are padded."""
    _, iterations, shape = golden.CASES[name]
    module, _ = load(f"sea_raft_{name}", iterations=iterations)

    def run(module, first, second, truth):
        flow, info = module.updates(first, second)
        likelihood = sea_raft.negative_log_likelihood(flow, info, jnp.broadcast_to(truth, flow.shape))
        return {"flow": flow, "info": info, "nf": likelihood}

    for key, values in jax.jit(run)(module, *inputs(name)).items():
        assert values.shape == (iterations + 1, *shape, values.shape[-1])
        for ours, theirs in zip(values, wanted[f"{name} {key}"], strict=True):
            streams.assert_close(ours[..., golden.ROWS, golden.COLUMNS, :], theirs)


def test_gradients_equal_upstreams(wanted):
    """With respect to the frames: SMRABooth trains through this network."""
    _, iterations, shape = golden.CASES["s"]
    module, _ = load("sea_raft_s", iterations=iterations)
    first, second, _ = inputs("s")
    probe = streams.draw("s probe", (*shape, 6))

    def loss(video, module):
        flow, info = module.flow_and_info(video)
        return (jnp.concatenate([flow, info], axis=-1)[:, 0] * probe).sum()

    video = jnp.stack([first, second], axis=1)
    found = jax.jit(jax.grad(loss), compiler_options=streams.COMPILER_OPTIONS)(video, module)
    for i, which in enumerate(("first", "second")):
        part = found[:, i, golden.ROWS, golden.COLUMNS]
        streams.assert_mostly_close(part, wanted[f"s grad_{which}"])


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_and_counts_are_upstreams(preset):
    wanted = json.loads((FOLDER / "sea_raft_sizes.json").read_text())[preset]
    found = mapping.upstream_shapes(abstract(**PRESETS[preset]), RULES)
    shapes = {key: spec.shape for key, spec in found.items()}
    assert (len(shapes), streams.key_digest(shapes)) == (wanted["keys"], wanted["digest"])
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == wanted["elements"]
    trained = [v for k, v in shapes.items() if TWIN not in k and not k.endswith(("_mean", "_var", "_tracked"))]
    assert sum(int(np.prod(shape)) for shape in trained) == wanted["parameters"]


def test_torch_flax_torch_is_bit_exact():
    module, state = load("sea_raft_s")
    exported = mapping.state_dict(module, RULES, kept=mapping.kept_arrays(module, state, RULES))
    assert set(exported) == set(state)
    for name, array in state.items():
        assert exported[name].dtype == array.dtype and exported[name].tobytes() == array.tobytes(), name
    # The hub's safetensors hold shared tensors once.
    once = {name: array for name, array in state.items() if TWIN not in name}
    again = mapping.load_state_dict(abstract(**PRESETS["sea_raft_s"]), once, RULES)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(module), jax.tree.leaves(again), strict=True))
    other = dict(state) | {f"fnet.layer2.0.{TWIN}bias": state[f"fnet.layer2.0.{TWIN}bias"] + 1}
    with pytest.raises(ValueError, match=r"fnet\.layer2\.0\.downsample\.1\.bias \(differs from fnet\.layer2\.0\.bn3"):
        mapping.load_state_dict(abstract(**PRESETS["sea_raft_s"]), other, RULES)


# ---- as a teacher --------------------------------------------------------------------------------------------------


def test_frames_are_brought_to_size_and_flow_back():
    video = jnp.asarray(streams.frames("video", (1, 2, 144, 288, 3)))
    module, _ = load("sea_raft_s", iterations=1, size=(128, 144))
    plain, _ = load("sea_raft_s", iterations=1)
    small = flow_layers.resize(video, (128, 144), method="linear")
    both = jax.jit(lambda module, plain, video, small: (module.flow_and_info(video), plain.flow_and_info(small)))
    (flow, info), (wanted_flow, wanted_info) = both(module, plain, video, small)
    assert flow.shape == (1, *module.grid((2, 144, 288)), module.width) == (1, 1, 144, 288, 2)
    streams.assert_close(flow, flow_layers.resize_flow(wanted_flow, (144, 288)))
    streams.assert_close(info, flow_layers.area_pool(wanted_info, (144, 288)))
    assert sea_raft.uncertainty(info).shape == (1, 1, 144, 288)


def test_uncertainty_is_the_expected_log_scale():
    info = jnp.array([[0.0, 0.0, 4.0, -3.0], [2.0, 0.0, -1.0, 5.0], [0.0, jnp.log(3.0), 25.0, 0.0]])
    # half of scale e^4 and half of scale 1; the first clipped to 0; a quarter of the largest scale, e^10
    np.testing.assert_allclose(jax.jit(sea_raft.uncertainty)(info), [2.0, 0.0, 2.5], rtol=1e-6)
    # A mixture of equal Laplace distributions is one: −log(exp(−|d|)/2).
    flow, truth = jnp.array([1.0, -2.0]), jnp.array([4.0, -2.0])
    found = jax.jit(sea_raft.negative_log_likelihood)(flow, info[1], truth)
    np.testing.assert_allclose(found, np.log(2.0) + np.array([3.0, 0.0]), rtol=1e-6)


def test_half_precision_keeps_the_flow_in_fp32():
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract(**PRESETS["sea_raft_l"]))
    video = jax.ShapeDtypeStruct((1, 2, 128, 128, 3), jnp.float32)
    flow, info = jax.eval_shape(lambda module, video: module.flow_and_info(video), half, video)
    assert flow.dtype == info.dtype == jnp.float32


def test_settings_are_checked():
    assert SEARAFTConfig(**PRESETS["sea_raft_l"]).iterations == 12
    for settings, message in (
        ({"blocks": (2, 2)}, r"blocks must be 3 numbers of at least 2, not \(2, 2\)"),
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"size": (128, 96)}, r"size must be at least \(128, 128\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SEARAFTConfig(**settings)
