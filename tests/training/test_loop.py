"""Whole runs, small: what they leave behind, and that nothing which happens to them changes the end."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base
from jaxalign import teachers
from jaxalign.data.pipeline import Batches
from jaxalign.figures.video import write_mp4
from jaxalign.interop import sealed
from jaxalign.training import config as config_lib
from jaxalign.training import loop, tensorboard
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.report import Report
from jaxalign.training.restore import find_checkpoint, load_params, read_metadata

SMALL = dict(
    steps=4,
    batch_size=2,
    teacher=dict(size=32, stride=8),
    data=dict(source="synthetic", num_frames=2, height=16, width=16, stride=1),
    align=dict(projector=dict(hidden=16)),
    sample=dict(steps=1, count=1),
    checkpoint=dict(every=2),
    log_every=1,
    sample_every=4,
    eval_every=4,
)
ALIGNED = dict(align=dict(method="m_tsa", weight=0.5))
FLAGS = [f"--config.{name}={value}" for part in (SMALL, ALIGNED) for name, value in config_lib.flatten(part).items()]


FILES = "config.json", "log.txt", "parameters.txt", "figures/correspondence_000004.png", "figures/curves.png"


def small(**changes):
    config = base.get_config("demo")
    for layer in (SMALL, changes):
        config.update(layer)
    return config_lib.resolve(config)


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    """Every stored leaf of the newest checkpoint."""
    names = read_metadata(find_checkpoint(workdir))["leaves"]
    wanted = {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, (dtype, shape) in names.items()}
    return {k: np.asarray(v) for k, v in load_params(workdir, wanted, source="")[0].items()}


def assert_same_end(one: Path, two: Path) -> None:
    a, b = leaves(one), leaves(two)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert loop.train(small(**ALIGNED), workdir) == 0
    return workdir


def test_what_a_run_leaves_behind(undisturbed, capsys):
    for name in (*FILES, "samples/step_000004.mp4", "samples/step_000004.png"):
        assert (undisturbed / name).stat().st_size > 100, name
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["step"] == 4 and summary["last_checkpoint"] == 4
    assert {
        "train",
        "held_out",
        "seconds_to_first_step",
        "steps_per_second",
        "tokens_per_second",
        "flops_per_step",
        "flops_per_second",
        "peak_memory",
        "environment",
    } <= summary.keys()
    assert np.isfinite(summary["held_out"]["m_tsa"])
    # Called again, a finished run says so and names its files.
    before = {p: p.stat().st_mtime for p in (undisturbed / "checkpoints").rglob("*")}
    assert loop.train(small(**ALIGNED), undisturbed) == 0
    said = capsys.readouterr().out
    assert "is finished" in said and "correspondence_000004.png" in said
    assert before == {p: p.stat().st_mtime for p in (undisturbed / "checkpoints").rglob("*")}


def test_a_run_killed_behind_its_last_save_gets_its_summary(undisturbed, tmp_path):
    workdir = tmp_path / "killed"
    shutil.copytree(undisturbed, workdir)
    whole = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").write_text(json.dumps({"step": 2, "skipped_files": {"mended.mp4": "torn"}}))
    late = ("samples/step_000004.mp4", "samples/step_000004.png", "figures/correspondence_000004.png")
    for name in late:
        (workdir / name).unlink()
    assert loop.train(small(**ALIGNED), workdir) == 0
    for name in late:
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    late = json.loads((workdir / "summary.json").read_text())
    assert all(late[name] == whole[name] for name in ("step", "last_checkpoint", "config", "environment"))
    assert all(late[name] == pytest.approx(whole[name]) for name in ("held_out", "train", "flops_per_step"))
    assert late["steps_per_second"] == late["train"]["steps_per_second"]
    assert late["skipped_files"] == {}, "a file that was mended since"


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(undisturbed, tmp_path, capsys):
    workdir = tmp_path / "damaged"
    shutil.copytree(undisturbed, workdir)
    victim = max((workdir / "checkpoints" / "4" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    assert loop.train(small(**ALIGNED), workdir) == 0
    assert "skipped the damaged checkpoint" in capsys.readouterr().out
    assert_same_end(undisturbed, workdir)


def test_sigterm_and_data_that_end_save_and_say_so(tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "stopped"
    names = Batches.names

    def names_then_sigterm(self, index):  # called once a step
        os.kill(os.getpid(), signal.SIGTERM)
        return names(self, index)

    monkeypatch.setattr(Batches, "names", names_then_sigterm)
    assert loop.train(small(), workdir) == 143
    assert "stopped by SIGTERM at step 1, saved" in capsys.readouterr().out
    monkeypatch.undo()
    iterate = Batches.iterate

    def two_batches(self, step):
        stream = iterate(self, step)
        for batch in (next(stream), next(stream)):
            yield batch | {"substituted": np.array([True, False])}
        stream.close()
        raise OSError("the disk is gone")

    monkeypatch.setattr(Batches, "iterate", two_batches)
    with pytest.raises(OSError, match="the disk is gone"):
        loop.train(small(), workdir)
    said = capsys.readouterr().out
    assert "resumed at step 1" in said
    assert "there is no data for step 4; saved behind step 3; the same command goes on from there" in said
    assert "cannot be read; another clip stands in" in said and "50.0% of the clips so far" in said
    assert len((workdir / "unreadable_0.txt").read_text().splitlines()) == 2
    rows = tensorboard.read_scalars(workdir / "tensorboard")
    assert [row["train/substituted"] for row in rows if "train/substituted" in row] == [0.0, 0.5]
    monkeypatch.undo()

    def too_large(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        patch.setattr(loop.evaluation, "held_out_losses", too_large)
        loop.train(small(), workdir)
    assert "resumed at step 3" in capsys.readouterr().out
    assert loop.train(small(), workdir) == 0
    assert "is finished: step 4 of 4" in capsys.readouterr().out, "it was saved before it was looked at"
    assert (workdir / "samples" / "step_000004.png").is_file()
    whole = tmp_path / "whole"
    assert loop.train(small(), whole) == 0
    assert_same_end(whole, workdir)
    # Weight 0, however it is said, is that plain run bit for bit.
    zero = tmp_path / "zero"
    assert loop.train(small(align=dict(method="m_tsa", weight=0.0)), zero) == 0
    assert_same_end(whole, zero)


def test_every_period_counts():
    config = small(steps=500, sample_every=250, eval_every=100)
    assert [n for n in range(1, 501) if loop.is_looked_at(config, n)] == [100, 200, 250, 300, 400, 500]


def test_another_config_is_refused_and_nothing_is_touched(undisturbed):
    before = (undisturbed / "config.json").read_bytes()
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        loop.train(small(seed=1, **ALIGNED), undisturbed)
    assert (undisturbed / "config.json").read_bytes() == before


def test_a_full_disk_at_save_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    real = sealed.write_manifest

    def full(folder):
        if folder.name == "2":
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(sealed, "write_manifest", full)
    assert loop.train(small(), tmp_path / "full") == 0
    said = capsys.readouterr().out
    assert "checkpoint 2 was not written (no space left on the disk)" in said
    summary = json.loads((tmp_path / "full" / "summary.json").read_text())
    assert summary["failed_saves"] == 1 and summary["last_checkpoint"] == 4

    # At the last save it does cost the run, which is then not finished; and a signal does not end what is being saved.
    shutil.rmtree(tmp_path / "full" / "checkpoints")
    happened = []

    class Dog(loop.Watchdog):
        def alive(self):
            happened.append("alive")

        def rest(self):
            happened.append("rest")

    def noted(self, step, *rest, real=loop.Checkpoints.save, **named):
        happened.append(f"save {step}")
        real(self, step, *rest, **named)

    def full_at_the_end(folder):
        if folder.name == "4":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(sealed, "write_manifest", full_at_the_end)
    monkeypatch.setattr(loop, "Watchdog", Dog)
    monkeypatch.setattr(loop.Checkpoints, "save", noted)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody answered SIGTERM"))
    try:
        with pytest.raises(OSError, match=r"not finished: its last step, 4, .* last good checkpoint is step 2"):
            loop.train(small(), tmp_path / "full")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "SIGTERM: finishing" in capsys.readouterr().out
    summary = json.loads((tmp_path / "full" / "summary.json").read_text())
    assert summary["step"] == summary["last_checkpoint"] == 2
    for step in (2, 4):  # a hang behind a save is a hang
        at = happened.index(f"save {step}")
        assert happened[at - 1] == "rest" and happened[at + 1] == "alive"
    assert happened[-1] == "rest", "waiting for the last save is none"


def test_a_non_finite_stop_names_the_save_under_way(tmp_path, monkeypatch):
    real = sealed.write_manifest
    monkeypatch.setattr(sealed, "write_manifest", lambda folder: (time.sleep(0.2), real(folder)))
    report = Report(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"x": np.zeros(3)})
        with pytest.raises(FloatingPointError, match="last good checkpoint is step 2 in"):
            loop.skip_or_stop(small(), 3, dict(loss=np.nan, grad_norm=1.0), ["a.mp4"], checkpoints, report)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_non_finite_loss(tmp_path, monkeypatch, capsys, policy):
    config = small(on_nonfinite=policy, optimizer=dict(learning_rate=1e38, grad_clip=0.0, warmup_steps=0))
    if policy == "stop":
        with pytest.raises(FloatingPointError, match=r"non-finite step \d.*clips .*last good checkpoint"):
            loop.train(config, tmp_path / policy)
    else:
        assert loop.train(config, tmp_path / policy) == 0
        assert "skipped a non-finite step" in capsys.readouterr().out
        assert json.loads((tmp_path / policy / "summary.json").read_text())["nonfinite_steps"] > 0


def test_somebodys_own_folder_with_bad_files_in_it(tmp_path, capsys):
    folder = tmp_path / "clips"
    rng = np.random.default_rng(0)
    for label in ("jump", "run"):
        (folder / label).mkdir(parents=True)
        for k in range(2):
            write_mp4(folder / label / f"{k}.mp4", rng.integers(0, 255, (40, 32, 48, 3), np.uint8), 10)
    whole = (folder / "run" / "1.mp4").read_bytes()
    (folder / "run" / "truncated.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "jump" / "short.mp4").write_bytes(whole)
    write_mp4(folder / "jump" / "short.mp4", rng.integers(0, 255, (1, 32, 48, 3), np.uint8), 10)
    config = small(data=dict(source=str(folder)), model=dict(num_classes=-1))
    assert loop.train(config, tmp_path / "own") == 0
    said = capsys.readouterr().out
    assert "2 classes: jump, run" in said and "run/truncated.mp4" in said and "jump/short.mp4" in said
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert list(summary["skipped_files"]) == ["run/truncated.mp4"]
    assert summary["short_files"] == ["jump/short.mp4"] and summary["missing_files"] == []
    # The same folder with another class in it is other data: labels would shift.
    (folder / "run").rename(folder / "walk")
    with pytest.raises(ValueError, match=r"trained on 2 classes and data.source has 2 now \(gone: run; new: walk\)"):
        loop.train(config, tmp_path / "own")


def test_dry_run_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert loop.dry_run(small(**ALIGNED)) == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "teacher" in said and "temporary" in said
    assert list(tmp_path.iterdir()) == []


def test_teachers_are_not_in_the_checkpoint(undisturbed):
    assert teachers.TEACHERS
    parts = {name.split(".")[0] for name in leaves(undisturbed)}
    assert parts == {"step", "trainable", "opt_state", "ema"}
