"""The verb convert: upstream's files in and out, bit for bit; a run's student out; whole outputs or none."""

import dataclasses
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from configs import base, moalign_subspace
from jaxalign import convert, teachers
from jaxalign.interop import converted, manifests, mapping, safetensors_file, weights
from jaxalign.interop.rules import BATCH_NORM_COUNTS, Tied
from jaxalign.teachers.efficientnet import BatchNorm
from jaxalign.training import config as config_lib
from jaxalign.training import setup
from jaxalign.training.checkpoint import Checkpoints

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
SIZES = {
    "dinov2_s": dict(width=32, depth=2, num_heads=2, position_grid=4, size=28),
    "dinov2_s_reg": dict(width=32, depth=2, num_heads=2, position_grid=4, size=28),
    "videomaev2_b": dict(width=32, depth=2, num_heads=2, hidden=64, image_size=32, frames=4, size=32),
    "raft_large": {},
    "sea_raft_s": {},
    "efficientnet_lite0": {},
}


@pytest.fixture(autouse=True)
def tiny():
    """The presets at sizes that a test can write; everything else about them is theirs."""
    few = {name: teachers.TEACHERS[name] for name in SIZES}
    for name, sizes in SIZES.items():
        settings = dict(few[name].settings) | sizes
        few[name] = teachers.Entry(few[name].module, few[name].config, few[name].layouts, settings)
    twice = (BATCH_NORM_COUNTS, Tied("twin.num_batches_tracked", "bn.num_batches_tracked"))
    few["one_norm"] = teachers.Entry(OneNorm, NoSettings, {"": twice}, {})
    with mock.patch.dict(teachers.TEACHERS, few, clear=True):  # puts the names back in their order too
        yield


def upstream_file(path, name, layout="", *, dtype=torch.float32, key=None, legacy=False, **settings):
    """A file such as upstream publishes, with random numbers; returns its tensors."""
    torch.manual_seed(0)
    rules = teachers.TEACHERS[name].layouts[layout]
    shapes = mapping.upstream_shapes(teachers.abstract(name, **settings), rules)
    tensors = {
        name: torch.randn(spec.shape).to(dtype) if spec.dtype != np.int64 else torch.randint(2**40, spec.shape)
        for name, spec in shapes.items()
    }
    tensors |= {rule.name: tensors[rule.source] for rule in rules if isinstance(rule, Tied)}
    torch.save({key: tensors} if key else tensors, path, _use_new_zipfile_serialization=not legacy)
    return tensors


def same_file(path, tensors):
    from safetensors.torch import load_file

    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


# ---- teachers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_file_to_folder_to_torch_is_bit_exact(tmp_path, dtype, legacy):
    tensors = upstream_file(tmp_path / "w.pth", "dinov2_s_reg", dtype=dtype, legacy=legacy)
    folder = convert.to_orbax("dinov2_s_reg", tmp_path / "w.pth", tmp_path / "orbax")
    same_file(convert.to_torch("dinov2_s_reg", folder, tmp_path / "out"), tensors)
    same_file(convert.to_torch("dinov2_s_reg", tmp_path / "w.pth", tmp_path / "direct"), tensors)
    # what came out goes in again
    again = teachers.load("dinov2_s_reg", tmp_path / "out" / "dinov2_s_reg.safetensors")
    first = teachers.load("dinov2_s_reg", folder)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True))


class OneNorm(nnx.Module):
    """The smallest network whose file has keys that no leaf takes."""

    def __init__(self, config, *, rngs):
        self.bn = BatchNorm(4)


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Its config."""


@pytest.mark.parametrize(
    ("name", "layout", "counts"),
    [
        ("one_norm", "", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)  # hundreds of leaves, a file access each
            for case in (
                ("raft_large", "torchvision", 15),
                ("raft_large", "original", 17),
                ("sea_raft_s", "", 34),
                ("efficientnet_lite0", "", 49),
            )
        ),
    ],
)
def test_batch_norms_counts_come_out_as_they_went_in(tmp_path, name, layout, counts):
    """No leaf holds them (JAX has no int64 by default), and these are above 2^31."""
    tensors = upstream_file(tmp_path / "w.pth", name, layout)
    there = [value.item() for key, value in tensors.items() if key.endswith("num_batches_tracked")]
    assert len(there) == counts and min(there) > 2**31
    folder = convert.to_orbax(name, tmp_path / "w.pth", tmp_path / "orbax")
    exported = convert.to_torch(name, folder, tmp_path / "out")
    same_file(exported, tensors)
    same_file(convert.to_torch(name, tmp_path / "w.pth", tmp_path / "direct"), tensors)
    # another number format leaves them alone, and what came out goes in again
    half = convert.to_orbax(name, exported, tmp_path / "half", dtype="bf16")
    wanted = {key: value.bfloat16() if value.is_floating_point() else value for key, value in tensors.items()}
    same_file(convert.to_torch(name, half, tmp_path / "halved"), wanted)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capfd):
    """The storage library makes a ValueError of it, and prints it beside."""
    network = nnx.Linear(512, 512, rngs=nnx.Rngs(0))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(OSError, match="cannot be written: File too large") as caught:
            converted.write(tmp_path / "full", network, name="n", layout="", settings={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(tmp_path / "full") and list(tmp_path.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err


def test_dtype_is_chosen(tmp_path):
    tensors = upstream_file(tmp_path / "w.pth", "dinov2_s")
    folder = convert.to_orbax("dinov2_s", tmp_path / "w.pth", tmp_path / "orbax", dtype="bf16")
    assert {kind for kind, _ in converted.note(folder)["leaves"].values()} == {"bfloat16"}
    file = convert.to_torch("dinov2_s", folder, tmp_path / "out")
    arrays = weights.open_weights(file)
    for name, tensor in tensors.items():
        wanted = tensor.numpy().astype(ml_dtypes.bfloat16)
        assert arrays[name].dtype == wanted.dtype and arrays[name].tobytes() == wanted.tobytes()


def test_sharded_safetensors(tmp_path):
    tensors = upstream_file(tmp_path / "w.pth", "dinov2_s")
    names = sorted(tensors)
    parts = {"w-1-of-2.safetensors": names[::2], "w-2-of-2.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors_file.write(tmp_path / file, {name: tensors[name].numpy() for name in part})
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    same_file(convert.to_torch("dinov2_s", index, tmp_path / "out"), tensors)


def test_a_published_file_comes_out_with_every_key(tmp_path, capsys):
    """Its manifest says that this file has a classifier; of a renamed one the classifier is left out, and told."""
    (published,) = [file for file in manifests.files() if file.preset == "videomaev2_b"][:1]
    path = tmp_path / published.name
    tensors = upstream_file(path, "videomaev2_b", "finetuned", key="module", **published.settings)
    assert tensors["head.weight"].shape == (710, 32)
    folder = convert.to_orbax("videomaev2_b", path, tmp_path / "orbax")
    same_file(convert.to_torch("videomaev2_b", folder, tmp_path / "out"), tensors)
    assert teachers.load("videomaev2_b", folder).head.kernel.shape == (32, 710)
    path.rename(tmp_path / "mine.pth")
    capsys.readouterr()
    file = convert.to_torch("videomaev2_b", tmp_path / "mine.pth", tmp_path / "less")
    assert "left out, no part of the network: 2 keys (head.bias, head.weight)" in capsys.readouterr().out
    same_file(file, {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")})


def test_nothing_half_written_looks_finished(tmp_path, monkeypatch):
    upstream_file(tmp_path / "w.pth", "dinov2_s")
    folder = convert.to_orbax("dinov2_s", tmp_path / "w.pth", tmp_path / "orbax")
    with pytest.raises(FileExistsError, match="orbax is there already; give --out another name"):
        convert.to_orbax("dinov2_s", tmp_path / "w.pth", folder)

    def stops(*arguments, **settings):
        raise OSError("no space left on the disk")

    monkeypatch.setattr(converted.json, "dumps", stops)  # behind the arrays, before the note
    with pytest.raises(OSError, match="no space left"):
        convert.to_orbax("dinov2_s", tmp_path / "w.pth", tmp_path / "second")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["orbax", "w.pth"]


def test_progress_is_a_line_every_tenth(capsys):
    with convert.Progress("reading", 1000) as progress:
        for _ in range(100):
            progress(10)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"reading: {percent}%" for percent in range(10, 101, 10)]


# ---- students ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with one checkpoint of an aligned, class-conditional run, as the loop leaves it."""
    workdir = tmp_path_factory.mktemp("runs") / "aligned"
    config = base.get_config("demo")
    small = dict(num_frames=2, height=16, width=16, stride=1, source="synthetic")
    config.update(dict(data=small, model=dict(num_classes=-1), align=dict(method="m_tsa", weight=0.5)))
    config.align.weight = 0.0  # resolved, it needs no teacher here
    built = setup.build(config_lib.resolve(config), num_classes=2)
    draw = jax.jit(lambda key: built.init(key)["model"])
    state = {"trainable": {"model": draw(jax.random.key(1)), "heads": {}}, "ema": draw(jax.random.key(2))}
    config.align.weight = 0.5
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with Checkpoints(workdir / "checkpoints", say=lambda line: None) as checkpoints:
        checkpoints.save(7, state)
    return workdir, built, state


def test_student_in_lattes_names(run, tmp_path):
    """Every number of the averaged student, under the names of Latte's state dict; no teacher and no data needed."""
    workdir, built, state = run
    file = convert.student_to_torch(workdir, tmp_path)
    arrays = weights.open_weights(file)
    assert file.name == "vdit.safetensors"
    assert {"blocks.7.attn.qkv.weight", "pos_embed", "temp_embed", "y_embedder.embedding_table.weight"} <= set(arrays)
    rules = built.student.weight_rules(built.model_config)
    wanted = mapping.state_dict(state["ema"], rules)
    assert set(arrays) == set(wanted)
    assert all(arrays[name].tobytes() == array.tobytes() for name, array in wanted.items())
    back = mapping.load_state_dict(state["ema"], arrays, rules)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state["ema"]), strict=True))


def test_student_of_one_checkpoint_raw_and_bf16(run, tmp_path):
    workdir, built, state = run
    file = convert.student_to_torch(workdir / "checkpoints" / "7", tmp_path, weights="raw", dtype="bf16")
    arrays = weights.open_weights(file)
    rules = built.student.weight_rules(built.model_config)
    for name, array in mapping.state_dict(state["trainable"]["model"], rules, dtype=ml_dtypes.bfloat16).items():
        assert arrays[name].dtype == array.dtype and arrays[name].tobytes() == array.tobytes(), name
    with pytest.raises(FileExistsError, match=r"vdit\.safetensors is there already"):
        convert.student_to_torch(workdir, tmp_path)
    with pytest.raises(ValueError, match=r"for a run write ema .* or raw"):
        convert.student_to_torch(workdir, tmp_path, weights="w.pth")
    with pytest.raises(FileNotFoundError, match="is no workdir"):
        convert.student_to_torch(tmp_path, tmp_path / "x")
    config = moalign_subspace.get_config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    for verb in (convert.student_to_torch, convert.student_to_lora, convert.student_to_diffusers):
        with pytest.raises(ValueError, match=r"task motion_subspace, which has no student: .*/motion_head, for"):
            verb(tmp_path, tmp_path / "x")


# ---- the command line ----------------------------------------------------------------------------------------------


def command(*arguments):
    run = [sys.executable, "-m", "jaxalign.convert", *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)


def test_list_names_every_file():
    done = command("--list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["NAME", "file", "licence", "parameters", "where"]
    assert len(lines) == 1 + len(manifests.files())
    assert any(line.split()[:2] == ["dinov2_b", "dinov2_vitb14_pretrain.pth"] and "86.6 M" in line for line in lines)


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    """In one process, as the program would be called: what `main` raises is what run_verb prints."""
    (tmp_path / "w.pth").write_text("<html>Sign in</html>")
    done = command("dinov2_s", "--weights", tmp_path / "w.pth", "--out", tmp_path / "out")
    assert done.returncode == 2 and "a web page (HTML)" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
    values = dict(list=False, weights=None, workdir=None, out=str(tmp_path / "out"), to="orbax", dtype="keep")
    for arguments, changed, message in (
        ([], {}, "write one network's NAME"),
        (["dinov2_s"], dict(out=None), "write where to with --out"),
        (["dinov2_s"], {}, "it was given no weights; it wants dinov2_vits14_pretrain.pth"),
        (["dinov2"], {}, "'dinov2' is not known; did you mean 'dinov2_s'"),
        (["dinov2_s"], dict(workdir="runs"), "or --workdir RUN and no name"),
        ([], dict(workdir="runs"), "write --to torch"),
    ):
        monkeypatch.setattr(convert, "FLAGS", type("Flags", (), values | changed))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert.main(["convert", *arguments])
