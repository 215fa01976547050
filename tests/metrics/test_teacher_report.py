"""`evaluate teachers`: what its words mean, the table against its parts, the pictures, and what it says to mistakes."""

import csv
import subprocess
import sys
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxalign import evaluate, teachers
from jaxalign.figures import video as videos
from jaxalign.metrics import iicr, spectrum
from jaxalign.metrics import teacher_report as report


class Drift(nnx.Module):
    """A stand-in for a flow network: everything moves by its one weight to the right."""

    def __init__(self, speed=3.0):
        self.speed = nnx.Param(jnp.asarray(speed))

    def __call__(self, video):
        b, t, h, w, _ = video.shape
        return jnp.stack([jnp.full((b, t - 1, h, w), self.speed[...]), jnp.zeros((b, t - 1, h, w))], -1)


@pytest.fixture
def drift(monkeypatch):
    """A flow network among the teachers."""
    abstract, load = teachers.abstract, teachers.load
    lazily = lambda: jax.eval_shape(Drift)  # noqa: E731
    monkeypatch.setattr(teachers, "abstract", lambda n, **s: lazily() if n == "drift" else abstract(n, **s))
    monkeypatch.setattr(teachers, "load", lambda n, w=None, **s: Drift() if n == "drift" else load(n, w, **s))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two small videos of a picture that moves, and one that is too short."""
    place = tmp_path_factory.mktemp("videos")
    picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    for name, speed, frames in (("slow", 1, 14), ("fast", 4, 14), ("short", 1, 3)):
        clip = np.stack([np.roll(picture, speed * t, axis=1) for t in range(frames)])
        videos.write_mp4(place / f"{name}.mp4", clip, 25)
    (place / "broken.mp4").write_bytes(b"no video")
    return place


SMALL = "efficientnet_lite0:size=32:stride=8,efficientnet_lite0:size=32:stride=16"


def test_teachers_are_read_with_their_settings():
    one, two, three = report.parse_teachers(
        "dinov2_b:layers=[3, 7]:size=160x240:norm=False, hiera_l:weights=/a/h.pt,dinov2_b:remat=None:output=fpn",
        "dinov2_b=d.pth",
    )
    assert (one.name, one.weights) == ("dinov2_b", "d.pth")
    assert one.settings == {"layers": [3, 7], "size": (160, 240), "norm": False}
    assert one.label == "dinov2_b layers=3x7 size=160x240 norm=False"
    assert (two.name, two.settings, two.weights, two.label) == ("hiera_l", {}, "/a/h.pt", "hiera_l")
    assert three.settings == {"remat": None, "output": "fpn"} and three.weights == "d.pth"
    assert report.parse_size("256") == (256, 256) and report.parse_size("160x240") == (160, 240)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("",), "--teachers is missing: name some of efficientnet_lite0"),
        (("a:stride",), "write settings as NAME:setting=value"),
        (("a,size=3",), "a teacher's settings stand behind colons"),
        (("a:b=1,a:b=1",), "a b=1 is there twice"),
        (("a", "b=x"), "--weights names 'b', which --teachers does not"),
        (("a", "raw"), "--weights 'raw': write NAME=FILE"),
    ],
)
def test_words_that_cannot_be_read(arguments, said):
    with pytest.raises(ValueError, match=said):
        report.parse_teachers(*arguments)


def test_teachers_that_do_not_fit_are_refused_before_weights_are_read():
    for text, said in (
        ("efficientnet_lite", "did you mean 'efficientnet_lite0'"),
        ("efficientnet_lite0:strid=8", "no setting 'strid'; it has size"),
        ("efficientnet_lite0:stride=9", "stride must be one of"),
        ("efficientnet_lite0:size=big", "teacher efficientnet_lite0 size=big on clips of 4x32x32"),
    ):
        with pytest.raises(ValueError, match=said):
            report.check(report.parse_teachers(text), (4, 32, 32))
    assert report.check(report.parse_teachers(SMALL), (4, 32, 48)) == [(4, 4, 4, 40), (4, 2, 2, 112)]
    with pytest.raises(ValueError, match="write pixels, 256 or HEIGHTxWIDTH"):
        report.parse_size("256p")


def test_clips_come_from_files_folders_and_sources(folder):
    clips = report.open_clips(str(folder), 4, frames=6, size=(32, 32), stride=2)
    assert clips.videos.shape == (4, 6, 32, 32, 3) and sorted(set(clips.names)) == ["fast.mp4", "slow.mp4"]
    assert any("shorter than 6 frames: 1 (the first: short.mp4)" in note for note in clips.notes)
    assert any("unreadable: 1 of its files (the first, broken.mp4" in note for note in clips.notes)
    assert len(np.unique(clips.videos.reshape(4, -1), axis=0)) == 4  # no clip twice
    alone = report.open_clips(str(folder / "slow.mp4"), 50, frames=12, size=(32, 32))
    assert len(alone.videos) == 3 and set(alone.names) == {"slow.mp4"}  # three places to begin at
    assert report.open_clips("synthetic", 2, frames=3, size=(16, 24)).videos.shape == (2, 3, 16, 24, 3)
    assert report.clips_to_show(["a", "a", "b", "b", "c"], 3) == [0, 2, 4]
    assert report.clips_to_show(["a", "a", "a", "b"], 3) == [0, 1, 3]


def test_videos_that_are_not_there_or_too_short(folder, tmp_path):
    for spec, said in (
        (folder / "slow.mp4", r"slow.mp4: a clip needs 20 frames, and it has 14; lower --frames"),
        (folder, "a clip needs 20 frames, and its longest video has 14"),
        (folder / "broken.mp4", "broken.mp4: not a video, or damaged"),
        (tmp_path, "--videos .*: no videos and no folders of frames in it"),
    ):
        with pytest.raises(ValueError, match=said):
            report.open_clips(str(spec), 2, frames=20, size=(32, 32))
    with pytest.raises(
        FileNotFoundError, match=r"--videos '/nowhere': no such file or folder; write a file or a folder"
    ):
        report.open_clips("/nowhere", 2, frames=20, size=(32, 32))


def test_the_whole_comparison(folder, tmp_path, drift, capsys):
    asked = report.parse_teachers(f"{SMALL},drift")
    options = dict(clips=2, frames=5, size=(32, 48), stride=1, clusters=[2, 3])
    rows = evaluate.teachers(asked, str(folder), tmp_path / "out", **options)
    said = capsys.readouterr().out
    assert "note: Δ depends on the grid" in said and "drift: 4×32×48 outputs of 2" in said

    fine, coarse, flow = rows
    assert (fine["grid"], fine["width"], coarse["grid"]) == ("5×4×4", 40, "5×2×2")
    assert flow["mean speed px"] == 3.0 and "Δ" not in flow and flow["parameters"] == 1
    clips = report.open_clips(str(folder), 2, frames=5, size=(32, 48)).videos
    net = teachers.load("efficientnet_lite0", size=32, stride=8)
    tokens = np.asarray(jax.jit(lambda net, x: net(x))(net, jnp.asarray(clips, jnp.float32) / 127.5 - 1))
    gaps = [spectrum.frequency_gap(spectrum.log_spectrum(clip)) for clip in tokens]
    assert fine["Δ"] == pytest.approx(np.mean(gaps), abs=1e-3) and fine["Δ ±"] == pytest.approx(np.std(gaps), abs=1e-3)
    expected = np.mean([iicr.iicr(clip, [2, 3]) for clip in tokens], axis=0)
    assert [fine["IICR k=2"], fine["IICR k=3"]] == pytest.approx(expected.tolist(), rel=1e-3)

    with open(tmp_path / "out" / "teachers.csv", encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    assert [row["teacher"] for row in kept] == [one.label for one in asked]
    assert float(kept[0]["Δ"]) == fine["Δ"] and kept[2]["Δ"] == "" and kept[2]["mean speed px"] == "3.0"
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    each = [f"{kind}_0{k}" for kind in ("flow", "pca", "trajectories") for k in (1, 2)]
    assert [name.rsplit("_", 1)[0] for name in pictures if name[-5].isalpha() and "_0" in name] == each
    assert {"iicr.png", "spectrum.png", "xt_slices.png"} <= set(pictures) and len(pictures) == 9
    for name in pictures:
        assert f"/out/{name}" in said and np.asarray(Image.open(tmp_path / "out" / name).convert("L")).std() > 10


def test_flow_alone_needs_no_tokens(folder, tmp_path, drift):
    options = dict(clips=1, frames=3, size=(32, 32), stride=1, clusters=[2])
    (row,) = evaluate.teachers(report.parse_teachers("drift"), str(folder / "slow.mp4"), tmp_path, **options)
    assert set(row) == {"teacher", "grid", "width", "parameters", "mean speed px", "frames/s"}
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["flow_01_slow.png", "xt_slices.png"]


def test_the_command_line(folder, tmp_path):
    command = [sys.executable, "-m", "jaxalign.evaluate", "teachers", f"--videos={folder}", f"--out={tmp_path}"]
    done = subprocess.run(
        [*command, "--teachers=efficientnet_lite9"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "teacher 'efficientnet_lite9' is not known; did you mean 'efficientnet_lite0'?" in done.stderr


def test_deep_tokens_have_less_high_frequency_than_shallow_ones_on_real_clips():
    """Align4Gen's reading (fig. 3), at equal grids: stride 32 of 256 pixels, stride 8 of 64."""
    try:
        clips = report.open_clips("demo", 3, frames=2, size=(128, 128), stride=2)
    except FileNotFoundError:
        pytest.skip("the demo clips are not installed")
    shallow, deep = (
        report.measure(one, clips.videos, [2])
        for one in report.parse_teachers("efficientnet_lite0:size=64:stride=8,efficientnet_lite0:size=256:stride=32")
    )
    assert shallow.shape[:3] == deep.shape[:3] == (2, 8, 8)
    assert (deep.gap < shallow.gap - 0.3).all()
