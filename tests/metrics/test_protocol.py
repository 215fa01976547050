"""Parts on disk, statistics of the real clips, rows: going on, refusing, and saying what differs from the paper."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.clips import Clip, Item, Source
from jaxalign.data.containers import UnreadableVideo
from jaxalign.data.frame_folders import FrameReader
from jaxalign.data.sources import FileReader, open_source
from jaxalign.interop import sealed
from jaxalign.metrics import features, parts, protocol
from jaxalign.metrics.features import Network
from jaxalign.metrics.frechet import frechet_distance, moments

CLIP = Clip(2, 8, 8)


def network(name="fake", factor=1.0):
    """Mean colour and its change over time, of clips or of every frame."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])

    def ask(module, video):
        return (video.astype(jnp.float32).mean((2, 3)) * module["factor"]).reshape(len(video), -1)

    return Network(name, f"Fréchet distance ({name})", {"factor": jnp.float32(factor)}, jax.jit(ask), mesh)


def clips(count=24, seed=0, split="held_out", clip=CLIP):
    found = protocol.of_source(open_source("synthetic"), clip, split=split, count=count, seed=seed)
    return dataclasses.replace(found, part=8)


def quiet(_):
    pass


def test_a_part_is_made_once_and_again_when_damaged(tmp_path):
    said, made = [], []

    def make():
        made.append(1)
        return {"x": np.arange(6.0)}

    for _ in range(2):
        assert parts.part(tmp_path, 3, make, say=said.append)["x"].tolist() == list(range(6))
    assert len(made) == 1 and parts.there(tmp_path, range(5)) == 1
    path = tmp_path / "part_00003" / "x.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert parts.part(tmp_path, 3, make, say=said.append)["x"].tolist() == list(range(6))
    assert len(made) == 2 and "damaged and made again: x.npy has changed bytes" in said[0]


def test_parts_cover_all():
    assert parts.spans(10, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert protocol.part_size(Clip(16, 256, 256), 8) == 64
    assert protocol.part_size(Clip(49, 480, 720), 4) == 4  # 51 MB a clip
    assert protocol.part_size(Clip(49, 480, 720), 8) == 8


def test_statistics_are_those_of_all_clips_and_kept(tmp_path):
    said = []
    found = protocol.statistics(clips(), network(), "clips", cache=tmp_path, at_once=4, say=said.append)
    videos = clips().read(range(24))
    whole = moments(np.asarray(network().ask({"factor": jnp.float32(1)}, videos)))
    assert found.count == 24 and videos.shape == (24, 2, 8, 8, 3)
    np.testing.assert_allclose(found.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    again = protocol.statistics(clips(), network(), "clips", cache=tmp_path, at_once=4, say=said.append)
    np.testing.assert_array_equal(again.covariance, found.covariance)
    assert f"from {tmp_path}" in said[-1] and not list(tmp_path.glob("part_*"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dict(clips=clips(seed=1)), "clips.seed = 0 there and 1 here"),
        (dict(clips=clips(clip=Clip(2, 8, 8, stride=2))), "clips.stride = 1 there and 2 here"),
        (dict(clips=clips(split="train")), "clips.split = 'held_out' there and 'train' here"),
        (dict(network=network("another")), "network = 'fake' there and 'another' here"),
        (dict(network=network(factor=2.0)), "weights = '[0-9a-f]+' there and '[0-9a-f]+' here"),
    ],
)
def test_statistics_of_another_protocol_are_refused(tmp_path, other, said):
    asked = dict(clips=clips(), network=network(), kind="clips", cache=tmp_path, at_once=4, say=quiet)
    protocol.statistics(**asked)
    with pytest.raises(ValueError, match=rf"another protocol: {said}.*give another --cache"):
        protocol.statistics(**(asked | other))


def test_a_flipped_bit_is_noticed(tmp_path):
    asked = dict(clips=clips(), network=network(), kind="clips", cache=tmp_path, at_once=4, say=quiet)
    protocol.statistics(**asked)
    path = tmp_path / parts.MOMENTS / "covariance.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"damaged .covariance.npy has changed bytes"):
        protocol.statistics(**asked)


def test_interrupted_statistics_go_on_and_are_the_same(tmp_path):
    asked = dict(network=network(), kind="clips", at_once=4, say=quiet)
    expected = protocol.statistics(clips(), cache=tmp_path / "whole", **asked)
    source, read = clips(), []

    def until(stop):
        def reader(rows):
            if rows.start >= stop:
                raise KeyboardInterrupt
            read.append(rows.start)
            return source.read(rows)

        return dataclasses.replace(source, read=reader)

    with pytest.raises(KeyboardInterrupt):
        protocol.statistics(until(16), cache=tmp_path / "cut", **asked)
    found = protocol.statistics(until(99), cache=tmp_path / "cut", **asked)
    assert read == [0, 8, 16]
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.covariance, expected.covariance)


def test_a_row_says_what_is_not_the_papers(tmp_path):
    said = []
    real, train = clips(), clips(split="train")
    row = protocol.frechet(train, real, network(), per_frame=False, cache=tmp_path, at_once=4, say=said.append)
    expected = frechet_distance(*(moments(np.asarray(network().ask({"factor": 1.0}, c.read(range(24)))))
                                  for c in (train, real)))  # fmt: skip
    assert row["value"] == pytest.approx(expected, rel=1e-9) and row["value"] > 0
    assert row["n"] == row["n real"] == 24
    differs = "n 24 (2048), frames 2 (16), size 8×8 (256×256), stride 1 (3), network fake (videomaev2_g)"
    assert row["protocol"] == f"Align4Gen but for {differs}"
    assert not any("warning" in line for line in said)
    few = clips(4)
    protocol.frechet(few, few, network(), per_frame=False, cache=tmp_path / "few", at_once=4, say=said.append)
    assert any("warning: 4 features of width 6" in line and "at least 7" in line for line in said)


def test_the_papers_protocol_is_called_by_its_name():
    differs = dict(protocol.PAPER)
    whole = dataclasses.replace(clips(), differs=differs)
    for score, name in protocol.NETWORKS.items():
        assert protocol._ending(score, whole, whole, network(name))["protocol"] == "Align4Gen"
    assert (
        protocol._ending("fvd", whole, whole, network("i3d"))["protocol"]
        == "Align4Gen but for network i3d (videomaev2_g)"
    )
    many = clips(2 * len(open_source("synthetic").items))
    assert many.differs["videos"] == len(set(many.items)) < many.count and "videos" not in clips().differs
    few = dataclasses.replace(whole, differs=differs | {"videos": 1900})
    assert (
        protocol._ending("fid", few, None, network("inception"))["protocol"] == "Align4Gen but for videos 1900 (2048)"
    )


def test_a_row_says_which_weights_made_it():
    whole = dataclasses.replace(clips(), differs=dict(protocol.PAPER))
    plain, digest = network(), features.digest({"factor": jnp.float32(1)})
    papers, other = "vit_g_hybrid_pt_1200e_ssv2_ft.pth", "vit_g_hybrid_pt_1200e_k710_ft.pth"
    i3d = "network i3d (videomaev2_g)"
    for score, name, file, said in (
        ("fvd", "videomaev2_g", papers, ""),
        ("fvd", "videomaev2_g", other, f" but for weights {other} ({papers})"),
        ("fvd", "i3d", "i3d_pretrained_400.pt", f" but for {i3d}"),
        ("fvd", "i3d", "rgb_imagenet.pt", f" but for {i3d}, weights rgb_imagenet.pt (i3d_torchscript.pt)"),
        ("fid", "inception", "weights-inception-2015-12-05-6726825d.pth", ""),
    ):
        row = protocol._ending(score, whole, whole, dataclasses.replace(plain, name=name, file=file))
        assert row["protocol"] == f"Align4Gen{said}"
        assert (row["network file"], row["network digest"]) == (file, digest)
    changed = dataclasses.replace(plain, module={"factor": jnp.float32(2)})
    assert protocol._ending("fvd", whole, whole, changed)["network digest"] != digest


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"it has files but no about.json"):
        parts.claim(tmp_path, {}, what="statistics", remedy="give another --cache")
    (tmp_path / parts.ABOUT).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        parts.claim(tmp_path, {}, what="statistics", remedy="give another --cache")
    (tmp_path / parts.ABOUT).write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="version = 0 there and 1 here"):
        parts.claim(tmp_path, {}, what="statistics", remedy="give another --cache")


# ---- several calls in one folder -----------------------------------------------------------------------------------


def test_a_part_that_another_call_made_meanwhile_is_taken(tmp_path):
    def slow():
        parts.part(tmp_path, 0, lambda: {"x": np.zeros(3)})
        return {"x": np.ones(3)}

    assert parts.part(tmp_path, 0, slow)["x"].tolist() == [0, 0, 0]
    assert sealed.find_damage(tmp_path / "part_00000") is None and len(list(tmp_path.iterdir())) == 1


def test_a_part_that_goes_while_it_is_looked_at_is_made_again(tmp_path, monkeypatch):
    parts.part(tmp_path, 0, lambda: {"x": np.zeros(3)})
    with monkeypatch.context() as patched:
        patched.setattr(sealed, "find_damage", lambda path: shutil.rmtree(path))
        assert parts.part(tmp_path, 0, lambda: {"x": np.ones(3)})["x"].tolist() == [1, 1, 1]


def test_what_another_call_is_writing_hinders_nobody(tmp_path):
    (tmp_path / ".about.json.17.tmp").write_text("{")
    (tmp_path / ".part_00000.17.tmp").mkdir()
    for _ in range(2):
        parts.claim(tmp_path, {"n": 1}, what="statistics", remedy="")


def test_statistics_survive_a_kill_at_their_end(tmp_path, monkeypatch):
    """Parts go only when the statistics are whole; a second call that ends later finds them there."""
    given, about = moments(np.random.default_rng(0).normal(size=(5, 3))), {"n": 5}
    parts.claim(tmp_path, about, what="statistics", remedy="")
    parts.part(tmp_path, 0, lambda: {"features": np.zeros(3)})

    def killed(path, **_):
        if path.name.startswith("part_"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.write_moments(tmp_path, given, about)
    np.testing.assert_array_equal(parts.read_moments(tmp_path, about).covariance, given.covariance)
    parts.write_moments(tmp_path, given, about)
    assert {path.name for path in tmp_path.iterdir()} == {parts.ABOUT, parts.MOMENTS}


def test_older_folders_are_read(tmp_path):
    given, about = moments(np.random.default_rng(0).normal(size=(5, 3))), {"clips": {"n": 5}}
    parts.claim(tmp_path, about, what="statistics", remedy="")
    for name in ("mean", "covariance"):
        np.save(tmp_path / f"{name}.npy", getattr(given, name))
    (tmp_path / "count.json").write_text("5")
    sealed.write_manifest(tmp_path)
    found = parts.read_moments(tmp_path, about)
    assert found.count == 5
    np.testing.assert_array_equal(found.mean, given.mean)
    now = {"clips": {"n": 5, "latents": {"codec.name": "pixels"}}}  # which videos of before do not say
    parts.check(tmp_path, now, what="features", remedy="")
    with pytest.raises(ValueError, match=r"clips.files = None there and 'a' here"):
        parts.check(tmp_path, {"clips": {"n": 5, "files": "a"}}, what="features", remedy="")
    parts.claim(tmp_path / "new", now, what="features", remedy="")
    with pytest.raises(ValueError, match=r"clips.latents.codec.name = 'pixels' there and 'sd_kl' here"):
        parts.check(tmp_path / "new", {"clips": {"n": 5, "latents": {"codec.name": "sd_kl"}}}, what="", remedy="")


# ---- which clips ---------------------------------------------------------------------------------------------------


def of_files(root, reader):
    """What decides the clips of two videos named relative to the working directory."""
    items = tuple(Item(name, 9, 25.0, 0, "held_out") for name in ("a", "b"))
    source = Source(str(root), items, read=reader(tuple(os.path.join(root, item.name) for item in items)))
    return protocol.of_source(source, CLIP, split="held_out", count=2).about


@pytest.mark.parametrize("frames", [False, True])
def test_files_are_told_apart_by_where_they_lie_and_by_their_stamps(tmp_path, monkeypatch, frames):
    reader = FrameReader if frames else lambda paths: FileReader(paths, ())
    for place in ("one", "other"):
        for name in ("a", "b"):
            path = tmp_path / place / "real" / name / "1.png" if frames else tmp_path / place / "real" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            os.utime(path, ns=(0, 0))
            os.utime(path.parent, ns=(0, 0))
    monkeypatch.chdir(tmp_path / "one")
    one = of_files("real", reader)
    assert one == of_files(tmp_path / "one" / "real", reader) and one["source"] == str(tmp_path / "one" / "real")
    monkeypatch.chdir(tmp_path / "other")
    other = of_files("real", reader)
    assert one["files"] == other["files"] and one != other
    os.utime(path, ns=(0, 1))  # as after an encoder that writes over it
    assert of_files("real", reader)["files"] != other["files"]


def test_clips_that_cannot_be_read_are_counted_and_not_sealed(tmp_path):
    """Only the parts with them are made again, and the statistics are kept when all can be read."""
    broken, said, asked = {"3"}, [], []

    def read(item, start, stop, step, cover):
        asked.append(item)
        if str(item) in broken:
            raise UnreadableVideo(str(item), "cut short")
        return np.full((len(range(start, stop, step)), *cover, 3), item, np.uint8), np.zeros(
            (stop - start, 4, 4), np.uint8
        )

    items = tuple(Item(str(k), 2, 25.0, 0, "held_out") for k in range(8))
    options = dict(cache=tmp_path, at_once=2, say=said.append)

    def real():
        found = protocol.of_source(Source("eight", items, read=read), CLIP, split="held_out", count=8)
        return dataclasses.replace(found, part=2)

    row = protocol.frechet(clips(8), real(), network(), per_frame=False, **options)
    assert row["replaced real"] == 1 and "replaced" not in row
    assert any("warning: 1 of 8 clips of eight" in line and "(the first: 3)" in line for line in said)
    assert parts.there(tmp_path, range(4)) == 3 and not (tmp_path / parts.MOMENTS).exists()
    broken.clear(), asked.clear()
    row = protocol.frechet(clips(8), real(), network(), per_frame=False, **options)
    assert len(asked) == 2 and (tmp_path / parts.MOMENTS).exists() and "replaced real" not in row


def test_the_sheet_of_all_videos_is_none_of_them():
    """As older folders have it; an all.mp4 among other videos is a video."""
    names = ("all.mp4", "0000.mp4", "0001.mp4", "other/all.mp4", "other/clip.mp4")
    source = Source("out", tuple(Item(name, 9, 8.0, 0, "train") for name in names))
    found = protocol.of_videos(source, CLIP, count=9)
    assert found.count == 4 and sorted(names[k] for k in found.items) == sorted(names[1:])
    assert found.notes == ("left out, they show the others beside each other: 1 videos (the first: all.mp4)",)
    told = dataclasses.replace(source, captions=("", "a cat", "", "a dog", "a hen"))
    assert [note.partition(":")[0] for note in protocol.of_videos(told, CLIP, count=9).notes] == [
        "left out, without a caption",
        "left out, they show the others beside each other",
    ]


def test_features_say_their_precision_where_it_was_another_before():
    precisions = [protocol.described(clips(), network(n), "clips", at_once=4).get("precision") for n in ("i3d", "clip")]
    assert precisions == [None, "fp32"]


def test_what_the_network_gives_is_known_without_a_clip():
    assert protocol.outputs(clips(), network(), at_once=4) == (24, 6)

    def refuse(module, video):
        raise ValueError("fake: a clip has 16 frames")

    asked = dataclasses.replace(network(), ask=jax.jit(refuse))
    with pytest.raises(
        ValueError, match=r"--network fake does not take clips of 2 frames of 8×8 .*: fake: a clip has 16"
    ):
        protocol.outputs(clips(), asked, at_once=4)


def test_the_time_left_counts_from_the_start_of_the_work(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(protocol.time, "monotonic", lambda: now[0])
    pace = protocol.Pace(100, "made", said.append)
    for seconds in (3600, 60, 60):  # an hour of other work before
        now[0] += seconds
        pace.start()
        if seconds == 60:
            pace.did(10, pace.new + 10)
    assert said == ["made: 10/100, about 9 min left", "made: 20/100, about 8 min left"]
