"""Which errors are the machine's or the disk's, and that a file is not called broken for their sake."""

import errno
import os

import av
import numpy as np
import pytest

from jaxalign.data import containers
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
