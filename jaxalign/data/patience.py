"""A disk that is away for a while: what failed for its sake is read again before anything stands in for it."""

import dataclasses
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from jaxalign.data.containers import UnreadableVideo
from jaxalign.data.faults import not_the_files

Answer = TypeVar("Answer")

WAITS = (1, 2, 5, 10, 30, 60, 60)  # seconds: a file server that starts again is back within a minute or two
QUIET = 600.0  # seconds: a part of a disk fails; each of its files would cost all the waits, and a batch has many


def sleep(seconds: float | int, stop: threading.Event | None = None) -> None:
    """Pause, at most until `stop` is set."""
    if stop is None:
        time.sleep(seconds)
    else:
        stop.wait(seconds)


class _Known:
    """What this process has said, what it has given up, and until when it waits for nothing else."""

    def __init__(self):
        self.lock, self.quiet_until = threading.Lock(), 0.0
        # A single file in a broken place of a disk that works: nobody waits for it in every epoch.
        self.given_up: set[str] = set()
        self.works_until = 0.0


_known = _Known()
_stops: weakref.WeakSet[threading.Event] = weakref.WeakSet()  # of the streams that decode in this process


@dataclasses.dataclass
class Patience:
    """What one batch may still wait: for all its files together little more than for one, or a watchdog ends the run.

    `stop` ends a wait when it is set, and there are no more then.
    """

    stop: threading.Event | None = None
    left: float | int = dataclasses.field(default_factory=lambda: 2 * sum(WAITS))
    in_vain: bool = False  # a file was waited for, or was not because others had been, and cannot be read

    def waits(self) -> Iterator[float | int]:
        """The seconds of WAITS, each when they have passed; fewer where less is left or `stop` is set."""
        for wait in WAITS:
            if wait > self.left or self.stopped:
                return
            self.left -= wait
            sleep(wait, self.stop)
            if self.stopped:
                return
            yield wait

    @property
    def stopped(self) -> bool:
        return self.stop is not None and self.stop.is_set()

    def disk_works(self) -> None:
        """Another file was read: what was waited for in vain was that file alone, so wait for no others for a while."""
        if self.in_vain:
            _known.works_until = time.monotonic() + QUIET
        self.in_vain = False


def patiently(read: Callable[[], Answer], patience: Patience) -> Answer:
    """read(), and again after each wait where it failed for the machine's or the disk's sake.

    Raises the UnreadableVideo that came last; at once if it is the file's own, of a file that was waited for before,
    or while the disk is known to work for others.
    """
    try:
        return read()
    except UnreadableVideo as error:
        if error.path in _known.given_up or not not_the_files(error):
            raise
        patience.in_vain = True
        if time.monotonic() < _known.works_until:
            raise
        say_once(f"{error}; it is read again for up to {sum(WAITS)} s")
        last, before = error, patience.left
    for _ in patience.waits():
        try:
            answer = read()
        except UnreadableVideo as error:
            if not not_the_files(error):
                raise
            last = error
        else:
            patience.in_vain = False
            return answer
    if patience.stopped:
        patience.in_vain = False  # nobody knows
    elif before - patience.left == sum(WAITS):
        _known.given_up.add(last.path)
    raise last


def new_stop() -> threading.Event:
    """The `stop` of a stream that decodes in threads of this process; see `hurry` and `end`."""
    stop = threading.Event()
    _stops.add(stop)
    return stop


def end(stop: threading.Event) -> None:
    """Ends the waits of a stream that is closed."""
    _stops.discard(stop)  # first: a signal's handler that comes amid set() would wait for its lock for ever
    stop.set()


def hurry() -> None:
    """End the waits of all streams of this process, for good; of a signal's handler, which leaves seconds to save.

    Clips that cannot be read are substituted then. Decode processes are not reached: their waits take their time.
    """
    for stop in list(_stops):
        stop.set()


def say_once(text: str) -> None:
    """A warning on stderr; one for all that a process meets while it waits."""
    with _known.lock:
        if time.monotonic() < _known.quiet_until:
            return
        _known.quiet_until = time.monotonic() + sum(WAITS)
    print("warning: " + " ".join(text.split()), file=sys.stderr, flush=True)
