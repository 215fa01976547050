"""A disk that is away for a while is waited for; a file that is broken is not."""

import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxalign.data import index, patience, precomputed_source, readers, video
from jaxalign.data.clips import Item, Source
from jaxalign.data.faults import not_the_files
from jaxalign.data.pipeline import GIVE_UP_AFTER, batches
from jaxalign.data.sources import FileCache, folder
from jaxalign.data.video import UnreadableVideo

SIZE = {"num_frames": 4, "height": 8, "width": 8}


def failed(path="x.mp4", number=errno.EIO):
    error = UnreadableVideo(path, os.strerror(number))
    error.__cause__ = OSError(number, os.strerror(number))
    return error


@pytest.fixture
def slept(monkeypatch):
    """The seconds that were waited, at once; nothing is known from other tests."""
    waits = []
    monkeypatch.setattr(patience, "_known", patience._Known())
    monkeypatch.setattr(patience, "sleep", waits.append)
    monkeypatch.setattr(index, "sleep", waits.append)
    return waits


@pytest.fixture
def made():
    """made(fails) is a source of 40 videos whose reads fail with what fails(item) gives."""

    def make(fails=lambda item: None):
        def read(item, start, stop, step, cover):
            if error := fails(item):
                raise error
            return np.full((stop - start, 8, 8, 3), item, np.uint8), np.zeros((stop - start, 32, 32), np.uint8)

        items = tuple(Item(f"{k}.mp4", 9, 25.0, 0, "train") for k in range(40))
        return batches(Source("made", items, read=read), seed=0, batch_size=8, **SIZE)

    return make


def test_a_disk_that_comes_back_changes_no_batch(made, slept, capsys):
    away = [failed(f"{k}.mp4") for k in range(3)]
    batch = made(lambda item: away.pop() if away else None)[0]
    whole = made()[0]
    for name in whole:
        np.testing.assert_array_equal(batch[name], whole[name])
    assert slept == [1, 2, 5]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "warning: 2.mp4: Input/output error; it is read again for up to 168 s" in said


def test_a_disk_that_stays_away_ends_the_run_and_says_so(made, slept):
    reads = []
    with pytest.raises(OSError, match=r"16 videos .* not within 168 s; the disk or this machine fails: .*mp4: Input"):
        made(lambda item: reads.append(item) or failed(f"{item}.mp4"))[0]
    assert slept == list(patience.WAITS) and len(set(reads)) == GIVE_UP_AFTER


def test_one_file_in_a_broken_place_is_replaced_and_waited_for_once(made, slept):
    data = made(lambda item: failed("3.mp4") if item == 3 else None)
    batches_of = [data[step] for step in range(10)]  # two epochs
    assert sum(int(batch["substituted"].sum()) for batch in batches_of) == 2
    assert slept == list(patience.WAITS)
    slept.clear()
    made(lambda item: UnreadableVideo("4.mp4", "damaged") if item == 4 else None)[0]
    assert not slept


def test_what_stays_in_memory_is_not_what_failed_for_the_disk(monkeypatch):
    from jaxalign.data import sources

    monkeypatch.setattr(sources, "index_frames", lambda path: (_ for _ in ()).throw(failed()))
    cache = FileCache()
    with pytest.raises(UnreadableVideo):
        cache.whole("x.mp4", (8, 8))
    assert not cache.files


def test_packets_end_with_damage_and_not_with_a_disk(monkeypatch):
    def demux(_):
        yield "a packet"
        raise OSError(errno.EIO, "Input/output error")

    container = SimpleNamespace(name="x.mkv", demux=demux)
    monkeypatch.setattr(video, "disk_fault", lambda path: None)
    assert list(video._demux(container, None)) == ["a packet"]
    monkeypatch.setattr(video, "disk_fault", lambda path: OSError(errno.EIO, path))
    with pytest.raises(OSError, match=r"x\.mkv"):
        list(video._demux(container, None))


def test_a_shard_that_was_away_is_read_and_nobody_is_told_to_remove_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "video-train-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for k in range(3):
        writer.write(np.full(4, k, np.int16).tobytes())
    writer.close()
    (tmp_path / f"{path.name}.json").write_text(json.dumps({"bytes": path.stat().st_size, "records": 3}))
    column = precomputed_source._Column(((str(path), 3),), (0, 3), "int16", (4,), np.arange(3))
    path.rename(tmp_path / "away")
    with pytest.raises(UnreadableVideo, match=r"record 2 cannot be read .*No such file") as caught:
        precomputed_source._array(column, 2)
    assert isinstance(caught.value.__cause__, FileNotFoundError) and "remove" not in str(caught.value)
    (tmp_path / "away").rename(path)
    assert precomputed_source._array(column, 2).tolist() == [2] * 4  # a reader that failed would fail for ever
    assert "remove" not in capsys.readouterr().err
    refused = RuntimeError("pread() failed: Input/output error; reading x; at byte 9")
    with monkeypatch.context() as patch:
        patch.setattr(readers, "ArrayRecordDataSource", lambda shards: (_ for _ in ()).throw(refused))
        readers.reader.cache_clear()
        with pytest.raises(UnreadableVideo, match="cannot be read") as caught:
            precomputed_source._array(column, 0)
    assert not_the_files(caught.value)
    path.write_bytes(path.read_bytes()[:70])
    readers.reader.cache_clear()
    with pytest.raises(UnreadableVideo, match=r"damaged .* remove this file"):
        precomputed_source._array(column, 1)
    assert "remove this file" in capsys.readouterr().err


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """headers(probe, count) is a folder of so many files whose headers are what probe(path) gives."""

    def make(probe, count=9):
        (tmp_path / "v").mkdir(exist_ok=True)
        for k in range(count):
            (tmp_path / "v" / f"{k}.mp4").write_bytes(b"x")
        monkeypatch.setattr(index, "probe", probe)
        monkeypatch.setattr(index, "REMEMBER_FROM", 3)
        monkeypatch.setattr(index, "AT_ONCE", 4)
        return tmp_path / "v"

    return make


INFO = video.VideoInfo(9, 25.0, 64, 48)


def test_headers_that_a_disk_kept_back_are_asked_for_again(headers, slept):
    away = {"3.mp4", "7.mp4"}

    def probe(path):
        if os.path.basename(path) in away:
            away.discard(os.path.basename(path))
            raise failed(path)
        return INFO

    root = headers(probe)
    assert len(folder(str(root)).items) == 9 and slept == [1]
    gone = str(root / "5.mp4")
    index.cache_file(root).unlink()

    def still(path):
        if path == gone:
            raise failed(path)
        return INFO

    root = headers(still)
    source = folder(str(root))
    assert source.skipped == (("5.mp4", "Input/output error"),) and slept == [1, 1, 2, 5, 10, 30]
    assert gone not in json.loads(index.cache_file(root).read_text())["files"]


def test_headers_are_kept_and_counted_while_it_takes_long(headers, monkeypatch, capsys):
    kept = []

    def probe(path):
        cache = index.cache_file(root)
        kept.append(len(json.loads(cache.read_text())["files"]) if cache.exists() else 0)
        return INFO

    root = headers(probe)
    monkeypatch.setattr(index, "KEPT_EVERY", 0)
    monkeypatch.setattr(index, "KEPT_COST", 0)
    monkeypatch.setattr(index, "SAID_AFTER", 0)
    folder(str(root))
    assert sorted(kept) == [0] * 4 + [4] * 4 + [8]  # a killed process loses what came after the last look
    assert f"data {root}: 4 of 9 headers read" in capsys.readouterr().err


def test_a_full_disk_keeps_no_half_of_a_cache(headers, monkeypatch):
    root = headers(lambda path: INFO)

    def full(tree, file):
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index.json, "dump", full)
    assert len(folder(str(root)).items) == 9
    assert not list(index.cache_file(root).parent.iterdir())
