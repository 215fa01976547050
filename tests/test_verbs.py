"""The verbs in-process on one small class-conditional run, and what their command lines say to a mistake."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from configs import base
from jaxalign import evaluate, sample
from jaxalign.data import sources
from jaxalign.interop import sealed
from jaxalign.metrics.motion import motion_magnitude
from jaxalign.training import config as config_lib
from jaxalign.training import loop, showing
from jaxalign.training.trained import read_config, workdir_of

SMALL = dict(
    steps=2,
    batch_size=2,
    teacher=dict(size=32, stride=8),
    data=dict(source="synthetic", num_frames=2, height=16, width=16, stride=1),
    model=dict(num_classes=-1),
    sample=dict(steps=1, count=1),
    checkpoint=dict(every=1),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, align in (("aligned", dict(method="m_tsa", weight=0.5)), ("plain", {})):
        config = base.get_config("demo")
        for layer in (SMALL, dict(align=align | dict(projector=dict(hidden=16)))):
            config.update(layer)
        assert loop.train(config_lib.resolve(config), folder / name) == 0
    return folder


def test_sample_is_repeatable_and_says_which_weights(runs, tmp_path, capsys):
    options = dict(count=3, at_once=2, labels=["gravity", "0"], guidance_scale=2.0)
    paths = sample.draw(runs / "aligned", out=tmp_path / "a", **options)
    assert "averaged (EMA)" in capsys.readouterr().out
    again = sample.draw(runs / "aligned", out=tmp_path / "b", **options)
    assert [p.name for p in paths] == ["all.gif", "all.png", "0000.mp4", "0001.mp4", "0002.mp4"]
    paths[4].unlink()
    assert sample.draw(runs / "aligned", out=tmp_path / "a", **options) == paths
    assert "2 of 3 videos are there already" in capsys.readouterr().out
    for one, two in zip(paths, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
    paths = sample.draw(runs / "aligned", weights="raw", count=1, fps=12.5)
    assert "raw weights" in capsys.readouterr().out
    assert paths[0] == runs / "aligned" / "samples" / "step_000002_raw_seed_0" / "all.gif"
    with av.open(str(paths[2])) as container:
        assert container.streams.video[0].average_rate == 12.5
    with pytest.raises(ValueError, match=r"'dance' is no class of this run; write 0..1 or drift, gravity"):
        sample.draw(runs / "plain", labels=["dance"])
    earlier = sample.draw(runs / "aligned" / "checkpoints" / "1", weights="raw", count=1, fps=12.5)
    assert earlier[2] == runs / "aligned" / "samples" / "step_000001_raw_seed_0" / "0000.mp4"
    assert earlier[2].read_bytes() != paths[2].read_bytes()


@pytest.fixture
def undrawn(tmp_path, monkeypatch):
    """(a run of steps 7 and 9 of which nothing is drawn in truth, the numbers of each batch that was): number 4 of its
    clips never comes."""
    folder, calls = tmp_path / "run", []
    for step in (7, 9):
        checkpoint = folder / "checkpoints" / str(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "metadata.json").write_text(str(step))
        sealed.write_manifest(checkpoint)
    config = base.get_config("demo")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    opened = config, SimpleNamespace(frozen=None), {"model": None}
    monkeypatch.setattr(sample, "open_run", lambda *_, **__: opened)

    def batches(model, frozen, *, at_once, wanted):
        for first in range(0, config.sample.count, at_once):
            if numbers := [k for k in range(first, min(first + at_once, config.sample.count)) if k in wanted]:
                if 4 in numbers:
                    raise KeyboardInterrupt
                calls.append(numbers)
                yield numbers, np.zeros((len(numbers), 2, 128, 128, 3), np.uint8)

    monkeypatch.setattr(showing, "Sampler", lambda *_, **__: SimpleNamespace(told=None, batches=batches))
    return folder, calls


def test_videos_are_there_as_they_are_drawn_and_are_not_drawn_again(undrawn, tmp_path):
    run, calls = undrawn
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sample.draw(run, out=out, count=5, at_once=2)
    four = [f"000{k}.mp4" for k in range(4)]
    assert sorted(path.name for path in out.iterdir()) == [*four, "index.jsonl"]
    (out / "0001.mp4").unlink()
    sample.draw(run, out=out, count=4, at_once=2)
    assert calls == [[0, 1], [2, 3], [1]]
    assert sorted(path.name for path in out.iterdir()) == [*four, "all.gif", "all.png", "index.jsonl"]
    # Who reads the folder as videos finds the clips and nothing else.
    assert [item.name for item in sources.open_source(str(out)).items] == four
    # Clips of something else stay; a checkpoint that was gone on from can be named.
    for changed, said in (
        (dict(seed=1), "seed = 0, not 1: give another --out"),
        (
            dict(weights="raw"),
            f"step 9', not 'raw of .*: give another --out, or .*--workdir={run}/checkpoints/9 --w.*=ema",
        ),
        (dict(steps=7), "steps = 25, not 7: give another --out"),
    ):
        with pytest.raises(ValueError, match=rf"0000.mp4 was drawn with .*{said}$"):
            sample.draw(run, out=out, **dict(count=4, at_once=2) | changed)
    with pytest.raises(ValueError, match=r"step 9', not 'ema of .*, step 7': .*, or go on with that one: --workdir="):
        sample.draw(run / "checkpoints" / "7", out=out, count=4, at_once=2)
    (run / "checkpoints" / "9").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"step 7': give another --out$"):
        sample.draw(run, out=out, count=4, at_once=2)
    # A run that was moved, or is seen under another path, has the same checkpoint.
    (tmp_path / "gone").rename(run / "checkpoints" / "9")
    run.rename(tmp_path / "moved")
    sample.draw(tmp_path / "moved", out=out, count=4, at_once=2, steps=25)
    assert len(calls) == 3


def test_fewer_videos_leave_none_of_those_before(undrawn, tmp_path):
    """Of what was written here, by an earlier version too; a folder that holds other videos keeps them."""
    run, calls = undrawn
    others = ["0007.mp4", "0001.png", "00002.mp4", "clip.mp4"]
    for name in others:
        (tmp_path / name).touch()
    ours = {"all.gif", "all.png", "index.jsonl", "0000.mp4"}
    there = {path.name for path in tmp_path.iterdir()}
    sample.draw(run, out=tmp_path, count=3)
    assert {path.name for path in tmp_path.iterdir()} == there | ours | {"0001.mp4", "0002.mp4"}
    sample.draw(run, out=tmp_path, count=1)
    assert {path.name for path in tmp_path.iterdir()} == there | ours and calls == [[0, 1, 2]]
    (tmp_path / "all.mp4").touch()  # the sheet of before, when there was no index
    sample.draw(run, out=tmp_path, count=1)
    assert {path.name for path in tmp_path.iterdir()} == (there | ours) - {"0007.mp4"}


def test_a_sheet_of_thousands_shows_the_first_small(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        showing.video, "read_mp4", lambda path: asked.append(path) or np.zeros((2, 256, 384, 3), np.uint8)
    )
    gif, png = showing.write_sheet(tmp_path, "all", [Path(f"{k:04d}.mp4") for k in range(3969)], 8)
    assert len(asked) == 64 and Image.open(gif).size == (8 * (128 + 2) + 2, 8 * (86 + 2) + 2)
    assert Image.open(png).size == (2 * 130 + 2, 64 * 88 + 2)


def test_a_checkpoint_names_its_run(undrawn, tmp_path, monkeypatch):
    run, _ = undrawn
    assert workdir_of(run) == run and read_config(run / "checkpoints" / "7") == read_config(run)
    assert workdir_of(run / "checkpoints" / "7") == workdir_of(run / "checkpoints") == run
    monkeypatch.chdir(run / "checkpoints")
    assert workdir_of("9") == run
    for other in (tmp_path, run / "checkpoints" / "9" / "state", run / "samples" / "step_9"):
        with pytest.raises(
            FileNotFoundError, match=r"is no workdir: it has no config.json; give .* of one of its check"
        ):
            workdir_of(other)


def test_evaluate_loss(runs):
    rows = evaluate.loss([runs / "aligned", runs / "plain"], clips=3, times=3)
    assert rows == evaluate.loss([runs / "aligned", runs / "plain" / "checkpoints" / "2"], clips=3, times=3)
    assert rows[1]["step"] == 2 and json.loads((runs / "plain" / "evaluate_loss_step2.json").read_text()) == rows[1]
    assert "m_tsa" in rows[0] and "m_tsa" not in rows[1]
    assert all(np.isfinite(row["denoising"]) and len(row["denoising_by_time"]) == 3 for row in rows)
    assert json.loads((runs / "plain" / "evaluate_loss.json").read_text()) == rows[1]
    assert evaluate.table(rows).count("\n") == 3
    whole = evaluate.held_out(read_config(runs / "plain"), 3, at_once=3)  # batches are of two: one row fills the second
    real = float(motion_magnitude(whole[0]["video"]).mean())
    assert [row["motion_of_real_clips"] for row in rows] == [real, real]


def test_evaluate_probe(runs):
    same_name = [runs / "a" / "run", runs / "b" / "run"]
    for path, there in zip(same_name, ("aligned", "plain"), strict=True):
        path.parent.mkdir()
        path.symlink_to(runs / there)
    aligned, plain = map(str, same_name)
    rows = evaluate.probe(same_name, clips=2, times=3, steps=3)
    kinds = [(row["run"], row["read through"]) for row in rows]
    assert kinds == [
        (aligned, "no head (raw tokens)"),
        (aligned, "fresh head"),
        (aligned, "own head"),
        (plain, "no head (raw tokens)"),
        (plain, "fresh head"),
    ]
    assert all(np.isfinite(row["m_tsa"]) for row in rows) and len({row["m_tsa"] for row in rows}) == len(rows)
    with pytest.raises(ValueError, match="none of the runs aligns anything"):
        evaluate.probe([runs / "plain"])
    with pytest.raises(FileNotFoundError, match="is no workdir"):
        evaluate.loss([runs])


def test_command_lines_answer_in_one_line(tmp_path):
    for verb, arguments, said in (
        ("main", ["--config", "configs/tsa.py", "--config.data.source=/nowhere"], "'/nowhere': no such folder"),
        ("evaluate", ["fvvd"], "write what to evaluate"),
    ):
        command = [sys.executable, "-m", f"jaxalign.{verb}", *arguments]
        if verb == "main":
            command += ["--workdir", str(tmp_path / "w")]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
