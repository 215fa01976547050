"""Parts on disk, statistics of the real clips, rows: going on, refusing, and saying what differs from the paper."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.clips import Clip
from jaxalign.data.sources import open_source
from jaxalign.metrics import parts, protocol
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
    path = tmp_path / "covariance.npy"
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
    assert row["protocol"] == "Align4Gen but for n 24 (2048), frames 2 (16), size 8×8 (256×256), stride 1 (3)"
    assert not any("warning" in line for line in said)
    few = clips(4)
    protocol.frechet(few, few, network(), per_frame=False, cache=tmp_path / "few", at_once=4, say=said.append)
    assert any("warning: 4 features of width 6" in line and "at least 7" in line for line in said)


def test_the_papers_protocol_is_called_by_its_name():
    differs = dict(protocol.PAPER)
    whole = dataclasses.replace(clips(), differs=differs)
    assert protocol._ending(whole, whole, network())["protocol"] == "Align4Gen"


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
