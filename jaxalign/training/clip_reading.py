"""The clips that precompute stores, and whether one that cannot be read is skipped, waited for or ends the command."""

import contextlib
import errno
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxalign.data import faults, pipeline, precomputed, video
from jaxalign.data.clips import Clip, Source, Window, load
from jaxalign.data.containers import UnreadableVideo, tried
from jaxalign.data.patience import Patience, patiently
from jaxalign.training.makers import Options

LACKS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # what waiting does not help: this command takes too much
OTHERS = 8  # videos that are tried, to tell a broken place of a disk from one that is away


def decode(source, clip: Clip, found, options: Options, flips: int, split: str, unit: int, *, stop: threading.Event):
    """(item, label, the clip's versions uint8 [v,t,h,w,3]), or (item, the UnreadableVideo that says why not).

    Raises OSError, one line, where that is not the video's fault; `stop` ends what is waited for a disk.
    """
    left = Patience(stop)

    def read_of(window: Window, read: Callable[[], Any]) -> Any:
        return _told(read, left, lambda: _others_read(source, found["train"], window.item, unit, clip))

    try:
        if split == "held_out":
            row = pipeline.held_out_clip(source, found[split], clip, unit, options.held_out, left)
            if row["substituted"]:
                window = found[split][row["index"]]
                told = read_of(window, lambda: load(source, window, clip, np.random.default_rng(0), 0.5))
                if not isinstance(told, UnreadableVideo):  # it was a hiccup
                    row = pipeline.held_out_clip(source, found[split], clip, unit, options.held_out, left)
            return row["item"], int(row["label"]), row["video"][None]
        window = found[split][unit]
        told = read_of(window, lambda: _versions(source, window, clip, options, flips))
        return (window.item, told) if isinstance(told, UnreadableVideo) else (window.item, *told)
    except Exception as error:
        if faults.not_the_files(error):
            words = " ".join(str(error).split()) or type(error).__name__
            raise OSError(
                f"{words}: the machine or its disk is to blame, so no clip is skipped for it; once mended (fewer "
                f"--threads open fewer files and take less memory), {precomputed.AGAIN}: it goes on"
            ) from error
        raise
    finally:
        video.close_kept()  # the next window of a film is another thread's


def _told(read: Callable[[], Any], left: Patience, others_read: Callable[[], bool]) -> Any:
    """`tried`, and again while the disk is away; its answer for a file in a broken place of a disk too.

    That is one that cannot be read for EIO, where others_read(). Raises what else is the machine's or the disk's fault.
    """

    def once():
        try:
            return tried(read)
        except (UnreadableVideo, OSError) as error:
            numbers = faults.numbers(error)
            if numbers & LACKS:
                raise OSError(str(error)) from error  # not waited for
            if isinstance(error, UnreadableVideo) or not numbers:
                raise
            # Of the bytes of a file that looks damaged; it is in the error that led here.
            path = getattr(error.__context__, "path", "a video")
            raise UnreadableVideo(path, error.strerror or str(error)) from error

    try:
        return patiently(once, left)
    except UnreadableVideo as error:
        if faults.numbers(error) != {errno.EIO} or not others_read():
            raise
        left.disk_works()
        return UnreadableVideo(error.path, f"{error.why}; the disk gives other videos, not this one")


def _others_read(source: Source, found: Sequence[Window], item: int, unit: int, clip: Clip) -> bool:
    """Whether one of some other videos than `item` can be read.

    Which they are depends on `unit`: the system gives what was read just now out of its memory, disk or no disk.
    """
    for k in range(OTHERS):
        window = found[(unit + (2 * k + 1) * len(found) // (2 * OTHERS)) % len(found)]
        with contextlib.suppress(UnreadableVideo, OSError):
            if window.item != item:
                load(source, window, clip, np.random.default_rng(0), 0.5)
                return True
    return False


def _versions(source, window: Window, clip: Clip, options: Options, flips: int) -> tuple[int, np.ndarray]:
    """(label, the window's variants, each with its mirror image if there are flips)."""
    made = []
    for variant in range(options.variants):
        row = load(source, window, clip, np.random.default_rng(0), (variant + 0.5) / options.variants)
        made += [row["video"]] + [row["video"][:, :, ::-1]] * (flips - 1)
    return int(row["label"]), np.stack(made)
