"""Scores of a run, from its checkpoint to the row: classes in proportion, going on after a kill, what is refused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from jaxalign.figures import video
from jaxalign.metrics import features, networks
from jaxalign.training import config as config_lib
from jaxalign.training import generated, restore, scoring, setup, trained
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.showing import Sampler

OPTIONS = dict(count=10, steps=2, at_once=2)
MEAN_COLOUR = "mean_colour"


@pytest.fixture
def mean_colour(monkeypatch):
    """A network that is loaded and asked at once; of the others the real thing."""
    real = features.open_network

    def opened(name, weights=None, **kind):
        if name != MEAN_COLOUR:
            return real(name, weights, **kind)
        mesh = generated.make_mesh(devices=jax.local_devices()[:1])
        return features.Network(name, "mean colour", {"factor": jnp.ones(())}, _mean_colour, mesh)

    monkeypatch.setattr(features, "open_network", opened)


@jax.jit
def _mean_colour(module, videos):
    return videos.astype(jnp.float32).mean((2, 3)).reshape(len(videos), -1) * module["factor"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir as training leaves it, of a student that nobody trained: every leaf is random."""
    config = base.get_config("demo")
    config.model.unlock()
    config.model.update(dict(width=32, depth=2, num_heads=2, num_classes=-1))
    config.update(dict(data=dict(source="synthetic", num_frames=2, height=16, width=16, stride=1)))
    return random_workdir(config, tmp_path_factory.mktemp("generated") / "run")


def random_workdir(config, workdir):
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config_lib.resolve(config).to_dict()))
    model = jax.eval_shape(setup.build(config, num_classes=2).init, jax.random.key(0))["model"]
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), model)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, {"ema": model, "trainable": {"model": model, "heads": {}}})
    return workdir


def small_parts(clips, part=4):
    """A run's clips as they are, in parts that a test can interrupt."""
    return [clips.read(range(k, min(k + part, clips.count))) for k in range(0, clips.count, part)]


@pytest.fixture(scope="module")
def whole(run):
    """All videos of the run at once, and the real clips."""
    return generated.of_run(run, **OPTIONS)


def test_classes_are_those_of_the_real_clips(whole):
    clips, real = whole
    assert clips.count == real.count == 10 and clips.labels == real.labels
    assert sorted(clips.labels) == [0] * 5 + [1] * 5  # synthetic has as many of each
    videos = clips.read(range(10))
    assert videos.shape == (10, 2, 16, 16, 3) and videos.dtype == np.uint8 and videos.std() > 1


def test_videos_are_those_of_the_sampler(run, whole):
    """The same noise, labels and weights as `python -m jaxalign.sample` has, at least for the first batch."""
    opened = trained.open_run(run)
    opened.config.sample.update(count=2, seed=0, steps=2)
    expected = Sampler(opened.run, opened.config, labels=list(whole[0].labels[:2]))(
        opened.trainable["model"], opened.run.frozen, at_once=2
    )
    found = whole[0].read(range(10))[:2].astype(int)
    assert np.abs(found - expected).max() <= 1  # grey levels


def test_goes_on_where_it_was_stopped(run, whole, monkeypatch, tmp_path):
    monkeypatch.setattr(generated, "part_size", lambda clip, at_once: 4)
    again = dict(OPTIONS, seed=1)

    def stop_at(number):
        def draw(first, count, told):
            if first >= number:
                raise KeyboardInterrupt
            return drawer(first, count, told)

        return lambda *_: draw

    mesh, sampling = generated.make_mesh(devices=jax.local_devices()[:1]), dict(sampler="euler", steps=2)
    drawer = generated._drawer(run, run / "checkpoints" / "1", "ema", mesh, sampling | dict(guidance_scale=1.0), 1)
    with monkeypatch.context() as patched:
        patched.setattr(generated, "_drawer", stop_at(6))
        with pytest.raises(KeyboardInterrupt):
            small_parts(generated.of_run(run, **again)[0])
    said, calls = [], []

    def counted(*_):
        return lambda first, count, told: calls.append(first) or drawer(first, count, told)

    monkeypatch.setattr(generated, "_drawer", counted)
    clips, _ = generated.of_run(run, say=said.append, **again)
    found = np.concatenate(small_parts(clips))
    assert calls == [4, 6, 8] and any("4 of 10 videos are in" in line for line in said)
    np.testing.assert_array_equal(found, np.concatenate(small_parts(clips)))
    clean = dataclasses.replace(clips, folder=None)
    for part in clips.folder.glob("part_*"):
        for file in part.iterdir():
            file.unlink()
        part.rmdir()
    np.testing.assert_array_equal(found, np.concatenate(small_parts(clean)))
    assert np.abs(found.astype(int) - whole[0].read(range(10))).max() > 1  # another seed


def test_rows_and_what_is_kept(run, mean_colour, tmp_path):
    asked = dict(network=MEAN_COLOUR, cache=tmp_path / "cache", **OPTIONS)
    said = []
    (row,) = scoring.score("fvd", workdir=run, say=said.append, **asked)
    assert row["metric"] == "mean colour" and np.isfinite(row["value"]) and row["value"] > 0
    assert row["n"] == 10 and "n 10 (2048)" in row["protocol"] and "steps 2 (50)" in row["protocol"]
    assert (row["sampler"], row["weights"], row["step"], row["seed"]) == ("euler-2", "ema", 1, 0)
    assert json.loads((run / "evaluate_fvd_mean_colour.json").read_text()) == [row]
    assert scoring.score("fvd", workdir=run, say=said.append, **asked) == [row]
    assert scoring.score("fvd", workdir=run / "checkpoints" / "1", say=said.append, **asked) == [row]
    assert json.loads((run / "evaluate_fvd_mean_colour.json").read_text()) == [row]
    with pytest.raises(ValueError, match=r"another protocol: clips.seed = 0 there and 2 here"):
        scoring.score("fvd", workdir=run, say=said.append, **(asked | dict(seed=2)))


def test_a_folder_of_videos(run, mean_colour, tmp_path):
    """Each file once, against another source; the real clips look as asked, whatever the run's are."""
    videos = generated.of_run(run, **OPTIONS)[0].read(range(10)).repeat(4, 2).repeat(4, 3)
    for k in range(3):
        video.write_mp4(tmp_path / "videos" / f"{k}.mp4", videos[k], 8)
    video.write_mp4(tmp_path / "videos" / "short.mp4", videos[0, :1], 8)
    asked = dict(network=MEAN_COLOUR, cache=tmp_path / "cache", count=6, frames=2, size=(16, 16), stride=1)
    said = []
    (row,) = scoring.score(
        "fvd", videos=str(tmp_path / "videos"), real="synthetic", out=tmp_path / "out", say=said.append, **asked
    )
    assert row["n"] == 3 and row["n real"] == 6 and np.isfinite(row["value"])
    assert row["protocol"].startswith("Align4Gen but for n 3 (2048), frames 2 (16)") and "steps" not in row["protocol"]
    assert any("3 features of width 6" in line and "at least 7" in line for line in said)
    assert any("shorter than 2 frames: 1 videos (the first: short.mp4)" in line for line in said)
    with pytest.raises(ValueError, match=r"--videos '.*videos': nothing in its .* num_frames=9 .*; lower --frames"):
        scoring.score("clip", videos=str(tmp_path / "videos"), **(asked | dict(frames=9)))
    assert (tmp_path / "out" / "evaluate_fvd_mean_colour.json").is_file()


def test_what_is_refused(run, mean_colour, tmp_path):
    asked = dict(network=MEAN_COLOUR, count=4)
    for options, said in (
        (dict(word="fvf", workdir=run), "is no score; write one of fvd, fid"),
        (dict(word="fvd"), "give --workdir, .* or --videos"),
        (dict(word="fvd", videos=str(tmp_path)), "--real is missing"),
        (dict(word="fvd", videos=str(tmp_path / "none"), real="demo"), "--videos '.*none': no such folder"),
        (dict(word="fvd", workdir=tmp_path), "is no workdir"),
        (dict(word="fvd", workdir=run, real=str(tmp_path / "gone")), "--real '.*gone': no such folder"),
        (dict(word="fvd", workdir=run, sampler="ddim"), "--sampler 'ddim' does not fit .*; write euler"),
        (dict(word="fvd", workdir=run, real="synthetic:gravity"), "has other classes than the run's own"),
        (dict(word="fvd", workdir=run, split="test"), "write 'train' or 'held_out'"),
        (dict(word="fvd", workdir=run, network="i3d"), "i3d_torchscript.pt.*--weights FILE"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            scoring.score(**(asked | options))


def another_step(workdir, step):
    """A newer checkpoint with other numbers, as of a run that goes on training."""
    opened = trained.open_run(workdir)
    model = jax.tree.map(lambda x: x + 1, opened.trainable["model"])
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, {"ema": model, "trainable": {"model": model, "heads": {}}})


@pytest.fixture
def copied(run, tmp_path):
    """A run of its own for a test that changes it; nothing is generated yet."""
    shutil.copytree(run / "checkpoints", tmp_path / "copied" / "checkpoints")
    shutil.copy(run / "config.json", tmp_path / "copied")
    return tmp_path / "copied"


def test_videos_are_of_the_checkpoint_that_they_are_named_after(copied, whole, monkeypatch):
    """Of a run that trains on: its newest checkpoint is looked for once, when the videos get their name."""
    looked, drawn_from = [], []
    real = generated.trained.open_run

    def opened(*given, **options):
        drawn_from.append(Path(options["checkpoint"]).name)
        return real(*given, **options)

    clips, _ = generated.of_run(copied, **OPTIONS)
    another_step(copied, 2)
    monkeypatch.setattr(generated.trained, "open_run", opened)
    monkeypatch.setattr(restore.checked, "find_damage", lambda folder, *_: looked.append(folder.name) or None)
    found = clips.read(range(10))
    assert clips.about["step"] == 1 and "step1-" in clips.folder.name and drawn_from == ["1"] and looked == ["1"]
    np.testing.assert_array_equal(found, whole[0].read(range(10)))


def test_an_older_checkpoint_is_scored_when_it_is_named(copied):
    """So what was half made when the run trained on can be finished."""
    before, _ = generated.of_run(copied, **OPTIONS)
    another_step(copied, 2)
    for place, step in ((copied, 2), (copied / "checkpoints", 2), (copied / "checkpoints" / "1", 1)):
        clips, _ = generated.of_run(place, **OPTIONS)
        assert clips.about["step"] == step and clips.name == "copied" and clips.folder.parent == copied / "generated"
    assert clips.about == before.about and clips.folder == before.folder


def test_one_checkpoint_is_opened_and_gone_ones_are_named(copied, monkeypatch):
    one = trained.open_run(copied, weights="raw").trainable["model"]
    another_step(copied, 2)
    looked = []
    monkeypatch.setattr(restore.checked, "find_damage", lambda folder, *_: looked.append(folder.name) or None)
    newest = trained.open_run(copied).trainable["model"]
    first = trained.open_run(copied, checkpoint=copied / "checkpoints" / "1").trainable["model"]
    assert looked == ["2", "1"]
    for a, b, c in zip(*map(jax.tree.leaves, (one, first, newest)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).min() > 0.5
    with pytest.raises(FileNotFoundError, match=r"checkpoints/7 is gone: the run goes on training"):
        trained.open_run(copied, checkpoint=copied / "checkpoints" / "7")


def test_sections_of_another_run_replace_whole_fields():
    mine = dict(method="tsa", beside=dict(more=dict(method="repa")), projector=dict(hidden=8, conv="tsa"))
    config = trained.ml_collections.ConfigDict(dict(align=mine, teacher=dict(size=224), seed=3))
    found = trained.with_sections(config, dict(align=dict(method="trd", beside={}, projector=dict(hidden=4))))
    align = dict(method="trd", beside={}, projector=dict(hidden=4))
    assert found.to_dict() == dict(align=align, teacher=dict(size=224), seed=3)
    assert trained.with_sections(config, dict(teacher=dict(size=[160, 240]))).teacher.size == [160, 240]
    assert config.align.beside.more.method == "repa"


def test_classes_of_another_source_are_compared(copied):
    """Also where the config says how many there are: the same number is not the same classes."""
    config = json.loads((copied / "config.json").read_text())
    config["model"]["num_classes"] = 2

    def asked(source):
        config["data"]["source"] = source
        (copied / "config.json").write_text(json.dumps(config))
        return generated.of_run(copied, real="synthetic", **OPTIONS)[0]

    assert asked("synthetic").notes == ()
    with pytest.raises(
        ValueError, match=r"own source synthetic:gravity, which .*: 2 and \d, '.*' is in one of them only"
    ):
        asked("synthetic:gravity")
    (note,) = asked("/gone").notes
    assert note.startswith("/gone, which the run was trained on, cannot be opened: names of classes are not compared")
    config["model"]["num_classes"] = 3
    with pytest.raises(ValueError, match="cannot be opened, and --real synthetic has 2 classes, not 3"):
        asked("/gone")


def test_what_the_codec_was_is_written_down(whole):
    assert whole[0].about["latents"]["codec.name"] == "pixels" and "prompts" not in whole[0].about


def test_what_cannot_be_scored_is_said_before_anything_is_generated(copied, monkeypatch, tmp_path):
    def opened(name, weights=None, *, per_frame=False, logits=False):
        module = networks.abstract("c3d") if name == "c3d" else None
        ask = features.asking("c3d") if name == "c3d" else lambda _, v: v.mean((2, 3) if per_frame else (1, 2, 3))
        return features.Network(name, name, module, jax.jit(ask), generated.make_mesh(devices=jax.local_devices()[:1]))

    monkeypatch.setattr(features, "open_network", opened)
    for word, options, said in (
        ("fvd", dict(network="c3d"), r"--network c3d does not take clips of 2 frames of 16×16 .*: c3d: a clip has 16"),
        ("inception_score", dict(), "--network c3d does not take clips of 2 frames"),
        ("inception_score", dict(network="inception"), "needs at least 10 samples, and .* gives 8"),
        ("clip", dict(videos="synthetic", frames=1), "at least two frames, and clips of synthetic have one"),
        ("fid", dict(videos="synthetic", real="synthetic", frames=1, count=1), "at least 2 samples, .* gives 1"),
    ):
        place = {} if "videos" in options else dict(workdir=copied)
        with pytest.raises(ValueError, match=said):
            scoring.score(word, **place, **(dict(count=4, at_once=2) | options))
    assert not list((copied / "generated").glob("*/part_*"))


class Words(NamedTuple):
    """In place of CLIP: what it is asked for, in three channels."""

    factor: object

    def text(self, ids):
        return ids.astype(jnp.float32)


def test_captions_of_a_folder(monkeypatch, tmp_path):
    """CLIP-T of the videos that have one, and a note where something is missing."""
    mesh, asked = generated.make_mesh(devices=jax.local_devices()[:1]), []
    ask = jax.jit(lambda module, videos: videos.astype(jnp.float32).mean((2, 3)) * module.factor)
    found = features.Network("clip_vit_b32", "fake", Words(jnp.ones(())), ask, mesh)
    monkeypatch.setattr(features, "open_network", lambda *_, **__: found)
    words = lambda path: lambda texts: asked.extend(texts) or np.ones((len(texts), 3), np.int32)  # noqa: E731
    monkeypatch.setattr(scoring.clip_network, "tokenizer", words)
    for k in range(3):
        video.write_mp4(tmp_path / "told" / f"{k}.mp4", np.full((2, 32, 32, 3), 90 * k + 20, np.uint8), 8)
    options = dict(videos=str(tmp_path / "told"), frames=2, size=(32, 32), count=9, out=tmp_path / "out")
    said = []
    options |= dict(say=said.append)
    assert len(scoring.score("clip", tokenizer="bpe", **options)) == 1
    assert any("no CLIP-T: the videos have no captions" in line for line in said)
    (tmp_path / "told" / "captions.csv").write_text("video,caption\n0.mp4,a dark wall\n2.mp4,a bright wall\n")
    rows = scoring.score("clip", **options)
    assert len(rows) == 1 and rows[0]["n"] == 3  # nobody asked for words: all videos count
    assert any("note: no CLIP-T: give --tokenizer" in line for line in said)
    said.clear()
    rows = scoring.score("clip", tokenizer="bpe", **options)
    assert [row["metric"] for row in rows] == ["CLIP consistency", "CLIP-T"] and rows[1]["n"] == 2
    assert sorted(asked) == ["a bright wall", "a dark wall"] and not any("CLIP-T:" in line for line in said)
    assert any("left out, without a caption: 1 videos (the first: 1.mp4)" in line for line in said)
    (tmp_path / "told" / "captions.csv").write_text("name,prompt\n0.mp4,a dark wall\n")
    with pytest.raises(
        ValueError, match=r"^'.*captions.csv': no column 'video' .*; its columns are video and caption$"
    ):
        scoring.score("clip", tokenizer="bpe", **options)


def test_lists_and_frame_rate_reach_the_sources(run, mean_colour, monkeypatch, tmp_path):
    real, given = scoring.sources.open_source, []

    def opened(spec, **options):
        given.append((spec, options))
        return real(spec)

    monkeypatch.setattr(scoring.sources, "open_source", opened)
    asked = dict(network=MEAN_COLOUR, videos="synthetic", real="synthetic:gravity", frames=2, size=(16, 16), count=4)
    scoring.score("fvd", lists=2, frame_rate=10.0, cache=tmp_path / "cache", out=tmp_path, **asked)
    assert given == [("synthetic", dict(frame_rate=10.0)), ("synthetic:gravity", dict(split=2, frame_rate=10.0))]
    with pytest.raises(ValueError, match=r"a run's own are data.split and data.frame_rate"):
        scoring.score("fvd", workdir=run, lists=2, network=MEAN_COLOUR)
    with pytest.raises(FileNotFoundError, match=r"vit_g_hybrid_pt_1200e_ssv2_ft.pth.*--network i3d"):
        scoring.score("fvd", workdir=run)


@pytest.mark.slow
def test_a_student_told_by_text(mean_colour, tmp_path):
    """It is told the captions of the real clips."""
    config = base.get_config("demo")
    config.update(dict(model=dict(name="cogvideox"), objective="v", text=dict(tokens=8)))
    config.update(dict(data=dict(source="synthetic", num_frames=2, height=16, width=16, stride=1)))
    workdir = random_workdir(config, tmp_path / "told")
    clips, real = generated.of_run(workdir, **OPTIONS)
    assert clips.captions == real.captions and len(set(clips.captions)) == 2
    assert clips.about["prompts"]["text.encoder"] == "hash"
    assert clips.about["told"] and clips.read(range(10)).std() > 1
    asked = dict(network=MEAN_COLOUR, cache=tmp_path / "cache", **OPTIONS)
    assert np.isfinite(scoring.score("fvd", workdir=workdir, **asked)[0]["value"])


@pytest.mark.slow
def test_killed_and_run_again(run, tmp_path):
    """The command line, killed while it generates: the second run's row is that of a run that nobody killed."""
    flags = ["--network=efficientnet_lite0", "--count=68", "--sample_steps=3", "--at_once=2"]
    command = [sys.executable, "-m", "jaxalign.evaluate", "fvd", f"--workdir={run}", *flags]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    folder = run / "generated" / "step1-ema-euler-3-n68-seed0"
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "part_00000").is_dir() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert (folder / "part_00000").is_dir() and not (folder / "part_00001").is_dir()
    kept = run / "evaluate_fvd_efficientnet_lite0.json"
    kept.unlink(missing_ok=True)
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "64 of 68 videos are in" in said and "| 68 | 68 |" in said
    row = json.loads(kept.read_text())
    assert "not FVD" in row[0]["metric"]
    folder.rename(run / "generated" / "aside")
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert json.loads(kept.read_text()) == row
