"""The verbs in-process on one small class-conditional run, and what their command lines say to a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from configs import base
from jaxalign import evaluate, sample
from jaxalign.metrics.motion import motion_magnitude
from jaxalign.training import config as config_lib
from jaxalign.training import loop, showing
from jaxalign.training.trained import read_config

SMALL = dict(
    steps=2,
    batch_size=2,
    teacher=dict(size=32, stride=8),
    data=dict(source="synthetic", num_frames=2, height=16, width=16, stride=1),
    model=dict(num_classes=-1),
    sample=dict(steps=1, count=1),
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
    assert [p.name for p in paths] == ["all.mp4", "all.png", "0000.mp4", "0001.mp4", "0002.mp4"]
    for one, two in zip(paths, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
    paths = sample.draw(runs / "aligned", weights="raw", count=1, fps=12.5)
    assert "raw weights" in capsys.readouterr().out
    assert paths[0] == runs / "aligned" / "samples" / "step_000002_raw_seed_0" / "all.mp4"
    with av.open(str(paths[0])) as container:
        assert container.streams.video[0].average_rate == 12.5
    with pytest.raises(ValueError, match=r"'dance' is no class of this run; write 0..1 or drift, gravity"):
        sample.draw(runs / "plain", labels=["dance"])


def test_fewer_videos_leave_none_of_those_before(tmp_path):
    """Of what was written here; a folder that holds other videos keeps them."""
    videos = np.zeros((3, 2, 128, 128, 3), np.uint8)
    others = ["0007.mp4", "0001.png", "00002.mp4", "clip.mp4"]
    for name in others:
        (tmp_path / name).touch()
    showing.write_samples(tmp_path, "all", videos, 8, single=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        *others,
        "all.mp4",
        "all.png",
        *(f"000{k}.mp4" for k in range(3)),
    }
    showing.write_samples(tmp_path, "all", videos[:1], 8, single=True)
    others.remove("0007.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "all.mp4", "all.png", "0000.mp4"}


def test_evaluate_loss(runs):
    rows = evaluate.loss([runs / "aligned", runs / "plain"], clips=3, times=3)
    assert rows == evaluate.loss([runs / "aligned", runs / "plain"], clips=3, times=3)
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
