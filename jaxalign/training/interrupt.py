"""SIGTERM and Ctrl-C end a run between two steps, not in the middle of one."""

import signal
from collections.abc import Callable


class Interrupts:
    """Context in which the first SIGTERM or SIGINT is remembered and a second one acts at once.

    True in a condition once a signal came; `status` is the shell's exit status for it. Outside of the main thread
    (a notebook's worker, a test) nothing is caught.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.signal, self._before = say, None, {}

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's name, as people know it."""
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name

    @property
    def status(self) -> int:
        """128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal

    def __enter__(self) -> "Interrupts":
        try:
            self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # only the main thread may
            self._before = {}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
        self.say(f"{self.name}: finishing this step and saving; once more to stop at once")
