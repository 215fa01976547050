"""TensorBoard's event files, written at once and read back: scalars, images, videos.

tensorboardX's SummaryWriter hands events to a thread through a queue; when the disk is full the thread dies
and the queue blocks the training for ever. Here its record writer is called directly, and the caller gets
the OSError.
"""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxalign.figures.video import gif_bytes, png_bytes


def open_events(folder: str | Path, *, first_step: int = 0) -> EventsWriter:
    """A new event file in `folder`; what earlier files hold from `first_step` on is marked as undone.

    A run that was killed logged steps after its last checkpoint; after resuming they come again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The name has seconds and host in it: two starts within a second would write over each other.
    writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
    if first_step:
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))
    return writer


def _write(writer: EventsWriter, step: int, values: list[Summary.Value]) -> None:
    writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    writer.flush()


def add_scalars(writer: EventsWriter, step: int, values: Mapping[str, Any]) -> None:
    """Write numbers under their tags, e.g. 'train/loss'; raises OSError."""
    _write(writer, step, [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()])


def _image(tag: str, encoded: bytes, height: int, width: int) -> Summary.Value:
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    return Summary.Value(tag=tag, image=image)


def add_image(writer: EventsWriter, step: int, tag: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write an RGB image; raises OSError."""
    _write(writer, step, [_image(tag, png_bytes(image), *image.shape[:2])])


def add_video(writer: EventsWriter, step: int, tag: str, video: UInt8[np.ndarray, "t h w 3"], fps: float | int) -> None:
    """Write a clip, which TensorBoard plays: an image summary whose bytes are a GIF; raises OSError."""
    _write(writer, step, [_image(tag, gif_bytes(video, fps), *video.shape[1:3])])


def add_figure(writer: EventsWriter, step: int, tag: str, figure: Figure) -> None:
    """Write a matplotlib figure as an image; raises OSError."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    add_image(writer, step, tag, np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]))


def read_scalars(folder: str | Path) -> list[dict[str, Any]]:
    """The scalars of all event files in `folder`: [{'step': 0, 'train/loss': ...}, ...], ascending in step.

    What a resumed run logged again replaces what it had logged before; a torn end of a file is ignored.
    """
    rows: dict[int, dict[str, Any]] = {}
    files = Path(folder).glob("events.out.tfevents.*")
    for file in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name)):
        for event in _events(file.read_bytes()):
            if event.session_log.status == SessionLog.START:
                rows = {step: row for step, row in rows.items() if step < event.step}
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    row = rows.setdefault(event.step, {"step": event.step})
                    row[value.tag] = value.simple_value
    return [rows[step] for step in sorted(rows)]


def _events(data: bytes):
    """The events of one file: records of length (8 bytes), its checksum (4), the event, its checksum (4)."""
    at = 0
    while at + 12 <= len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        if at + 16 + size > len(data):
            return
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
