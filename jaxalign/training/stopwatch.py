"""Where the time of a run goes: training, waiting for data, and looking at the run (which counts as neither)."""

import contextlib
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.training import processes


class Stopwatch:
    """Steps, tokens and flops a second of training since the second step (the first one compiles), and what waits.

    `flops_per_step` is set when it is known; `peak` is what all devices together can do a second, None if unknown.
    """

    def __init__(self, tokens_per_step: int, peak: float | None = None):
        self.tokens_per_step, self.peak = tokens_per_step, peak
        self.flops_per_step = 0
        self.steps = 0
        self._start = self._waited = self._paused = 0.0
        self._blocked = 0.0  # never reset, as the mark of the interval is
        self._mark = (0, 0.0, 0.0, 0.0)  # steps, time, paused, blocked when `interval` was called last

    def count(self) -> None:
        """One step is done; the clock starts with the first."""
        self.steps += 1
        if self.steps == 1:
            self._start, self._waited, self._paused = time.perf_counter(), 0.0, 0.0
            self._mark = (1, self._start, 0.0, self._blocked)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is no training time."""
        before = time.perf_counter()
        yield
        self._paused += time.perf_counter() - before

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Time inside is waiting for the devices, and so perhaps for other processes."""
        before = time.perf_counter()
        yield
        self._blocked += time.perf_counter() - before

    def interval(self) -> tuple[float, float] | None:
        """(seconds a step, of which this host's own) since the last call; None before another step is done."""
        now = (self.steps, time.perf_counter(), self._paused, self._blocked)
        steps, elapsed, paused, blocked = (a - b for a, b in zip(now, self._mark, strict=True))
        if steps < 1 or self.steps < 2:
            return None
        self._mark = now
        return (elapsed - paused) / steps, max(elapsed - paused - blocked, 0.0) / steps

    def rates(self) -> dict[str, float]:
        """steps_per_second, tokens_per_second, data_wait_share, and what is known of flops; empty before step 2.

        flops_per_step counts what the mathematics needs, not what remat makes again; mfu is its share of `peak`.
        """
        elapsed = time.perf_counter() - self._start - self._paused
        if self.steps < 2 or elapsed <= 0:
            return {}
        rate = (self.steps - 1) / elapsed
        found = {
            "steps_per_second": rate,
            "tokens_per_second": rate * self.tokens_per_step,
            "data_wait_share": min(self._waited / elapsed, 1.0),
        }
        if self.flops_per_step:
            found |= {"flops_per_step": self.flops_per_step, "flops_per_second": rate * self.flops_per_step}
            if self.peak:
                found["mfu"] = found["flops_per_second"] / self.peak
        return found


# ---- slow hosts

INTERVALS, FACTOR, SHARE = 3, 1.5, 0.1


def slow_processes(intervals: Sequence[Sequence[tuple[float, float]]]) -> list[int]:
    """The processes whose host is slow: in each of the last INTERVALS, for each (seconds a step, own seconds).

    Slow is who needs FACTOR times the median of the others, when that makes SHARE of a step: the others wait for it.
    """
    if len(intervals) < INTERVALS:
        return []

    def slow(process: int, times: Sequence[tuple[float, float]]) -> bool:
        step, own = times[process]
        others = statistics.median(other for k, (_, other) in enumerate(times) if k != process)
        return own > FACTOR * others and own - others > SHARE * step

    return [p for p in range(len(intervals[-1])) if all(slow(p, times) for times in intervals[-INTERVALS:])]


class SlowHosts:
    """Names, once, each process whose host keeps the others waiting: by its decoding, its disk, its other programs.

    Devices that are slow themselves it cannot tell: whoever waits for a device waits for all.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._intervals: deque[list[tuple[float, float]]] = deque(maxlen=INTERVALS)
        self._named: set[int] = set()

    def __call__(self, interval: tuple[float, float] | None) -> None:
        """With what `Stopwatch.interval` gave; all processes must call it at the same steps."""
        if jax.process_count() == 1 or interval is None:
            return
        times = multihost_utils.process_allgather(np.asarray(interval, np.float32))
        self._intervals.append([(float(step), float(own)) for step, own in times])
        if found := [p for p in slow_processes(list(self._intervals)) if p not in self._named]:
            self._named |= set(found)
            hosts = [facts["host"] for facts in processes.gather({"host": socket.gethostname()})]
            own = times[:, 1]
            for p in found:
                self._say(
                    f"warning: process {p} of {len(own)} on {hosts[p]} keeps the others waiting: its host needs "
                    f"{own[p]:.3f} s a step, the median is {np.median(own):.3f} s; look at its disk, its loader "
                    "(data.workers) and what else runs there"
                )
