"""Meshes and rules. Everything that needs devices runs once, in one process with 8 forced host devices."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from jaxalign.training import mesh as meshes


class Part(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(4, 12, rngs=rngs)
        setattr(self, "0", nnx.Linear(3, 5, rngs=rngs))


SCRIPT = """
import json, sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from jaxalign.training import mesh as meshes

out = {}
def error(f, *a, **k):
    try:
        f(*a, **k)
    except ValueError as e:
        return str(e)

out["filled"] = dict(meshes.make_mesh(fsdp=2, context=2).shape)
out["auto"] = all(t == jax.sharding.AxisType.Auto for t in meshes.make_mesh().axis_types)
out["no_fit"] = [error(meshes.make_mesh, data=3), error(meshes.make_mesh, fsdp=3),
                 error(meshes.make_mesh, fsdp=-1), error(meshes.make_mesh, tensor=0)]
mesh = meshes.make_mesh(data=1, fsdp=4, tensor=2)
S = jax.ShapeDtypeStruct
tree = {"blocks": {"qkv": {"kernel": S((6, 64, 32), "float32"), "bias": S((6, 32), "float32")},
                   "odd": {"kernel": S((6, 63, 32), "float32")},
                   "partly": {"kernel": S((6, 4, 32), "float32")}}, "step": S((), "int32")}
rules = [(r"qkv\\.kernel", P(None, "fsdp", "tensor")), (r"partly", P(None, ("fsdp", "tensor"), None)),
         (r"kernel", P(None, "fsdp")), (r"nothing", P("data"))]
placed = meshes.shardings(tree, rules, mesh)
out["specs"] = {k: str(v.spec) for k, v in meshes.named_leaves(placed).items()}
array = jax.device_put(np.zeros((6, 64, 32), "float32"), placed["blocks"]["qkv"]["kernel"])
out["shard"] = array.addressable_shards[0].data.shape
out["coverage"] = [error(meshes.coverage, tree, placed, mesh), meshes.coverage(tree, placed, mesh, limit=0.6),
                   meshes.coverage(tree, meshes.shardings(tree, rules, meshes.make_mesh()),
                   meshes.make_mesh())]
out["bad_rules"] = [error(meshes.shardings, tree, [("bias", P("fsdp", None, None))], mesh),
                    error(meshes.shardings, tree, [("bias", P("model"))], mesh)]
whole = meshes.make_mesh(data=2, fsdp=2, context=2)
batch = jax.device_put(np.zeros((8, 4, 4)), meshes.batch_sharding(whole))
out["batch"] = batch.addressable_shards[0].data.shape
json.dump(out, sys.stdout)
"""


@pytest.fixture(scope="module")
def eight():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sizes_fill_and_misfits_are_explained(eight):
    assert eight["filled"] == {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
    assert eight["auto"]
    data3, fsdp3, two_free, zero = eight["no_fit"]
    assert "data=3" in data3 and "does not fit 8 device(s)" in data3 and "-1" in data3
    assert "fsdp=3" in fsdp3 and "does not fit" in fsdp3
    assert "only one axis" in two_free and "data or fsdp" in two_free
    assert "positive" in zero


def test_first_rule_wins_and_undivided_dimensions_are_replicated(eight):
    specs = eight["specs"]
    assert specs["blocks.qkv.kernel"] == str(P(None, "fsdp", "tensor"))
    assert specs["blocks.qkv.bias"] == specs["step"] == str(P())
    assert specs["blocks.odd.kernel"] == str(P())  # 63 is not divisible by 4
    assert specs["blocks.partly.kernel"] == str(P(None, "fsdp"))  # 4 is divisible by fsdp=4, not by 4 * 2
    assert tuple(eight["shard"]) == (6, 16, 16)
    assert tuple(eight["batch"]) == (2, 4, 4)


def test_bad_rules_are_explained(eight):
    too_long, unknown = eight["bad_rules"]
    assert "too long for blocks.qkv.bias" in too_long
    assert "no mesh axis called model" in unknown


def test_coverage_names_what_is_left_whole(eight):
    message, fraction, single = eight["coverage"]
    assert "blocks.odd.kernel" in message and "blocks.qkv.bias" in message and "qkv.kernel" not in message
    elements = {"qkv": 6 * 64 * 32, "bias": 6 * 32, "odd": 6 * 63 * 32, "partly": 6 * 4 * 32, "step": 1}
    expected = (elements["odd"] + elements["bias"] + 1) / sum(elements.values())
    assert fraction == pytest.approx(expected)
    assert single == 0.0  # fsdp = tensor = 1: nothing to complain about


def test_names_of_modules_gradients_and_optimizer_states_agree():
    module = jax.eval_shape(lambda: Part(nnx.Rngs(0)))
    names = list(meshes.named_leaves(module))
    assert set(names) == {"0.bias", "0.kernel", "qkv.bias", "qkv.kernel"}
    state = optax.adam(1e-3).init(Part(nnx.Rngs(0)))
    moments = list(meshes.named_leaves(state))
    assert [name for name in moments if ".mu." in name] == [f"0.mu.{name}" for name in names]
    assert list(meshes.named_leaves({"params": module, "step": 3})) == [
        *(f"params.{n}" for n in names),
        "step",
    ]
    assert list(meshes.named_leaves({"value": 1, "a": {"value": 2}})) == ["a.value", "value"]


def test_equal_names_are_refused():
    with pytest.raises(ValueError, match=r"both called 'a\.b'"):
        meshes.named_leaves({"a.b": 1, "a": {"b": 2}})


def test_the_default_mesh_serves_a_module_unchanged():
    mesh = meshes.make_mesh()
    module = Part(nnx.Rngs(0))
    placed = jax.device_put(module, meshes.shardings(module, [("kernel", P("fsdp"))], mesh))
    assert jnp.array_equal(placed.qkv.kernel[...], module.qkv.kernel[...])
    assert meshes.replicated(mesh).is_fully_replicated


# ---- slices joined by a slow network


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX's mesh_utils reads of a GPU."""

    id: int
    slice_index: int | None
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"

    @property
    def process_index(self) -> int:
        return self.id // 2


def nodes(number: int, each: int) -> list[Device]:
    """Devices as jax.devices() may list them: not in the order of their slices."""
    devices = [Device(id=k, slice_index=k // each) for k in range(number * each)]
    return devices[each:] + devices[:each]


def slice_of(mesh: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda device: device.slice_index)(mesh)


@pytest.mark.parametrize(
    ("sizes", "outer"),
    [
        ((4, 1, 1, 2), (2, 1, 1, 1)),
        ((2, 4, 1, 1), (2, 1, 1, 1)),
        ((1, 8, 1, 1), (1, 2, 1, 1)),  # fsdp over everything
        ((2, 1, 4, 1), (2, 1, 1, 1)),
    ],
)
def test_data_and_then_fsdp_go_between_slices(sizes, outer):
    devices = nodes(2, 4)
    found = meshes.arrange(devices, sizes)
    inner = [size // part for size, part in zip(sizes, outer, strict=True)]
    assert (found == mesh_utils.create_hybrid_device_mesh(inner, outer, devices)).all()
    assert {device.id for device in found.flat} == set(range(8))
    # Whoever shares a place in the batch is in one slice, and the places of a slice are next to each other.
    rows = slice_of(found).reshape(sizes[0] * sizes[1], -1)
    assert (rows == rows[:, :1]).all() and (np.diff(rows[:, 0]) >= 0).all()


def test_six_slices_are_counted_by_both():
    found = slice_of(meshes.arrange(nodes(6, 4), (2, 6, 2, 1)))
    assert found.shape == (2, 6, 2, 1)
    assert (found[:, :, :, 0] == np.repeat([[0, 1, 2], [3, 4, 5]], 2, axis=1)[:, :, None]).all()


def test_one_slice_is_as_jax_lays_it():
    assert [d.id for d in meshes.arrange(nodes(1, 4), (2, 2, 1, 1)).flat] == [0, 1, 2, 3]
    silent = [Device(id=k, slice_index=None, platform="cpu", device_kind="cpu") for k in range(4)]
    assert meshes.arrange(silent, (1, 1, 4, 1)).tolist() == [[[[d] for d in silent]]]
    # Told that they are two slices, the axis that counts them is the outer one.
    assert [len(group) for group in meshes.slices(silent, 2)] == [2, 2]
    with pytest.raises(ValueError, match=r"2 slices of 2 devices.* data=1|data=1.*2 slices of 2 devices"):
        meshes.arrange(silent, (1, 1, 4, 1), 2)


def test_slices_that_do_not_fit_are_explained():
    with pytest.raises(ValueError, match=r"context=8.*2 slices of 4 devices.*cannot count them.*mesh\.dcn=1"):
        meshes.arrange(nodes(2, 4), (1, 1, 8, 1))
    assert meshes.arrange(nodes(2, 4), (1, 1, 8, 1), 1).shape == (1, 1, 8, 1)  # on one's own wish
    with pytest.raises(ValueError, match=r"mesh\.dcn = 4, but there are 2 slice\(s\) of 4, 4 devices"):
        meshes.arrange(nodes(2, 4), (8, 1, 1, 1), 4)
    with pytest.raises(ValueError, match="of 4, 3 devices: use slices of one size"):
        meshes.arrange(sorted(nodes(2, 4), key=lambda d: d.id)[:-1], (7, 1, 1, 1))
    with pytest.raises(ValueError, match="dcn=0"):
        meshes.make_mesh(dcn=0)
