"""The global batch is one thing: whatever the hosts, the workers, the place where a run resumes, or the bad
files."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from jaxalign.data import pipeline
from jaxalign.data.clips import Clip, Item, windows
from jaxalign.data.pipeline import GIVE_UP_AFTER, batches, held_out
from jaxalign.data.sources import FileCache, demo, folder
from jaxalign.data.video import UnreadableVideo

SIZE = {"num_frames": 4, "height": 24, "width": 24}


def _same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture
def source(tmp_path, numbered):
    for k, name in enumerate(("A/a", "A/b", "B/c", "B/d", "C/e")):
        numbered(tmp_path / "v" / f"{name}.mp4", frames=30, first=40 * k)
    return folder(str(tmp_path / "v"))


def test_what_a_batch_is(source):
    data = batches(source, seed=0, batch_size=8, **SIZE)
    batch = data[0]
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "video": ((8, 4, 24, 24, 3), "uint8"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
        "substituted": ((8,), "bool"),
        "item": ((8,), "int64"),
    }
    assert not batch["substituted"].any()
    names = data.names(batch["index"])
    assert [source.classes[label] for label in batch["label"]] == [name[0] for name in names]


def test_every_epoch_has_all_windows_in_its_own_order(source):
    data = batches(source, seed=0, batch_size=5, **SIZE)
    epochs = [data[step]["index"].tolist() for step in range(6)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2
    other = batches(source, seed=1, batch_size=5, **SIZE)
    assert [other[step]["index"].tolist() for step in range(5)] != epochs[1:6]  # not seed 0 one epoch on
    of_one = {data[step]["video"][data[step]["index"] == 0].tobytes() for step in range(30)}
    assert len(of_one) > 8  # every epoch draws its own offset, one of 21


def test_hosts_share_the_global_batch_in_contiguous_rows(source):
    settings = dict(seed=3, batch_size=4, hflip=True, random_crop=True, **SIZE)
    whole = batches(source, **settings)
    for hosts in (2, 4):
        parts = [batches(source, process_index=p, process_count=hosts, **settings) for p in range(hosts)]
        for step in (0, 5):
            rows = [part[step] for part in parts]
            _same(whole[step], {name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    with pytest.raises(ValueError, match="multiple of 3"):
        batches(source, process_count=3, **settings)


def test_hosts_decode_their_own_rows_only(source):
    reads, read = [], source.read
    object.__setattr__(source, "read", lambda item, *rest: reads.append(item) or read(item, *rest))
    data = batches(source, seed=0, batch_size=4, process_index=1, process_count=4, **SIZE)
    data[0]
    assert len(reads) == 1


def test_resuming_is_slicing(source):
    data = batches(source, seed=0, batch_size=4, **SIZE)
    iterator = data.iterate(3)
    for step in range(3, 7):
        _same(next(iterator), data[step])
    iterator.close()


def test_workers_change_nothing_and_say_what_ended_them(source):
    """Real processes, in this test only."""
    settings = dict(seed=0, batch_size=4, hflip=True, **SIZE)
    alone = batches(source, **settings)
    started, workers_of = [], []
    try:
        for workers in (1, 2):
            others = set(multiprocessing.active_children())
            started.append(batches(source, workers=workers, **settings).iterate(2))
            _same(next(started[-1]), alone[2])
            workers_of.append(set(multiprocessing.active_children()) - others)
            assert len(workers_of[-1]) == workers
        for step in range(3, 7):
            for iterator in started:
                _same(next(iterator), alone[step])
        ends = ((signal.SIGBUS, "no room left in /dev/shm.*--shm-size"), (signal.SIGKILL, "memory runs out"))
        for iterator, children, (number, said) in zip(started, workers_of, ends, strict=True):
            os.kill(children.pop().pid, number)
            with pytest.raises(OSError, match=f"data.workers: .*{said}"):  # behind the batches that were ready
                for _ in range(20):
                    next(iterator)
    finally:
        for iterator in started:
            iterator.close()


def test_an_unreadable_clip_is_replaced_by_a_fixed_other_one(source):
    read = source.read

    def fails(item, *rest):
        if item in (1, 2):
            raise UnreadableVideo(source.items[item].name, "lost")
        return read(item, *rest)

    whole = batches(source, seed=0, batch_size=5, **SIZE)[0]
    object.__setattr__(source, "read", fails)
    data = batches(source, seed=0, batch_size=5, **SIZE)
    batch = data[0]
    # the place keeps its own index: nothing is dropped
    np.testing.assert_array_equal(batch["index"], whole["index"])
    np.testing.assert_array_equal(batch["substituted"], np.isin(batch["index"], (1, 2)))
    assert sorted(np.array(data.names(batch["index"]))[batch["substituted"]]) == ["A/b.mp4", "B/c.mp4"]
    good = ~batch["substituted"]
    np.testing.assert_array_equal(batch["video"][good], whole["video"][good])
    assert (batch["label"][~good] == 1).all()  # both are replaced by B/d.mp4, the next that can be read
    parts = [batches(source, seed=0, batch_size=5, process_index=p, process_count=5, **SIZE)[0] for p in range(5)]
    _same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


def test_files_that_vanish_while_training(tmp_path, numbered):
    for k in range(3):
        numbered(tmp_path / "v" / f"{k}.mp4", frames=30, first=40 * k)
    source = folder(str(tmp_path / "v"))
    object.__setattr__(source.read.cache, "megabytes", 0)  # nothing is kept in memory
    data = batches(source, seed=0, batch_size=3, **SIZE)
    (tmp_path / "v" / "1.mp4").unlink()
    assert data[0]["substituted"].sum() == 1
    for name in ("0.mp4", "2.mp4"):
        (tmp_path / "v" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 videos in a row cannot be read; the first is .*\.mp4"):
        data[0]


def test_a_lost_disk_is_no_substitute(source):
    calls = []

    def fails(item, *rest):
        calls.append(item)
        raise UnreadableVideo(f"{item}", "lost")

    items = tuple(source.items[0] for _ in range(100))
    object.__setattr__(source, "items", items)
    object.__setattr__(source, "read", fails)
    with pytest.raises(ValueError, match=f"{GIVE_UP_AFTER} videos in a row"):
        batches(source, seed=0, batch_size=1, **SIZE)[0]
    assert len(calls) == GIVE_UP_AFTER


def test_nothing_long_enough(source):
    with pytest.raises(ValueError, match=r"num_frames=31 .* has 30\); lower data.num_frames"):
        batches(source, seed=0, batch_size=1, num_frames=31, height=24, width=24)
    with pytest.raises(ValueError, match="5 are for split 'held_out' and have at most 4 frames there, not num_fr"):
        held_out(source, 2, num_frames=8, height=24, width=24)


def test_a_split_without_a_usable_video_says_what_helps(source):
    def with_one_held_out(frames):
        items = [dataclasses.replace(item, split="train") for item in source.items[1:]]
        return dataclasses.replace(source, items=(*items, Item("short.mp4", frames, 25.0, 0, "held_out")))

    with pytest.raises(ValueError, match=r"1 are for split 'held_out' and have at most 3 .* into a folder named test"):
        held_out(with_one_held_out(3), 8, **SIZE)
    without = dataclasses.replace(source, items=with_one_held_out(3).items[:-1])
    with pytest.raises(
        ValueError, match=r"none of its 4 videos is for split 'held_out'; put some into a folder named test,"
    ):
        held_out(without, 8, **SIZE)


def test_held_out_clips_are_fixed_spread_and_unseen():
    source = demo()
    size = {"num_frames": 8, "height": 24, "width": 24}
    batch = held_out(source, 7, **size)
    _same(batch, held_out(source, 7, **size))
    np.testing.assert_array_equal(batch["index"], [0, 1, 2, 0, 1, 2, 0])
    assert len({clip.tobytes() for clip in batch["video"]}) == 7
    clip = Clip(8, 24, 24)
    for item, frames in enumerate(i.frames for i in source.items):
        train = [w for w in windows(source, "train", clip) if w.item == item]
        later = [w for w in windows(source, "held_out", clip) if w.item == item]
        assert max(w.stop for w in train) + 0.05 * frames <= min(w.start for w in later)
    assert held_out(source, 2, **size)["index"].tolist() == [0, 1]


def test_training_clips_never_show_a_held_out_frame():
    source = demo()
    seen, read = [], source.read
    object.__setattr__(
        source,
        "read",
        lambda item, start, stop, *rest: seen.append((item, stop)) or read(item, start, stop, *rest),
    )
    data = batches(source, seed=0, batch_size=8, num_frames=8, height=24, width=24, stride=2)
    for step in range(8):
        data[step]
    assert len(seen) >= 64 and all(stop <= 0.8 * source.items[item].frames for item, stop in seen)


def test_cache_survives_pickling():
    import pickle

    cache = FileCache(7)
    cache.files["x"] = 1
    again = pickle.loads(pickle.dumps(cache))
    assert again.megabytes == 7 and again.files == {}


_TRAINER = """
import multiprocessing, time
from jaxalign.data.pipeline import batches
from jaxalign.data.sources import open_source

if __name__ == "__main__":
    size = dict(num_frames=2, height=16, width=16)
    iterator = batches(open_source("synthetic"), seed=0, batch_size=2, workers=1, **size).iterate()
    next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep({seconds})
"""


def test_signals_to_a_group_leave_its_workers_alone():
    """What a worker does with them; whole processes: the slow test below."""
    asked = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.signal, "signal", asked.__setitem__)
        patch.setattr(pipeline.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
        pipeline._begin_worker(0, 1)
    assert asked == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "by itself"])
def test_workers_outlive_a_sigterm_and_not_their_trainer(tmp_path, end):
    (tmp_path / "trainer.py").write_text(_TRAINER.format(seconds=60 if end == "killed" else 2))
    trainer = subprocess.Popen([sys.executable, tmp_path / "trainer.py"], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    time.sleep(1)
    assert all(os.path.exists(f"/proc/{pid}/cmdline") for pid in workers)
    if end == "killed":
        trainer.kill()
    trainer.wait(timeout=30)  # without a `close` too
    for _ in range(100):
        alive = [pid for pid in workers if os.path.exists(f"/proc/{pid}/cmdline")]
        if not alive:
            return
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, 9)
    pytest.fail(f"workers {alive} outlived the trainer")
