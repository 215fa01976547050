"""Converted folders: what no leaf takes comes back as it was, and no change of a byte goes unnoticed."""

import json
import shutil

import jax
import numpy as np
import pytest
from interop_modules import leaves_of, same

from jaxalign.interop import converted, mapping
from jaxalign.interop.rules import BATCH_NORM_COUNTS, Fixed

RULES = (BATCH_NORM_COUNTS, Fixed("positions", lambda: np.linspace(0, 1, 5, dtype=np.float32)))
KEPT = {"bn.num_batches_tracked": np.array(2**40 + 1), "positions": np.linspace(0, 1, 5).astype(np.float16)}


@pytest.fixture(scope="module")
def module():
    return leaves_of(bn__scale=(4,), bn__bias=(4,), bn__running_mean=(4,), bn__running_var=(4,), head__kernel=(4, 300))


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    place = tmp_path_factory.mktemp("converted") / "net"
    return converted.write(place, module, kept=KEPT, name="net", layout="", settings={"depth": 2})


def test_module_and_what_no_leaf_takes_come_back(module, folder):
    """In float16 the table goes out, as it came in, and not as the model computes it."""
    upstream = mapping.state_dict(module, RULES, kept=KEPT)
    assert upstream["positions"].dtype == np.float16
    kept = mapping.kept_arrays(module, upstream, RULES)
    same(kept, KEPT)
    same(converted.kept(folder), KEPT)
    again = converted.read(folder, jax.eval_shape(lambda: module), name="net")
    same(mapping.state_dict(again, RULES, kept=converted.kept(folder)), upstream)
    shapes = mapping.upstream_shapes(module, RULES, dtype="bfloat16", kept=KEPT)
    assert shapes["positions"].dtype == np.float16 and shapes["bn.weight"].dtype == "bfloat16"


def test_a_folder_that_keeps_nothing(module, tmp_path):
    folder = converted.write(tmp_path / "net", module, name="net", layout="", settings={})
    assert converted.kept(folder) == {} and not (folder / converted.KEPT).exists()
    converted.read_lazily(folder, module, name="net")


def test_every_flipped_bit_is_found(module, folder, tmp_path):
    """Before anything of the arrays is restored, in every file, the note and the manifest too."""
    random = np.random.default_rng(0)
    shutil.copytree(folder, tmp_path / "net")
    files = sorted(path for path in (tmp_path / "net").rglob("*") if path.is_file())
    assert {converted.NOTE, converted.KEPT, "manifest.json"} < {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        for place in random.integers(len(whole), size=8):
            changed = bytearray(whole)
            changed[place] ^= 1 << random.integers(8)
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"damaged|cannot be read|its format is") as error:
                converted.read(tmp_path / "net", module, name="net")
            assert str(error.value).startswith(str(tmp_path / "net")) and "\n" not in str(error.value)
        path.unlink()
        with pytest.raises(ValueError, match=r"missing|cannot be read|no manifest"):
            converted.read(tmp_path / "net", module, name="net")
        path.write_bytes(whole)
    converted.read_lazily(tmp_path / "net", module, name="net")


def test_damage_is_one_line(module, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "net")
    (tmp_path / "net" / converted.KEPT).unlink()
    with pytest.raises(ValueError, match=r"net: damaged: kept\.safetensors is missing; convert again$"):
        converted.kept(tmp_path / "net")
    note = json.loads((tmp_path / "net" / converted.NOTE).read_text())
    (tmp_path / "net" / converted.NOTE).write_text(json.dumps(note | {"format": 1}))
    with pytest.raises(ValueError, match=r"its format is 1, this version reads 2; convert again$"):
        converted.note(tmp_path / "net")
