"""What a score leaves behind: rows of other questions stay, captions are those of the videos that are asked for."""

import json

import jax
import numpy as np
import pytest

from configs import base
from jaxalign.data import captions
from jaxalign.data.clips import Item, Source
from jaxalign.figures import video
from jaxalign.metrics import features, protocol
from jaxalign.training import config as config_lib
from jaxalign.training import generated, scoring


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """`scoring.score` of a folder; its values are not measured, they count the calls."""
    calls, mesh = [], generated.make_mesh(devices=jax.local_devices()[:1])

    def opened(name, weights=None, **_):
        return features.Network(name, "FVD", {"w": np.float32(len(weights))}, len, mesh, file=weights)

    def rows(word, clips, real, network, **_):
        calls.append(word)
        row = {"metric": network.title, "value": float(len(calls)), "of": clips.name, "real": real.name}
        return [row | protocol._ending(word, clips, real, network)]

    items = tuple(Item(f"{k}.mp4", 99, 25.0, 0, ("train", "held_out")[k % 2]) for k in range(12))
    monkeypatch.setattr(scoring.sources, "open_source", lambda spec, **_: Source(spec, items))
    monkeypatch.setattr(features, "open_network", opened)
    monkeypatch.setattr(scoring, "_check", lambda *_, **__: None)
    monkeypatch.setattr(scoring, "_rows", rows)
    asked = dict(videos="A", real="A", network="i3d", weights="i3d_torchscript.pt", count=4)
    asked |= dict(frames=2, size=(16, 16), out=tmp_path, say=lambda _: None)
    return lambda **options: scoring.score("fvd", **(asked | options))


def test_rows_of_other_questions_stay(scored, tmp_path):
    path = tmp_path / "evaluate_fvd_i3d.json"
    older = [{"metric": "FVD", "value": 7.0, "of": "A", "seed": 0}]  # without a word about the weights
    path.write_text(json.dumps(older))
    others = [
        {},
        dict(videos="B"),
        dict(real="B"),
        dict(seed=1),
        dict(split="train"),
        dict(count=3),
        dict(weights="rgb_imagenet.pt"),
        dict(stride=1),
        dict(videos_stride=2),
        dict(lists=2),
    ]
    found = [scored(**options)[0] for options in others]
    assert json.loads(path.read_text()) == older + found and len({row["value"] for row in found}) == len(others)
    again = scored(seed=1)  # the same question: its row alone is replaced
    assert json.loads(path.read_text()) == older + [row for row in found if row["seed"] != 1] + again
    assert again[0]["value"] == len(others) + 1


def test_a_file_that_holds_no_rows_is_put_aside(tmp_path):
    path, said = tmp_path / "evaluate_fvd_i3d.json", []
    for text in ("{", '{"value": 3}', "[1]"):
        path.write_text(text)
        scoring.keep(path, [{"metric": "FVD", "value": 1.0}], say=said.append)
        assert json.loads(path.read_text()) == [{"metric": "FVD", "value": 1.0}]
        assert (tmp_path / "evaluate_fvd_i3d.json.old").read_text() == text
        assert "is now evaluate_fvd_i3d.json.old" in said[-2]


@pytest.fixture
def told_by_text(tmp_path):
    """The workdir of a run, without a checkpoint, that has a CSV of its own videos' captions."""
    config = base.get_config("demo")
    config.update(dict(model=dict(name="cogvideox"), objective="v", text=dict(tokens=8)))
    config.update(dict(data=dict(source="synthetic", captions=str(tmp_path / "own.csv"), num_frames=2)))
    config.update(dict(data=dict(height=16, width=16, stride=1)))
    (tmp_path / "own.csv").write_text("video,caption\nelsewhere.mp4,a wall\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config_lib.resolve(config).to_dict()))
    return tmp_path / "run"


def test_captions_of_other_real_clips(told_by_text, tmp_path, monkeypatch):
    """Those in their folder; where there are none, the run's own CSV, and an error says what helps."""
    real = tmp_path / "test"
    video.write_mp4(real / "a.mp4", np.zeros((2, 32, 32, 3), np.uint8), 8)
    helps = r"; put captions.csv \(columns video, caption\) into the folder of --real$"
    options = dict(real=str(real), count=1)
    with pytest.raises(ValueError, match=r"own.csv': 1 of its 1 rows name videos that are not in .*" + helps):
        generated.of_run(told_by_text, **options)
    (tmp_path / "own.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"own.csv': no such file" + helps):
        generated.of_run(told_by_text, **options)
    (real / captions.FILE).write_text("file,caption\na.mp4,a dark wall\n")
    with pytest.raises(ValueError, match=r"no column 'video' .it has file, caption." + helps):
        generated.of_run(told_by_text, **options)
    (real / captions.FILE).write_text("video,caption\na.mp4,a dark wall\na.mp4,a wall\n")
    with pytest.raises(ValueError, match=r"named twice .a.mp4.; mend the file$"):
        generated.of_run(told_by_text, **options)
    (real / captions.FILE).write_text("video,caption\na.mp4,a dark wall\n")
    seen = []
    monkeypatch.setattr(generated, "of_source", lambda source, *_, **__: seen.append(source.captions) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generated.of_run(told_by_text, **options)
    assert seen == [("a dark wall",)]
    # The run's own clips are told as it was trained, also where they have another CSV beside them.
    config = json.loads((told_by_text / "config.json").read_text())
    config["data"]["source"] = str(real)
    (told_by_text / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"own.csv': no such file"):
        generated.of_run(told_by_text, **options)
