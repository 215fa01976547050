"""The mapping engine on a module shaped like the V-DiT: names, stacks, fixed tables, dtypes, placement."""

import re
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from interop_modules import Branch, leaves_of, random_like, same
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.interop import mapping, safetensors_file
from jaxalign.interop.rules import Fixed, Stack
from jaxalign.interop.weights import open_weights

torch = pytest.importorskip("torch")

# ---- a module shaped like the V-DiT: pairs of stacked blocks, digits, fixed tables that are not leaves -----

DEPTH, WIDTH, PATCHES, FRAMES = 4, 6, 9, 5


def block(key):
    rngs = nnx.Rngs(key)
    return Branch(
        attn=Branch(qkv=nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), proj=nnx.Linear(WIDTH, WIDTH, rngs=rngs)),
        mlp=Branch(fc1=nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), fc2=nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)),
        adaLN_modulation=Branch(**{"1": nnx.Linear(WIDTH, 6 * WIDTH, rngs=rngs)}),
    )


def vdit_like():
    rngs = nnx.Rngs(0)
    keys = jax.random.split(jax.random.key(1), (2, DEPTH // 2))
    return Branch(
        x_embedder=Branch(proj=nnx.Conv(3, WIDTH, (2, 2), (2, 2), rngs=rngs)),
        t_embedder=Branch(
            mlp=Branch(**{"0": nnx.Linear(8, WIDTH, rngs=rngs), "2": nnx.Linear(WIDTH, WIDTH, rngs=rngs)})
        ),
        y_embedder=Branch(embedding_table=nnx.Embed(11, WIDTH, rngs=rngs)),
        blocks=Branch(**{"0": jax.vmap(block)(keys[0]), "1": jax.vmap(block)(keys[1])}),
        final_layer=Branch(
            linear=nnx.Linear(WIDTH, 12, rngs=rngs),
            adaLN_modulation=Branch(**{"1": nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)}),
        ),
    )


def table(length):
    return np.sin(np.arange(length * WIDTH, dtype=np.float32)).reshape(1, length, WIDTH)


VDIT_RULES = (
    Stack("blocks", children=2),
    Fixed("pos_embed", lambda: table(PATCHES)),
    Fixed("temp_embed", lambda: table(FRAMES)),
)


class TorchVDiT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        nn = torch.nn

        def holder(**children):
            module = nn.Module()
            for name, child in children.items():
                module.add_module(name, child)
            return module

        def sequential(*shape):
            return nn.Sequential(nn.SiLU(), nn.Linear(*shape))

        self.x_embedder = holder(proj=nn.Conv2d(3, WIDTH, 2, 2))
        self.t_embedder = holder(mlp=nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)))
        self.y_embedder = holder(embedding_table=nn.Embedding(11, WIDTH))
        self.pos_embed = nn.Parameter(torch.from_numpy(table(PATCHES)), requires_grad=False)
        self.temp_embed = nn.Parameter(torch.from_numpy(table(FRAMES)), requires_grad=False)
        self.blocks = nn.ModuleList(
            holder(
                attn=holder(qkv=nn.Linear(WIDTH, 3 * WIDTH), proj=nn.Linear(WIDTH, WIDTH)),
                mlp=holder(fc1=nn.Linear(WIDTH, 4 * WIDTH), fc2=nn.Linear(4 * WIDTH, WIDTH)),
                adaLN_modulation=sequential(WIDTH, 6 * WIDTH),
            )
            for _ in range(DEPTH)
        )
        self.final_layer = holder(linear=nn.Linear(WIDTH, 12), adaLN_modulation=sequential(WIDTH, 2 * WIDTH))


@pytest.fixture(scope="module")
def torch_vdit():
    torch.manual_seed(0)
    return TorchVDiT()


@pytest.fixture
def vdit_state(torch_vdit):
    return {name: tensor.detach().numpy() for name, tensor in torch_vdit.state_dict().items()}


# ---- the V-DiT's shape -------------------------------------------------------------------------------------


def test_key_set_and_shapes_without_allocation(vdit_state):
    found = mapping.upstream_shapes(jax.eval_shape(vdit_like), VDIT_RULES)
    assert {n: (s.shape, s.dtype) for n, s in found.items()} == {n: (a.shape, a.dtype) for n, a in vdit_state.items()}


@pytest.mark.parametrize("abstract", [True, False])
def test_torch_flax_torch_is_bit_exact(vdit_state, abstract):
    module = jax.eval_shape(vdit_like)
    module = module if abstract else random_like(module)
    loaded = mapping.load_state_dict(module, vdit_state, VDIT_RULES)
    assert jax.tree.structure(loaded) == jax.tree.structure(module)
    same(mapping.state_dict(loaded, VDIT_RULES), vdit_state)


def test_stacks_land_in_the_right_block(torch_vdit, vdit_state):
    loaded = mapping.load_state_dict(jax.eval_shape(vdit_like), vdit_state, VDIT_RULES)
    x = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    for pair in range(DEPTH // 2):
        for half in range(2):
            qkv = getattr(loaded.blocks, str(half)).attn.qkv
            ours = x @ qkv.kernel[...][pair] + qkv.bias[...][pair]
            theirs = torch_vdit.blocks[2 * pair + half].attn.qkv(torch.from_numpy(x)).detach().numpy()
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_torch_loads_what_we_export():
    exported = mapping.state_dict(random_like(jax.eval_shape(vdit_like)), VDIT_RULES)
    TorchVDiT().load_state_dict({n: torch.from_numpy(a) for n, a in exported.items()}, strict=True)


def test_fixed_tables_may_be_missing_but_not_wrong(vdit_state):
    del vdit_state["pos_embed"]
    loaded = mapping.load_state_dict(jax.eval_shape(vdit_like), vdit_state, VDIT_RULES)
    assert np.array_equal(mapping.state_dict(loaded, VDIT_RULES)["pos_embed"], table(PATCHES))
    with pytest.raises(ValueError, match=r"temp_embed \(its values differ from the table that the model computes\)"):
        mapping.load_state_dict(loaded, vdit_state | {"temp_embed": table(FRAMES) + 0.1}, VDIT_RULES)
    with pytest.raises(ValueError, match=r"temp_embed \(file \(1, 4, 6\), model \(1, 5, 6\)\)"):
        mapping.load_state_dict(loaded, vdit_state | {"temp_embed": table(4)}, VDIT_RULES)


def test_errors_list_what_does_not_fit(vdit_state):
    state = {name.replace("final_layer", "last"): array for name, array in vdit_state.items()}
    state["blocks.3.attn.proj.weight"] = np.zeros((2, 2), np.float32)
    state["t_embedder.mlp.0.bias"] = np.zeros(WIDTH, np.int64)
    with pytest.raises(ValueError) as caught:
        mapping.load_state_dict(jax.eval_shape(vdit_like), state, VDIT_RULES)
    message = str(caught.value)
    assert "\n" not in message
    assert "4 keys of the file that the model has no place for: last." in message
    assert "4 keys that the model needs and the file lacks: final_layer." in message
    assert "2 keys that do not fit" in message
    assert "blocks.3.attn.proj.weight (file (2, 2), model (6, 6))" in message
    assert "t_embedder.mlp.0.bias (file int64, model float32)" in message


def test_long_lists_are_cut(vdit_state):
    with pytest.raises(ValueError, match=r"51 keys that the model needs and the file lacks: .* and 47 more"):
        mapping.load_state_dict(jax.eval_shape(vdit_like), {}, VDIT_RULES)


def test_a_prefix_on_every_key_is_named(vdit_state):
    state = {f"module.{name}": array for name, array in vdit_state.items()}
    with pytest.raises(ValueError, match=r"all of these are there behind 'module\.': save a file without that"):
        mapping.load_state_dict(jax.eval_shape(vdit_like), state, VDIT_RULES)


def test_an_extra_block_is_noticed(vdit_state):
    vdit_state["blocks.4.attn.proj.bias"] = np.zeros(WIDTH, np.float32)
    with pytest.raises(ValueError, match=r"no place for: blocks\.4\.attn\.proj\.bias"):
        mapping.load_state_dict(jax.eval_shape(vdit_like), vdit_state, VDIT_RULES)


# ---- dtypes ------------------------------------------------------------------------------------------------


def test_dtype_on_the_way_in_and_out(vdit_state):
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in vdit_state.items()}
    # the tables are rounded in such a file, too, which is no difference
    loaded = mapping.load_state_dict(jax.eval_shape(vdit_like), half, VDIT_RULES)
    assert loaded.final_layer.linear.kernel.dtype == jnp.float32  # fp32 masters are the module's own dtype
    same(mapping.state_dict(loaded, VDIT_RULES, dtype=ml_dtypes.bfloat16), half)
    loaded = mapping.load_state_dict(jax.eval_shape(vdit_like), vdit_state, VDIT_RULES, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(loaded))
    tables = {name: vdit_state[name] for name in ("pos_embed", "temp_embed")}
    same(mapping.state_dict(loaded, VDIT_RULES), half | tables)


def test_keep_takes_the_files_numbers(vdit_state):
    """fp16 where the file has it; a leaf whose blocks differ in the file stays what the module says."""
    state = {name: array.astype(np.float16) for name, array in vdit_state.items()}
    state["blocks.1.mlp.fc1.bias"] = vdit_state["blocks.1.mlp.fc1.bias"]
    state["x_embedder.proj.bias"] = vdit_state["x_embedder.proj.bias"].astype(ml_dtypes.bfloat16)
    loaded = mapping.load_state_dict(jax.eval_shape(vdit_like), state, VDIT_RULES, dtype="keep")
    assert loaded.final_layer.linear.kernel.dtype == np.float16
    assert loaded.x_embedder.proj.bias.dtype == ml_dtypes.bfloat16
    assert getattr(loaded.blocks, "1").mlp.fc1.bias.dtype == np.float32
    assert getattr(loaded.blocks, "0").mlp.fc1.bias.dtype == np.float16
    exported = mapping.state_dict(loaded, VDIT_RULES, dtype=np.float16)
    assert exported["pos_embed"].tobytes() == state["pos_embed"].tobytes()


def test_a_table_that_is_wrong_is_wrong_in_fp16_too(vdit_state):
    vdit_state["pos_embed"] = (table(PATCHES) + 0.01).astype(np.float16)
    with pytest.raises(ValueError, match="1 key that does not fit: pos_embed"):
        mapping.load_state_dict(jax.eval_shape(vdit_like), vdit_state, VDIT_RULES)


def test_arrays_come_one_by_one(vdit_state):
    """The stream has what the dict has, each key once, and progress counts every number."""
    loaded = random_like(jax.eval_shape(vdit_like))
    stream = list(mapping.upstream_arrays(loaded, VDIT_RULES))
    assert len({name for name, _ in stream}) == len(stream)
    same(dict(stream), mapping.state_dict(loaded, VDIT_RULES))
    shapes = mapping.upstream_shapes(loaded, VDIT_RULES)
    assert [(name, shapes[name].shape, shapes[name].dtype) for name, _ in stream] == [
        (name, array.shape, array.dtype) for name, array in stream
    ]
    counts = []
    mapping.load_state_dict(jax.eval_shape(vdit_like), vdit_state, VDIT_RULES, progress=counts.append)
    assert sum(counts) == sum(leaf.size for leaf in jax.tree.leaves(loaded))


# ---- where leaves go ---------------------------------------------------------------------------------------


def test_sharding_reads_only_each_devices_part(monkeypatch):
    """Every device asks for its tile: leaf axis 0 is a stack, axis 1 is split too."""
    module = leaves_of(blocks__fc__kernel=(4, 6, 8), blocks__fc__bias=(4, 8))
    state = mapping.state_dict(module, (Stack("blocks"),))
    touched = []

    class Watched(dict):
        def __getitem__(self, name):
            touched.append(name)
            return super().__getitem__(name)

    def tiles(shape, sharding, fill):
        out = np.full(shape, np.nan, np.float32)
        for block in (slice(0, 2), slice(2, 4)):
            for column in (slice(0, 3), slice(3, None)):
                index = (block, column, *[slice(None)] * (len(shape) - 2))
                touched.clear()
                out[index] = fill(index)
                wanted = {f"blocks.{i}." for i in range(block.start, block.stop)}
                assert {re.match(r"blocks\.\d\.", name).group() for name in touched} == wanted
        return jnp.asarray(out)

    monkeypatch.setattr(jax, "make_array_from_callback", tiles)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = mapping.load_state_dict(
        jax.eval_shape(lambda: module), Watched(state), (Stack("blocks"),), sharding=sharding
    )
    for ours, theirs in zip(jax.tree.leaves(module), jax.tree.leaves(loaded), strict=True):
        assert np.array_equal(ours, theirs)


def test_ways_to_say_a_sharding(vdit_state):
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    abstract = jax.eval_shape(vdit_like)
    whole = NamedSharding(mesh, PartitionSpec())
    first = NamedSharding(mesh, PartitionSpec("fsdp"))
    seen = []

    def choose(path, shape):
        seen.append((path, shape))
        return first if path.startswith("blocks.") else whole

    tree = jax.tree.map(lambda leaf: first, abstract)
    for sharding in (whole, tree, choose):
        loaded = mapping.load_state_dict(abstract, vdit_state, VDIT_RULES, sharding=sharding)
        same(mapping.state_dict(loaded, VDIT_RULES), vdit_state)
        wanted = first if sharding is not whole else whole
        assert getattr(loaded.blocks, "0").attn.qkv.kernel[...].sharding == wanted
    assert ("blocks.0.attn.qkv.kernel", (2, 6, 18)) in seen
    with pytest.raises(ValueError, match="sharding= must be"):
        mapping.load_state_dict(abstract, vdit_state, VDIT_RULES, sharding="fsdp")


def test_peak_memory_is_the_model_and_one_leaf(tmp_path):
    leaves, size = 8, 1 << 20

    def make():
        return leaves_of(**{f"l{i}__kernel": (1024, 1024) for i in range(leaves)})

    abstract = jax.eval_shape(make)
    arrays = {n: np.ones(s.shape, s.dtype) for n, s in mapping.upstream_shapes(abstract).items()}
    safetensors_file.write(tmp_path / "w.safetensors", arrays)
    del arrays
    weights = safetensors_file.open_file(tmp_path / "w.safetensors")
    tracemalloc.start()
    loaded = mapping.load_state_dict(abstract, weights)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert float(loaded.l7.kernel[...].sum()) == size
    assert peak < 4 * size * (leaves + 1.5)


def resident_file_bytes():
    """Pages of mapped files that count as this process's memory."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssFile"].split()[0]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_of_the_file_are_given_back(tmp_path):
    """A mapped file that was read would count as a second copy of the model."""
    size, abstract = 1 << 20, jax.eval_shape(lambda: leaves_of(blocks__kernel=(16, 1024, 1024)))
    arrays = {f"blocks.{i}.weight": np.full((1024, 1024), i, np.float32) for i in range(16)}
    safetensors_file.write(tmp_path / "w.safetensors", arrays)
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        weights = open_weights(tmp_path / file)
        before, most = resident_file_bytes(), []
        note = lambda count, most=most: most.append(resident_file_bytes())  # noqa: E731
        loaded = mapping.load_state_dict(abstract, weights, (Stack("blocks"),), progress=note)
        assert float(loaded.blocks.kernel[...][15, 3, 3]) == 15
        assert len(most) == 16 and max(most) - before < 2 * 4 * size
        assert float(np.asarray(weights["blocks.7.weight"]).max()) == 7  # they are read again where somebody looks


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have memory of their own")
def test_leaves_are_not_copied_once_more_on_cpu():
    seen = []
    original = mapping._aligned

    def watched(shape, dtype):
        seen.append(original(shape, dtype))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "_aligned", watched)
        module = leaves_of(a=(64, 64))
        loaded = mapping.load_state_dict(module, mapping.state_dict(module))
    assert loaded.a[...].unsafe_buffer_pointer() == seen[0].ctypes.data


def test_loaded_leaves_do_not_alias_the_file(tmp_path):
    module = leaves_of(a=(64, 64))
    path = tmp_path / "w.safetensors"
    safetensors_file.write(path, mapping.state_dict(module))
    loaded = mapping.load_state_dict(jax.eval_shape(lambda: module), safetensors_file.open_file(path))
    path.write_bytes(b"\0" * path.stat().st_size)
    assert np.array_equal(loaded.a[...], module.a[...])
