"""Exact frames out of video files: one index a file, one seek a clip, only the needed frames turned into RGB.

Frames are counted in presentation order. A clip is found by presentation time: seek to the keyframe before
it, decode on, pick the frames whose timestamps the index names. Where a container's seek or its timestamps
are not to be trusted (MPEG program streams, H.264 in AVI, some MP4s) the file is decoded from its beginning
instead.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Sequence

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

from jaxalign.data.containers import Kept, UnreadableVideo, damage_named, open_video, opened, stamp_of
from jaxalign.data.faults import disk_fault
from jaxalign.data.frame_index import FrameIndex, demux, index_frames, whole_packets

THUMB = 32  # side of the grey thumbnails that cuts are looked for in
# ACCURATE_RND and BITEXACT cost nothing measurable and make the pixels the same on every kind of CPU.
_BICUBIC = int(Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT)
_AREA = int(Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT)


_kept = Kept()
close_kept = _kept.close  # in this thread


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file's header says: number of frames, frames a second, width and height of square pixels."""

    frames: int
    fps: float
    width: int
    height: int


def probe(path: str) -> VideoInfo:
    """Frames, rate and size of a file, decoding nothing; it is read whole only if it has no index of its own.

    Raises UnreadableVideo for a file that is empty, no video, audio only, without frames, or cut short.
    """
    frames = None
    with opened(path) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        aspect = float(stream.sample_aspect_ratio or 1)
        name, claimed, listed = container.format.name, stream.frames, len(stream.index_entries)
        # An edit list takes frames out of an MP4's index, and marks those that others need to be discarded.
        edited = name.startswith("mov") and listed < claimed
        if name.startswith(("mov", "avi")) and listed and (edited or listed == claimed):
            size = os.path.getsize(path)
            there = sum(entry.pos + entry.size <= size for entry in stream.index_entries)
            if there < listed:
                raise UnreadableVideo(path, f"cut short: the file holds {there} of its {listed} frames")
            frames = sum(not entry.is_discard for entry in stream.index_entries)
    if frames is None:
        discarded = [packet.discarded for packet in whole_packets(path)]
        # Headers are often a frame or two off; a file that lost its end lacks far more.
        if len(discarded) < 0.95 * claimed - 2:
            raise UnreadableVideo(path, f"cut short: the file holds {len(discarded)} of its {claimed} frames")
        frames = discarded.count(False)
    if not frames or not width or not height:
        raise UnreadableVideo(path, "no video frames")
    return VideoInfo(frames, fps, max(1, round(width * aspect)), height)


def read_frames(
    path: str,
    numbers: Sequence[int] | None = None,
    *,
    times: Sequence[float] | None = None,
    cover: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "t h w 3"]:
    """RGB frames by number (or those on screen at `times`, in seconds from the first frame; all if neither).

    cover: (height, width) to shrink or grow to, keeping proportions, so that both sides are at least that
    long (anti-aliased bicubic); None keeps the file's size. Pixels come out square and upright. Raises
    UnreadableVideo; ValueError for numbers that the file does not have.
    """
    index = index_frames(path)
    if times is not None:
        if index.by_order:
            raise UnreadableVideo(path, "its timestamps are unusable: ask for frame numbers")
        with opened(path) as (_, stream):
            ticks = [index.pts[0] + int(time / stream.time_base) for time in times]
        numbers = [max(0, int(np.searchsorted(index.pts, tick, side="right")) - 1) for tick in ticks]
    elif numbers is None:
        numbers = range(len(index))
    numbers = [int(number) for number in numbers]
    if not numbers or min(numbers) < 0 or max(numbers) >= len(index):
        raise ValueError(f"{path} has frames 0 to {len(index) - 1}; asked for {numbers[:8]}")
    frames = _decode(path, index, set(numbers), lambda _, convert: convert(cover))
    return np.stack([frames[number] for number in numbers])


def read_span(
    path: str, start: int, stop: int, step: int, cover: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "t h w 3"], UInt8[np.ndarray, "s y x"]]:
    """Frames start, start+step, … below stop in RGB (as `read_frames`), and grey thumbnails of start … stop-1.

    The thumbnails cost a few per cent of the decoding and are what `clips.find_cuts` looks at; where they are known
    already, frames that neither the clip nor other frames need are not decoded. Raises UnreadableVideo.
    """
    index = index_frames(path, least=stop)
    if start < 0 or stop > len(index) or start >= stop:
        raise UnreadableVideo(path, f"has {len(index)} frames, not {start} to {stop - 1}")
    thumbs = known_thumbnails(path, start, stop)
    if thumbs is not None:
        frames = _decode(path, index, set(range(start, stop, step)), lambda _, convert: convert(cover))
        return np.stack([frames[number] for number in range(start, stop, step)]), thumbs

    def both(number, convert):
        return convert(cover) if (number - start) % step == 0 else None, convert(None, thumb=True)

    frames = _decode(path, index, set(range(start, stop)), both)
    _thumbnails.put(path, {number: thumb for number, (_, thumb) in frames.items()})
    video = np.stack([frames[number][0] for number in range(start, stop, step)])
    return video, np.stack([frames[number][1] for number in range(start, stop)])


def known_thumbnails(path: str, start: int, stop: int) -> UInt8[np.ndarray, "s y x"] | None:
    """The grey thumbnails of frames start … stop-1 if this process has decoded all of them before, else None."""
    return _thumbnails.get(path, start, stop)


class _Thumbnails:
    """Thumbnails by file and frame, a kilobyte each; of the files that were read longest ago the most are forgotten.

    They change how long a read takes and nothing else: what is remembered is what would be decoded.
    """

    def __init__(self, frames: int = 32 * 1024):
        self.room, self.lock = frames, threading.Lock()  # training's prefetch thread and an evaluation may both read
        self.files: dict[tuple, dict[int, np.ndarray]] = {}

    def get(self, path: str, start: int, stop: int) -> np.ndarray | None:
        with self.lock:
            known = self.files.get((path, stamp_of(path)), {})
            found = [known.get(number) for number in range(start, stop)]
        return None if any(one is None for one in found) else np.stack(found)

    def put(self, path: str, thumbs: dict[int, np.ndarray]) -> None:
        key = path, stamp_of(path)
        with self.lock:
            self.files[key] = self.files.pop(key, {}) | thumbs  # the last one read stands last
            while sum(map(len, self.files.values())) > self.room:
                self.files.pop(next(iter(self.files)))


_thumbnails = _Thumbnails()


def _decode(path: str, index: FrameIndex, wanted: set[int], take: Callable) -> dict[int, object]:
    """take(number, convert) of the wanted frames: from the nearest keyframe, the one before, the start."""
    if not index.by_order:
        keys = np.flatnonzero(index.key[: min(wanted) + 1])
        # The first keyframe needs no seek: it is where an opened file stands anyway.
        for seek in [None, *(int(index.seek[k]) for k in keys[1:])][:-3:-1]:
            found = _sweep(path, index, wanted, take, seek)
            if len(found) == len(wanted):
                return found
    found = _sweep_in_order(path, wanted, take)
    if len(found) < len(wanted):
        missing = min(wanted - found.keys())
        # Some formats take a disk that fails for the end of the file.
        raise UnreadableVideo(path, f"frame {missing} of {len(index)} cannot be decoded") from disk_fault(path)
    return found


def _sweep(path: str, index: FrameIndex, wanted: set[int], take: Callable, seek: int | None) -> dict[int, object]:
    """The frames from a keyframe on (None: the first), in a file that is open still if there is one; or anew."""
    if kept := _kept.take(path):
        with contextlib.suppress(UnreadableVideo):
            found = _pass(path, index, wanted, take, int(index.seek[0]) if seek is None else seek, *kept)
            if len(found) == len(wanted):
                _kept.put(path, *kept)
                return found
        kept[0].close()
    container, stream = open_video(path)
    try:
        found = _pass(path, index, wanted, take, seek, container, stream)
    except BaseException:
        container.close()
        raise
    # In these a seek goes by an index of the file; MPEG's streams are searched, and remember where they were.
    if container.format.name.startswith(("mov", "matroska")) and len(found) == len(wanted):
        _kept.put(path, container, stream)
    else:
        container.close()
    return found


def _pass(path: str, index: FrameIndex, wanted: set[int], take: Callable, seek: int | None, container, stream) -> dict:
    """One pass by presentation time from a keyframe; whatever is missing or corrupt is left out."""
    number = {int(index.pts[k]): k for k in wanted}
    last = max(number)
    found: dict[int, object] = {}
    with damage_named(path):
        if seek is not None:
            try:
                container.seek(seek, stream=stream, backward=True)
            except (av.error.FFmpegError, OSError):
                return found
        convert = _converter(stream)
        for packet in demux(container, stream):
            if seek is not None and not _known(packet, index):
                return {}
            # Beside the wanted frames only those that others need are decoded: a third less work with B-frames.
            beside = packet.pts is not None and packet.pts not in number
            stream.codec_context.skip_frame = "NONREF" if beside else "DEFAULT"
            for frame in _frames_of(packet):
                if frame.pts in number and not frame.is_corrupt:
                    found[number[frame.pts]] = take(number[frame.pts], functools.partial(convert, frame))
                if len(found) == len(wanted) or (frame.pts is not None and frame.pts > last):
                    return found
    return found


def _known(packet, index: FrameIndex) -> bool:
    """Whether the index has this packet.

    After a seek a program stream may give a frame its neighbour's time; that shows when a keyframe turns up
    at another time than before, or another frame at a keyframe's time.
    """
    if not packet.size or packet.is_discard or packet.is_corrupt:
        return True
    if packet.pts is None:
        return False
    k = int(np.searchsorted(index.pts, packet.pts))
    return k < len(index) and bool(index.pts[k] == packet.pts and index.key[k] == packet.is_keyframe)


def _sweep_in_order(path: str, wanted: set[int], take: Callable) -> dict[int, object]:
    """One pass from the beginning, counting the frames that come out."""
    found: dict[int, object] = {}
    count, last = 0, max(wanted)
    with opened(path) as (container, stream):
        convert = _converter(stream)
        for packet in demux(container, stream):
            for frame in _frames_of(packet):
                if count in wanted and not frame.is_corrupt:
                    found[count] = take(count, functools.partial(convert, frame))
                count += 1
                if count > last:
                    return found
    return found


def _frames_of(packet) -> list:
    try:
        return packet.decode()
    except Exception:
        return []  # a torn packet; the frames that it lacks are noticed by the caller


def cover_size(height: int, width: int, cover: tuple[int, int]) -> tuple[int, int]:
    """(height, width) with the same proportions, the smallest that is at least `cover` on both sides."""
    scale = max(cover[0] / height, cover[1] / width)
    return max(cover[0], round(height * scale)), max(cover[1], round(width * scale))


def _converter(stream) -> Callable:
    """frame -> uint8 array; swscale's one step from YUV to small RGB is 4 to 9 times as quick as PIL."""
    reformatter, thumbs = VideoReformatter(), VideoReformatter()  # each keeps the tables of its one size
    aspect = float(stream.sample_aspect_ratio or 1)
    sizes: dict = {}  # a stream that changes its resolution midway keeps the clip's first size

    def convert(frame, cover, thumb=False):
        if thumb:
            return thumbs.reformat(frame, THUMB, THUMB, "gray", interpolation=_AREA, threads=1).to_ndarray()
        turns = round(frame.rotation / 90) % 4  # counter-clockwise quarters that the display wants
        if cover not in sizes:
            height, width = frame.height, max(1, round(frame.width * aspect))
            if cover is not None and turns % 2:
                height, width = cover_size(width, height, cover)[::-1]
            elif cover is not None:
                height, width = cover_size(height, width, cover)
            sizes[cover] = height, width
        height, width = sizes[cover]
        small = reformatter.reformat(frame, width, height, "rgb24", interpolation=_BICUBIC, threads=1)
        image = small.to_ndarray()
        return np.rot90(image, turns) if turns else image

    return convert


def resize(video: UInt8[np.ndarray, "t h w 3"], cover: tuple[int, int]) -> UInt8[np.ndarray, "t y x 3"]:
    """Frames that are already in memory, brought to `cover` as `read_frames` brings those of a file."""
    height, width = cover_size(video.shape[1], video.shape[2], cover)
    if (height, width) == video.shape[1:3]:
        return video
    reformatter = VideoReformatter()
    frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in video)
    shape = {"width": width, "height": height, "interpolation": _BICUBIC, "threads": 1}
    return np.stack([reformatter.reformat(frame, **shape).to_ndarray() for frame in frames])
