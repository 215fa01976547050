"""Where the time of a run goes: training, waiting for data, and looking at the run (which counts as neither)."""

import contextlib
import time


class Stopwatch:
    """Steps and tokens a second of training since the second step (the first one compiles), and the data-wait share."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.steps = 0
        self._start = self._waited = self._paused = 0.0

    def count(self) -> None:
        """One step is done; the clock starts with the first."""
        self.steps += 1
        if self.steps == 1:
            self._start, self._waited, self._paused = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Time inside is waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self):
        """Time inside is no training time."""
        before = time.perf_counter()
        yield
        self._paused += time.perf_counter() - before

    def rates(self) -> dict[str, float]:
        """steps_per_second, tokens_per_second and data_wait_share; empty before the second step."""
        elapsed = time.perf_counter() - self._start - self._paused
        if self.steps < 2 or elapsed <= 0:
            return {}
        rate = (self.steps - 1) / elapsed
        return {
            "steps_per_second": rate,
            "tokens_per_second": rate * self.tokens_per_step,
            "data_wait_share": min(self._waited / elapsed, 1.0),
        }
