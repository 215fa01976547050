"""Which frames a file has and when they are shown: from the index that it carries, or from all of its packets."""

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Bool, Int64

from jaxalign.data.containers import UnreadableVideo, known, opened, stamp_of
from jaxalign.data.faults import disk_fault


@dataclasses.dataclass(frozen=True, eq=False)
class FrameIndex:
    """Of every frame, in order: presentation timestamp, timestamp to seek to, whether it is a keyframe.

    by_order: the timestamps are unusable, frames are counted from the file's beginning.
    """

    pts: Int64[np.ndarray, "n"]
    seek: Int64[np.ndarray, "n"]
    key: Bool[np.ndarray, "n"]
    by_order: bool = False

    def __len__(self) -> int:
        return len(self.pts)


class Packet(NamedTuple):
    """A whole packet; discarded: an edit list cuts its frame away."""

    pts: int | None
    dts: int | None
    key: bool
    discarded: bool


def index_frames(path: str, least: int = 0) -> FrameIndex:
    """The exact index of a file as it is now, without decoding; a file that has none of its own is read whole.

    A remembered index of fewer than `least` frames is read once more: a disk may have failed unseen. Raises
    UnreadableVideo.
    """
    place = known(path)
    with place.lock:
        stamp = stamp_of(path)
        if place.index is None or place.stamp != stamp:
            place.index = None
            place.index, place.stamp, place.sure = _index(path), stamp, False
        elif len(place.index) < least and not place.sure:
            again = _index(path)
            place.sure = len(again) == len(place.index)
            place.index = max(place.index, again, key=len)
        return place.index


def _index(path: str) -> FrameIndex:
    with opened(path) as (container, stream):
        name, codec = container.format.name, stream.codec_context.name
        if listed := _listed(path, container, stream):
            return listed
    # Opened anew: the packets that were looked at would be missing.
    packets = [packet for packet in whole_packets(path) if not packet.discarded]
    if not packets:
        raise UnreadableVideo(path, "no video frames")
    stamps = [packet.pts for packet in packets]
    # AVI has no presentation times: for H.264 and HEVC with B-frames what libavformat makes up is wrong.
    by_order = None in stamps or len(set(stamps)) < len(stamps)
    by_order = by_order or (name == "avi" and codec in ("h264", "hevc"))
    if by_order:
        numbers = np.arange(len(stamps), dtype=np.int64)
        return FrameIndex(numbers, numbers, numbers == 0, by_order=True)
    packets.sort(key=lambda packet: packet.pts)
    # A keyframe's presentation time finds it in every container but MPEG's streams, which search decoding times.
    by_dts = name.startswith("mpeg")
    return FrameIndex(
        np.array([packet.pts for packet in packets], np.int64),
        np.array([p.dts if by_dts and p.dts is not None else p.pts for p in packets], np.int64),
        np.array([packet.key for packet in packets], np.bool_),
    )


def _listed(path: str, container, stream) -> FrameIndex | None:
    """The index that an MP4 carries of itself, where that is exact; None where the packets have to be asked.

    It has decoding times. They are presentation times too where nothing is reordered (AV1 and VP9 never are, and of
    H.264 libavformat compares all of a file's offsets), no edit list cuts and no fragments follow. Other codecs tell
    whether they reorder in headers that may change midway. It takes packets from the container.
    """
    entries, codec = list(stream.index_entries), stream.codec_context.codec.canonical_name
    straight = codec in ("av1", "vp9") or (codec == "h264" and not stream.codec_context.has_b_frames)
    if not (container.format.name.startswith("mov") and straight and entries and len(entries) == stream.frames):
        return None
    times, size = [entry.timestamp for entry in entries], os.path.getsize(path)
    if any(entry.is_discard or not entry.size or entry.pos + entry.size > size for entry in entries):
        return None
    if any(later <= earlier for earlier, later in itertools.pairwise(times)):
        return None
    for entry, packet in zip(entries[:8], demux(container, stream), strict=False):
        if not packet.pts == packet.dts == entry.timestamp or packet.is_keyframe != entry.is_keyframe:
            return None
    pts = np.array(times, np.int64)
    return FrameIndex(pts, pts, np.array([entry.is_keyframe for entry in entries], np.bool_))


def whole_packets(path: str) -> list[Packet]:
    """All packets of a file but those that are empty or torn, in the order of decoding.

    To FFmpeg a disk that fails for a moment may look like the file's end, and what comes of these packets is
    remembered. So a reading that ended early is done again, and of two such readings both have to say the same: a file
    that is cut short does. Raises UnreadableVideo.
    """
    packets, complete = _all_packets(path)
    if not complete:
        first = packets
        packets, complete = _all_packets(path)
        if not complete and packets != first:
            why = f"two readings gave {len(first)} and {len(packets)} packets: the disk fails, or it is being written"
            raise UnreadableVideo(path, why) from OSError(errno.EIO, why)
    return packets


def _all_packets(path: str) -> tuple[list[Packet], bool]:
    """(whole packets, whether the reading ended where the header says that the file does)."""
    damage: list[Exception] = []
    packets, count = [], 0
    with opened(path) as (container, stream):
        # An MP4's index has all that it will give; how many there are before an edit list cuts is more.
        promised = len(stream.index_entries) if container.format.name.startswith("mov") else stream.frames
        for packet in demux(container, stream, damage.append):
            count += packet.size > 0
            if packet.size and not packet.is_corrupt:
                packets.append(Packet(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
        there = count >= promised if promised else _reaches_its_end(container, stream, packets)
    return packets, there and not damage


def _reaches_its_end(container, stream, packets: list[Packet]) -> bool:
    """Whether the last frame is shown within two frames of the end of the file's duration, if that is known."""
    shown = [packet.pts for packet in packets if packet.pts is not None]
    if not shown or stream.time_base is None:
        return True
    if stream.duration is None:  # Matroska has one for all streams, counted from time 0
        duration, last = (container.duration or 0) / av.time_base, max(shown) * stream.time_base
    else:
        duration, last = stream.duration * stream.time_base, (max(shown) - min(shown)) * stream.time_base
    return float(last) >= float(duration) - 2 / float(stream.average_rate or 25) - 0.002  # rounded to milliseconds


def demux(container, stream, damaged: Callable[[Exception], object] = lambda error: None) -> Iterator[av.Packet]:
    """All packets and the empty one that flushes the decoder; damage ends them as the end of a file does.

    `damaged` is told of it. Raises OSError where it was the disk's or the machine's fault.
    """
    try:
        yield from container.demux(stream)
    except Exception as error:  # PyAV answers damage with IndexError, MemoryError and more
        if isinstance(error, OSError) and (fault := disk_fault(container.name)):
            raise fault from error
        damaged(error)
