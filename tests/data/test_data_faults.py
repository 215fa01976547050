"""Which errors are the machine's or the disk's, and that a file is not called broken for their sake."""

import errno
import itertools
import os

import av
import numpy as np
import pytest

from jaxalign.data import containers, frame_index, sources, video
from jaxalign.data.faults import disk_fault, not_the_files

FAILING = "/proc/self/mem"  # nothing lies at address 0: reading it is an input/output error


def of_ffmpeg(number, path):
    try:
        av.error.err_check(-number, str(path))
    except Exception as error:
        return error


def because(cause):
    try:
        raise containers.UnreadableVideo("a.mp4", "damaged") from cause
    except containers.UnreadableVideo as error:
        return error


def test_whose_fault_an_error_is(tmp_path):
    good = tmp_path / "good.mkv"
    good.write_bytes(bytes(10))
    machines = [OSError(number, "") for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT)]
    machines += [MemoryError(), of_ffmpeg(errno.EMFILE, good), of_ffmpeg(errno.ESTALE, good)]
    files = [FileNotFoundError(errno.ENOENT, ""), PermissionError(errno.EACCES, ""), OSError("truncated"), ValueError()]
    # FFmpeg says these of broken files too: whether the file can be read tells.
    files += [of_ffmpeg(errno.EIO, good), of_ffmpeg(errno.ENOMEM, good), of_ffmpeg(errno.EINVAL, good)]
    if os.path.exists(FAILING):
        machines.append(of_ffmpeg(errno.EIO, FAILING))
        assert disk_fault(FAILING).errno == errno.EIO
    for error in machines:
        assert not_the_files(error) and not_the_files(because(error)), repr(error)
    for error in files:
        assert not not_the_files(error) and not not_the_files(because(error)), repr(error)
    assert disk_fault(str(good)) is disk_fault(str(tmp_path)) is disk_fault("no\0path") is None


def test_a_file_that_cannot_be_opened_now_is_not_called_damaged(tmp_path, monkeypatch, numbered):
    path = str(numbered(tmp_path / "a.mp4"))

    def too_many(path, **_):
        raise of_ffmpeg(errno.EMFILE, path)

    with monkeypatch.context() as patched:
        patched.setattr(av, "open", too_many)
        with pytest.raises(containers.UnreadableVideo, match=r"a\.mp4: Too many open files$") as caught:
            containers.open_video(path)
    assert not_the_files(caught.value)
    with (
        pytest.raises(containers.UnreadableVideo, match=r"a\.mp4: none left$") as caught,
        containers.damage_named(path),
    ):
        raise MemoryError("none left")
    assert not_the_files(caught.value)
    with open(path, "rb+") as file:
        file.truncate(1000)
    with pytest.raises(containers.UnreadableVideo, match="cut short or damaged") as caught:
        containers.open_video(path)
    assert not not_the_files(caught.value)


def test_kept_files_are_closed(tmp_path, numbered):
    kept = containers.Kept()
    path = str(numbered(tmp_path / "a.mp4"))
    kept.put(path, *containers.open_video(path))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    kept.close()
    assert kept.take(path) is None
    assert before is None or len(os.listdir("/proc/self/fd")) == before - 1


def test_who_never_reads_a_file_again_tries_it_twice(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(bytes(10))

    def read(*outcomes):
        left = list(outcomes)

        def one():
            if isinstance(outcome := left.pop(0), Exception):
                raise outcome
            return outcome

        return one

    broken = [containers.UnreadableVideo(str(path), f"frame {k} cannot be decoded") for k in range(2)]
    assert containers.tried(read(np.pi)) == np.pi
    assert containers.tried(read(broken[0], np.pi)) == np.pi  # a hiccup
    assert containers.tried(read(*broken)) is broken[1]
    with pytest.raises(containers.UnreadableVideo, match="damaged"):
        containers.tried(read(because(OSError(errno.EIO, ""))))
    monkeypatch.setattr(containers, "disk_fault", lambda path: OSError(errno.EIO, "Input/output error", path))
    os.utime(path, (1, 1))  # another file
    with pytest.raises(OSError, match="Input/output error"):
        containers.tried(read(*broken))


@pytest.fixture
def ends_early(monkeypatch):
    """ends_early(15, None): the next reading gives 15 packets, the one after it all; gives what is left to come.

    So FFmpeg takes a disk that fails for a moment for the file's end, or (damage) for a broken place.
    """
    genuine = frame_index.demux

    def make(*lengths, damage=None):
        left = list(lengths)

        def demux(container, stream, damaged=lambda error: None):
            length = left.pop(0) if left else None
            yield from itertools.islice(genuine(container, stream, damaged), length)
            if length and damage:
                damaged(damage)

        monkeypatch.setattr(frame_index, "demux", demux)
        return left

    return make


@pytest.mark.parametrize("kind", ["a.mkv", "b-frames.mp4", "a.avi", "a.ts"])
def test_a_reading_that_ended_early_is_done_again(kind, tmp_path, numbered, ends_early):
    path = str(numbered(tmp_path / kind, **({"fmt": "mpegts"} if kind == "a.ts" else {})))
    whole = frame_index.whole_packets(path)
    left = ends_early(15)
    assert frame_index.whole_packets(path) == whole and len(whole) == 60 and not left
    left = ends_early(None, 15)
    assert frame_index.whole_packets(path) == whole and left == [15]  # one that reaches the end is enough
    ends_early(15, 30)
    with pytest.raises(containers.UnreadableVideo, match="two readings gave 15 and 30 packets") as caught:
        frame_index.index_frames(path)
    assert not_the_files(caught.value)
    ends_early(15)
    assert len(frame_index.index_frames(path)) == 60  # of what failed nothing is remembered
    ends_early(15)
    assert video.probe(path).frames == 60


def test_damage_is_read_twice_where_no_header_tells_the_end(tmp_path, numbered, ends_early, monkeypatch):
    path = str(numbered(tmp_path / "a.mkv"))
    monkeypatch.setattr(frame_index, "_reaches_its_end", lambda *of: True)
    ends_early(15, damage=OSError(errno.EIO, "Input/output error"))
    assert len(frame_index.whole_packets(path)) == 60


@pytest.mark.parametrize("kind", ["cut.mkv", "cut.avi", "cut.ts", "cut.mp4"])
def test_a_file_that_is_cut_short_has_what_is_there(kind, tmp_path, numbered, ends_early):
    settings = {"cut.ts": {"fmt": "mpegts"}, "cut.mp4": {"container_options": {"movflags": "faststart"}}}
    path = numbered(tmp_path / kind, **settings.get(kind, {}))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    left = ends_early(None, None, 1)
    frames = len(frame_index.index_frames(str(path)))
    assert 20 < frames < 50 and 1 in left  # read twice at most
    assert [numbered.number(image) for image in video.read_frames(str(path), range(5, 13))] == list(range(5, 13))


def test_a_short_index_is_not_believed_for_ever(tmp_path, numbered, ends_early, monkeypatch):
    """Where neither the header nor FFmpeg tells that a reading ended early."""
    path = str(numbered(tmp_path / "a.mkv"))
    info = video.probe(path)
    monkeypatch.setattr(frame_index, "_reaches_its_end", lambda *of: True)
    ends_early(15)
    assert len(frame_index.index_frames(path)) == 15
    assert video.read_span(path, 20, 30, 1, (24, 32))[0].shape == (10, 24, 32, 3)
    left = ends_early(*[15] * 9)
    with pytest.raises(containers.UnreadableVideo, match="has 60 frames"):
        video.read_span(path, 55, 62, 1, (24, 32))
    assert len(frame_index.index_frames(path)) == 60 and len(left) == 8  # a worse reading changes nothing
    ends_early()
    for start in (55, 56):  # once two readings agree, the file is not read again
        with pytest.raises(containers.UnreadableVideo, match="has 60 frames"):
            video.read_span(path, start, 62, 1, (24, 32))
        ends_early(*[15] * 9)
    os.utime(path, (1, 1))  # what is kept of small files in memory is no better
    ends_early(15, None)
    reader = sources.FileReader((path,), (info,))
    assert reader.cache.whole(path, (24, 32))[0].shape[0] == 15
    assert reader(0, 20, 30, 1, (24, 32))[0].shape == (10, 24, 32, 3)


def test_who_tries_a_file_twice_does_not_go_by_the_first_index(tmp_path, numbered, ends_early, monkeypatch):
    path = str(numbered(tmp_path / "a.mkv"))
    monkeypatch.setattr(frame_index, "_reaches_its_end", lambda *of: True)
    ends_early(15)

    def read():
        if len(frame_index.index_frames(path)) < 60:
            raise containers.UnreadableVideo(path, "frame 20 of 15 cannot be decoded")
        return np.pi

    assert containers.tried(read) == np.pi
