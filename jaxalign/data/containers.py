"""Opening video files with PyAV: what can be wrong with one, said in words, and files that stay open between clips."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import av
from av.stream import Disposition

from jaxalign.data.faults import disk_fault, not_the_files

KEPT_OPEN = 4  # files of a thread; a decoder of 1080p holds some 20 MB


class UnreadableVideo(ValueError):
    """A file that gives no usable video: `path` and `why`, a few words that a person can act on."""

    def __init__(self, path: str, why: str):
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def open_video(path: str) -> tuple:
    """(container, video stream); every way in which a file can fail to be a video becomes UnreadableVideo.

    So does every way in which it cannot be opened now: `faults.not_the_files` tells which it was.
    """
    try:
        if not os.path.getsize(path):
            raise UnreadableVideo(path, "the file is empty")
        container = av.open(path, metadata_errors="ignore")  # a title in an odd encoding is no reason to refuse
    except (OSError, av.error.FFmpegError) as error:
        raise UnreadableVideo(path, _why_not_opened(path, error)) from error
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams or streams[0].codec_context is None:
        sound = bool(container.streams.audio)
        container.close()
        why = "no decoder for its codec" if streams else "audio only" if sound else "no video in it, or cut short"
        raise UnreadableVideo(path, why)
    # The parallel unit is the clip: a decoder's own threads would only fight for cores with the workers.
    streams[0].thread_type, streams[0].codec_context.thread_count = "NONE", 1
    return container, streams[0]


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple]:
    """`open_video` for one use, closed at its end."""
    container, stream = open_video(path)
    with container, damage_named(path):
        yield container, stream


@contextlib.contextmanager
def damage_named(path: str) -> Iterator[None]:
    try:
        yield
    except (av.error.FFmpegError, OSError, MemoryError) as error:  # nonsense in a header, a disk that fails
        words = _words(error)
        raise UnreadableVideo(path, words if not_the_files(error) else f"damaged ({words})") from error


class Kept(threading.local):
    """The files that a thread read last, open: to open one costs as much as to decode ten of its frames.

    A decoder serves one thread, and a forked worker shares the place in the file with its parent: to each its own.
    """

    def __init__(self):
        self.process, self.files = os.getpid(), {}

    def take(self, path: str) -> tuple | None:
        """(container, stream) of a file that has not changed since; it is the caller's until `put`."""
        if self.process != os.getpid():
            self.__init__()
        container, stream, stamp = self.files.pop(path, (None, None, None))
        if container is None or stamp == stamp_of(path):
            return container and (container, stream)
        container.close()
        return None

    def put(self, path: str, container, stream) -> None:
        self.files[path] = container, stream, stamp_of(path)
        if len(self.files) > KEPT_OPEN:
            self.files.pop(next(iter(self.files)))[0].close()

    def close(self) -> None:
        """Close those of this thread."""
        while self.files:
            self.files.popitem()[1][0].close()


class Known:
    """What is remembered of a file's frames (frame_index.py); whoever reads them holds the lock, and others wait."""

    def __init__(self):
        self.lock, self.stamp, self.index = threading.Lock(), None, None
        self.sure = False  # two readings gave the same


_looking_up = threading.Lock()


def known(path: str) -> Known:
    """The one place where this process remembers a file; of those used longest ago it forgets all but 1024."""
    with _looking_up:
        return _known(path)


@functools.lru_cache(maxsize=1024)  # an index is a few kilobytes, and every clip of the file needs it
def _known(path: str) -> Known:
    return Known()


def tried(read: Callable[[], Any]) -> Any:
    """What read() gives, or the UnreadableVideo of a file that is broken for good, for who never reads it again.

    A disk that fails amid a file looks to FFmpeg as if the file were damaged or ended there. So its plain bytes have to
    be there, and it has to fail once more. Raises what is the machine's or the disk's fault.
    """
    try:
        return read()
    except UnreadableVideo as error:
        if not_the_files(error):
            raise
        _read_through(error.path, stamp_of(error.path))
        place = known(error.path)
        with place.lock:
            place.index = None  # what the first reading found out may be wrong
    try:
        return read()
    except UnreadableVideo as error:
        if not_the_files(error):
            raise
        return error


@functools.lru_cache(maxsize=1 << 16)  # a film has many windows
def _read_through(path: str, stamp: tuple | None) -> None:
    if fault := disk_fault(path):
        raise fault


def stamp_of(path: str) -> tuple | None:
    """What tells one version of a file from another; None if it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _why_not_opened(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    if isinstance(error, av.error.FFmpegError) and not not_the_files(error):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(12)[4:8] == b"ftyp":  # an MP4 keeps its index in `moov`, often at the very end
                return "cut short or damaged (an MP4 without its index)"
        return f"not a video, or damaged ({_words(error)})"
    return _words(error)


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
