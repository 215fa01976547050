"""NumPy's archives as weights."""

import numpy as np
import pytest

from jaxalign.interop import sniff, weights


def test_npz(tmp_path):
    """Stored members are views of the file, compressed ones are read, objects are refused, damage is told."""
    arrays = {
        "a/W": np.arange(6.0).reshape(2, 3),
        "b": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "c": np.array(2.5),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "w.npz", **arrays)
        assert sniff.kind(tmp_path / "w.npz") == sniff.NPZ
        found = weights.open_weights(tmp_path / "w.npz")
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
        assert found["b"].flags.writeable is (save is np.savez_compressed)
    data = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "w.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        weights.open_weights(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"refused: a\.npy holds Python objects"):
        weights.open_weights(tmp_path / "w.npz")
