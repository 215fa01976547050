"""Precompute where the machine or the disk fails, and what it says of its size, its threads and the other processes."""
# ruff: noqa: F811 (fixtures are arguments' names)

import dataclasses
import errno
import re
import threading
import types

import jax
import pytest

from jaxalign import precompute
from jaxalign.data import containers, patience, pipeline, precomputed
from jaxalign.data.video import UnreadableVideo
from jaxalign.training import clip_reading, makers, prompts
from jaxalign.training.makers import Options
from tests.test_precompute import PIXELS, SMALL, config_of, files, made, make, videos  # noqa: F401


def test_a_lost_disk_is_no_bad_clip(made, videos, tmp_path, monkeypatch):
    """Neither in the shard at which precompute gives up nor in the one before, where the outage began."""
    monkeypatch.setattr(pipeline, "GIVE_UP_AFTER", 2)
    videos(lost_at=1)
    with pytest.raises(OSError, match=r"2 videos in a row cannot be read, the first is 1.mp4.* it goes on") as caught:
        make(tmp_path / "lost")
    assert "\n" not in str(caught.value)
    assert not [name for name in files(tmp_path / "lost") if "array_record" in name]
    videos()
    make(tmp_path / "lost")
    assert files(tmp_path / "lost") == files(made[1])
    for items in ([0, 2], [1, 2, 3], [0, 1, 2]):  # in a row or not: the fourth can be read, so the disk is there
        videos(items=items, before=50)  # the held-out ends have no more substitutes than GIVE_UP_AFTER
        assert make(tmp_path / f"some{len(items)}{items[0]}")["bad"] == len(items)


def too_many_files():
    try:
        raise OSError(errno.EMFILE, "Too many open files")
    except OSError as error:
        raise UnreadableVideo("2.mp4", "Too many open files") from error


def torn():
    raise UnreadableVideo("2.mp4", "frame 7 cannot be decoded")


def no_memory():
    raise MemoryError


@pytest.mark.parametrize("hiccup", [too_many_files, no_memory, torn])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_hiccup_costs_no_clip(made, videos, tmp_path, monkeypatch, hiccup, held_out):
    """What is no video's fault stops the command; what looks like one is read again before it is believed."""
    source, calls = videos(), []

    def read(item, start, stop, step, cover):
        if item == 2 and (start >= 50) == held_out:
            calls.append(start)
            if len(calls) == 1 or (held_out and hiccup is too_many_files):
                hiccup()
        return source.read(item, start, stop, step, cover)

    monkeypatch.setattr(patience, "sleep", lambda seconds, stop=None: None)
    monkeypatch.setattr(prompts, "open_source", lambda spec, **_: dataclasses.replace(source, read=read))
    if hiccup is not torn:
        with pytest.raises(OSError, match=r"machine or its disk is to blame.*again: it goes on$") as caught:
            make(tmp_path / "out")
        assert "\n" not in str(caught.value)
        lacking = "video-held_out-00001-of-00003" if held_out else "video-train-00001-of-00002"
        assert not any(name.startswith(lacking) for name in files(tmp_path / "out"))
        assert any(name.startswith(lacking.replace("01-", "00-")) for name in files(tmp_path / "out"))
        videos()
    make(tmp_path / "out")
    assert files(tmp_path / "out") == files(made[1]) and calls


def bad_sector(path):
    error = UnreadableVideo(path, "Input/output error")
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    return error


def test_a_broken_place_of_a_disk_costs_its_clips_and_no_folder(made, videos, tmp_path, monkeypatch):
    """Of a disk that gives the other videos; one that gives none of them is away."""
    source, slept, gone = videos(), [], set()

    def read(item, start, stop, step, cover):
        if item in gone:
            raise bad_sector(f"{item}.mp4")
        return source.read(item, start, stop, step, cover)

    monkeypatch.setattr(patience, "_known", patience._Known())
    monkeypatch.setattr(patience, "sleep", lambda seconds, stop=None: slept.append(seconds))
    monkeypatch.setattr(prompts, "open_source", lambda spec, **_: dataclasses.replace(source, read=read))
    gone.update(range(4))
    with pytest.raises(OSError, match=r"mp4: Input/output error: the machine or its disk is to blame.*it goes on$"):
        make(tmp_path / "out")
    assert set(patience.WAITS) <= set(slept)
    gone.difference_update({0, 1, 3})
    said = []
    assert precompute.precompute(config_of(**PIXELS), tmp_path / "out", SMALL, said.append)["bad"] > 0
    skipped = [line for line in said if line.startswith("skipped: ")]
    assert skipped and set(skipped) == {"skipped: 2.mp4: Input/output error; the disk gives other videos, not this one"}
    monkeypatch.setattr(patience, "_known", patience._Known())
    slept.clear()
    make(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "out")
    assert sum(slept) <= 4 * sum(patience.WAITS)  # at most once for each thread


@pytest.mark.parametrize(
    ("number", "calls_wanted"), [(errno.EIO, 8), (errno.ESTALE, 8), (errno.EMFILE, 1)], ids=["EIO", "ESTALE", "EMFILE"]
)
def test_what_looks_damaged_and_is_the_disk_is_waited_for(monkeypatch, number, calls_wanted):
    """And named by its file; what this machine lacks is not waited for."""
    calls = []

    def read():
        calls.append(0)
        raise UnreadableVideo("x.mp4", "frame 7 cannot be decoded")

    monkeypatch.setattr(patience, "_known", patience._Known())
    monkeypatch.setattr(patience, "sleep", lambda seconds, stop=None: None)
    monkeypatch.setattr(containers, "disk_fault", lambda path: OSError(number, "refused"))
    if number == errno.EIO:
        told = clip_reading._told(read, patience.Patience(), lambda: True)
        assert (told.path, told.why[:7]) == ("x.mp4", "refused")
    else:
        with pytest.raises((OSError, UnreadableVideo), match="refused"):
            clip_reading._told(read, patience.Patience(), lambda: True)
    assert len(calls) == calls_wanted


def test_a_command_that_ends_waits_for_no_disk():
    stop, asleep = threading.Event(), []
    stream = precompute._ahead([lambda: "clip", lambda: asleep.append(stop.wait(30))], 2, 1, stop)
    assert next(stream) == "clip"
    stream.close()
    assert stop.is_set() and asleep in ([True], [])


def test_only_what_this_command_makes_is_waited_for(made, monkeypatch):
    """Of several processes; a series that nobody asks for here may be unfinished for ever."""
    _, path = made
    folder = precomputed.open_folder(path)
    video = folder.series["video"]
    precomputed.claim_series(folder, dataclasses.replace(video, name="flow_target"))
    folder, asked, said = precomputed.open_folder(path), {"video": video}, []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(precompute.time, "sleep", lambda seconds: pytest.fail("waits"))
    assert precompute._report(folder, asked, SMALL, said.append)["missing"] == 0
    assert "complete" in said[-1] and "(video)" in said[-1]
    lost = [path / video.shards("held_out")[k] for k in (0, 2)]
    kept = [file.read_bytes() for file in lost]
    for file in lost:
        file.unlink()
    ranged = dataclasses.replace(SMALL, shard_range=(1, 2))
    assert precompute._report(folder, asked, ranged, said.append)["missing"] == 2
    assert said[-1].endswith("the others are of other --shard_range")
    looks, is_whole = [], precomputed.is_whole

    def sleep(seconds):
        looks.clear()
        lost.pop(0).write_bytes(kept.pop(0))

    monkeypatch.setattr(precompute.time, "sleep", sleep)
    monkeypatch.setattr(precomputed, "is_whole", lambda file: (looks.append(file), is_whole(file))[1])
    assert precompute._report(folder, asked, SMALL, said.append)["missing"] == 0
    assert not lost and len(looks) == 1  # what was whole before is not looked at again


def test_threads_and_memory_are_bounded(made, monkeypatch):
    clips = precomputed.open_folder(made[1]).clips
    monkeypatch.setattr(precompute.os, "sched_getaffinity", lambda pid: range(3), raising=False)
    assert precompute._room(clips, Options(), 1) == (3, 4)
    monkeypatch.setattr(precompute.os, "sched_getaffinity", lambda pid: range(200), raising=False)
    assert precompute._room(clips, Options(), 8) == (32, 40)
    assert precompute._room(clips, Options(threads=100), 8) == (100, 108)
    shape = {"data.num_frames": 49, "data.height": 480, "data.width": 720}
    large = dataclasses.replace(clips, fields=shape, variants=4, flips=2)
    threads, ahead = precompute._room(large, Options(threads=100), 8)
    assert 1 < threads == ahead + 1 and ahead * 8 * 49 * 480 * 720 * 3 <= precompute.WAITING_BYTES


def test_the_size_says_what_is_missing(made, monkeypatch):
    folder, said = precomputed.open_folder(made[1]), []
    video = folder.series["video"]
    words = precomputed.Series("prompts", {}, "bfloat16", (226, 4096), {"captions": 1000}, 290)
    monkeypatch.setattr(makers.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1.2e9))

    def announced(whole):
        said.clear()
        makers.announce(folder, {"video": video, "prompts": words}, whole, SMALL, said.append)
        return said

    assert announced(())[0] == "24 clips and 5 held out, 1,000 different captions: video, prompts"
    assert announced(())[1].startswith("about 1.85 GB in ") and said[1].endswith("where 1.2 GB are free")
    assert re.match("warning: 0.7 GB too little is free", said[2])
    whole = [folder.path / name for name in words.shards("captions")[:2]]  # 580 of them
    assert announced(whole)[1].startswith("about 0.78 GB more than the 1.07 GB that are there, in ")
    assert len(said) == 2
