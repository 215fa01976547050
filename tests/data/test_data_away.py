"""A disk that is away for a while is waited for; a file that is broken is not."""

import errno
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxalign.data import frame_index, index, patience, pipeline, precomputed_source, readers, video
from jaxalign.data.clips import Clip, Item, Source
from jaxalign.data.faults import not_the_files
from jaxalign.data.pipeline import GIVE_UP_AFTER, batches
from jaxalign.data.sources import FileCache, folder
from jaxalign.data.video import UnreadableVideo
from jaxalign.training import interrupt

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
    monkeypatch.setattr(patience, "sleep", lambda seconds, stop=None: waits.append(seconds))
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


def test_a_part_of_a_disk_is_waited_for_once(made, slept, monkeypatch):
    """Else each of its files costs all the waits, and the watchdog ends the run at the first batches."""
    now = [1000.0]
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now[0]))
    data = made(lambda item: failed(f"{item}.mp4") if item % 4 == 0 else None)
    assert sum(int(data[step]["substituted"].sum()) for step in range(5)) == 10
    assert slept == list(patience.WAITS) and len(patience._known.given_up) == 1
    now[0] += patience.QUIET + 1
    data[5]
    assert slept == 2 * list(patience.WAITS)
    # What works now and then is away for good: it is waited for although others were not.
    with pytest.raises(OSError, match="not within 168 s"):
        made(lambda item: failed(f"{item}.mp4"))[0]
    assert slept == 3 * list(patience.WAITS)
    slept.clear()
    away = [failed(f"{k}.mp4") for k in range(GIVE_UP_AFTER + 2)]
    assert made(lambda item: away.pop() if away else None)[1]["substituted"].sum() == 1 and slept == [1]


def test_a_batch_waits_for_all_its_files_together(slept):
    """A disk that comes and goes: every file can be read in the end, after all the waits."""
    left, tries = patience.Patience(), iter(range(1000))

    def read():
        if next(tries) % 7 < 6:
            raise failed()
        return "read"

    assert [patience.patiently(read, left) for _ in range(3)] == ["read"] * 3  # 108 s each
    assert slept == 3 * [1, 2, 5, 10, 30, 60] and left.left == 336 - 324
    with pytest.raises(UnreadableVideo):
        patience.patiently(read, left)
    assert slept[18:] == [1, 2, 5] and not patience._known.given_up


def test_what_was_given_up_costs_nobody_else_the_wait(made, slept):
    """The first that could not be read was given up; the disk goes away for the next."""
    patience._known.given_up.add("3.mp4")
    away = [failed("4.mp4")]
    data = made(lambda item: failed("3.mp4") if item == 3 else away.pop() if item == 4 and away else None)

    def row(data, left):
        return pipeline._row(data.source, data.windows, Clip(**SIZE), 0, 0, 3, left)

    assert row(data, patience.Patience())["item"] == 4 and slept == [1]
    gone = made(lambda item: failed(f"{item}.mp4"))
    with pytest.raises(OSError, match="in a row cannot be read; the disk"):  # no word of seconds: none were waited
        row(gone, patience.Patience(left=0))
    patience._known.given_up.update(f"{k}.mp4" for k in range(40))
    with pytest.raises(OSError, match="in a row cannot be read, not within 168 s"):
        row(gone, patience.Patience())


@pytest.mark.parametrize("ends", ["closed", "hurried"])
def test_nothing_that_waits_keeps_a_process(made, monkeypatch, ends):
    """Threads end with their stream, not after minutes; a signal ends their waits, not those of later streams."""
    monkeypatch.setattr(patience, "_known", patience._Known())
    waits, asleep = patience.WAITS, threading.Event()
    monkeypatch.setattr(patience, "say_once", lambda text: asleep.set())
    before = threading.active_count()
    stream = made(lambda item: failed(f"{item}.mp4") if item % 4 == 0 else None).iterate()
    assert asleep.wait(10)
    began = time.monotonic()
    if ends == "hurried":
        patience.hurry()
        assert next(stream)["substituted"].sum() <= 8 and not patience._known.given_up
    stream.close()
    while threading.active_count() > before and time.monotonic() < began + 5:
        time.sleep(0.01)
    assert threading.active_count() <= before and time.monotonic() < began + sum(waits[:2])
    assert not patience.new_stop().is_set()


def test_a_signal_ends_the_waits():
    stop = patience.new_stop()
    with interrupt.Interrupts(lambda line: None):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)


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
    monkeypatch.setattr(frame_index, "disk_fault", lambda path: None)
    assert list(frame_index.demux(container, None)) == ["a packet"]
    monkeypatch.setattr(frame_index, "disk_fault", lambda path: OSError(errno.EIO, path))
    with pytest.raises(OSError, match=r"x\.mkv"):
        list(frame_index.demux(container, None))


def test_a_shard_that_was_away_is_read_and_nobody_is_told_to_remove_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "video-train-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for k in range(3):
        writer.write(np.full(4, k, np.int16).tobytes())
    writer.close()
    (tmp_path / f"{path.name}.json").write_text(json.dumps({"bytes": path.stat().st_size, "records": 3}))
    column = precomputed_source._Column(((str(path), 3),), (0, 3), "int16", (4,), np.arange(3))
    path.rename(tmp_path / "away")
    with pytest.raises(UnreadableVideo, match=r"array_record: record 2: cannot be read .*No such") as caught:
        precomputed_source._array(column, 2)
    assert isinstance(caught.value.__cause__, FileNotFoundError) and "remove" not in str(caught.value)
    assert caught.value.path == f"{path}: record 2"  # what is given up is this record, not its shard
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
