"""A disk that is away for a while: what failed for its sake is read again before anything stands in for it."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxalign.data.containers import UnreadableVideo
from jaxalign.data.faults import not_the_files

Answer = TypeVar("Answer")

WAITS = (1, 2, 5, 10, 30, 60, 60)  # seconds: a file server that starts again is back within a minute or two
sleep = time.sleep


class _Known:
    """What this process has said and what it has given up."""

    def __init__(self):
        self.lock, self.quiet_until = threading.Lock(), 0.0
        # A single file in a broken place of a disk that works: nobody waits for it in every epoch.
        self.given_up: set[str] = set()


_known = _Known()


def patiently(read: Callable[[], Answer], waits: Sequence[int] = WAITS) -> Answer:
    """read(), and again after each of `waits` where it failed for the machine's or the disk's sake.

    Raises the UnreadableVideo that came last; at once if it is the file's own, or of a file that was waited for before.
    """
    for wait in waits:
        try:
            return read()
        except UnreadableVideo as error:
            if error.path in _known.given_up or not not_the_files(error):
                raise
            say_once(f"{error}; it is read again for up to {sum(waits)} s")
        sleep(wait)
    try:
        return read()
    except UnreadableVideo as error:
        if waits and not_the_files(error):
            _known.given_up.add(error.path)
        raise


def say_once(text: str) -> None:
    """A warning on stderr; one for all that a process meets while it waits."""
    with _known.lock:
        if time.monotonic() < _known.quiet_until:
            return
        _known.quiet_until = time.monotonic() + sum(WAITS)
    print("warning: " + " ".join(text.split()), file=sys.stderr, flush=True)
