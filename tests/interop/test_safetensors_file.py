"""safetensors: torch's own files, bf16 too, shards under an index, and the door for every kind."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxalign.interop import safetensors_file, sniff, weights


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {
        "a": random.standard_normal((3, 4)).astype(np.float32),
        "b": random.standard_normal(5).astype(ml_dtypes.bfloat16),
        "c": random.standard_normal((2, 2)).astype(np.float16),
        "d": np.array(7, np.int64),
        "e": np.array([True, False]),
        "f": np.zeros((0, 3), np.float32),
    }


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def test_round_trip(tmp_path, arrays):
    safetensors_file.write(tmp_path / "w.safetensors", arrays | {"turned": arrays["a"].T})
    found = safetensors_file.open_file(tmp_path / "w.safetensors")
    same(found, arrays | {"turned": arrays["a"].T})
    assert not found["a"].flags.writeable


def test_torch_reads_ours_and_we_read_torchs(tmp_path, arrays):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    safetensors_file.write(tmp_path / "ours.safetensors", arrays)
    tensors = load_file(tmp_path / "ours.safetensors")
    assert tensors["b"].dtype is torch.bfloat16
    assert np.array_equal(tensors["b"].float().numpy(), arrays["b"].astype(np.float32))
    save_file(tensors, tmp_path / "theirs.safetensors")
    same(safetensors_file.open_file(tmp_path / "theirs.safetensors"), arrays)


@pytest.fixture
def sharded(tmp_path, arrays):
    names = list(arrays)
    parts = {"m-1-of-2.safetensors": names[:3], "m-2-of-2.safetensors": names[3:]}
    for file, part in parts.items():
        safetensors_file.write(tmp_path / file, {name: arrays[name] for name in part})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    return index


def test_index(sharded, arrays):
    same(safetensors_file.open_index(sharded), arrays)


def test_index_errors(sharded, tmp_path):
    table = json.loads(sharded.read_text())
    table["weight_map"]["z"] = "m-1-of-2.safetensors"
    sharded.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"m-1-of-2\.safetensors has no tensor 'z'"):
        safetensors_file.open_index(sharded)
    (tmp_path / "m-1-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards are not there: m-1-of-2\.safetensors"):
        safetensors_file.open_index(sharded)
    table["weight_map"]["z"] = "../../etc/passwd"
    sharded.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="does not lie beside the index"):
        safetensors_file.open_index(sharded)
    sharded.write_text("{}")
    with pytest.raises(ValueError, match="not a safetensors index"):
        weights.open_weights(sharded)


@pytest.mark.parametrize("keep", [20, 100, -1])
def test_truncated(tmp_path, arrays, keep):
    path = tmp_path / "w.safetensors"
    safetensors_file.write(path, arrays)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"w\.safetensors: truncated or damaged"):
        weights.open_weights(path)


def test_the_content_decides(tmp_path, arrays, sharded):
    torch = pytest.importorskip("torch")
    safetensors_file.write(tmp_path / "weights.bin", arrays)  # the name lies
    same(weights.open_weights(tmp_path / "weights.bin"), arrays)
    same(weights.open_weights(sharded), arrays)
    state = {"model": {"w": torch.arange(3)}}
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.safetensors"
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        assert weights.open_weights(path, key="model")["w"].tolist() == [0, 1, 2]
    nested = {f"encoder.{name}": array for name, array in arrays.items()} | {"head": arrays["a"]}
    safetensors_file.write(tmp_path / "nested.bin", nested)
    same(weights.open_weights(tmp_path / "nested.bin", prefix="encoder."), arrays)
    with pytest.raises(ValueError, match=r"no tensor's name starts with 'decoder\.'; the first is 'encoder"):
        weights.open_weights(tmp_path / "nested.bin", prefix="decoder.")
    with pytest.raises(ValueError, match="has no parts; leave key out"):
        weights.open_weights(tmp_path / "weights.bin", key="model")
    with pytest.raises(FileNotFoundError, match="no such file"):
        weights.open_weights(tmp_path / "nothing.pth")


def test_a_length_that_looks_like_a_pickle(tmp_path):
    """The header's length is the first byte of the file, and 0x80 also begins every pickle."""
    path = tmp_path / "w.safetensors"
    for width in range(300):
        safetensors_file.write(path, {"a" * width: np.ones(3, np.float32)})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80 and sniff.kind(path) == sniff.SAFETENSORS
    same(weights.open_weights(path), {"a" * width: np.ones(3, np.float32)})


def test_stream_is_whole_or_not_there(tmp_path, arrays):
    path = tmp_path / "w.safetensors"
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    safetensors_file.write_stream(path, shapes, reversed(arrays.items()), notes={"network": "x"})
    same(safetensors_file.open_file(path), arrays)
    before = path.read_bytes()

    def breaks():
        yield "a", arrays["a"]
        raise OSError("no space left on the disk")

    some = list(arrays.items())
    for stream, error in (
        (breaks(), "no space left"),
        (some[:-1], "'f' was announced and never came"),
        ([*some, some[0]], "'a' .* was not announced, or came twice"),
        ([("a", arrays["a"].astype(np.float16))], "'a' float16.* was not announced"),
    ):
        with pytest.raises((OSError, ValueError), match=error):
            safetensors_file.write_stream(path, shapes, stream)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="'a' is complex128, for which safetensors has no name"):
        safetensors_file.write(path, {"a": np.zeros(3, np.complex128)})
