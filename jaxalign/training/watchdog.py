"""What a run notices about itself: that it hangs, that it compiles again, and, asked to, where its time goes."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxalign.training import processes


class Watchdog:
    """Says so, with the stack of every thread, when nothing was done for `after` seconds; a context manager.

    With one process it then goes on watching. With several it ends the process with status 3: on GPUs a collective
    waits for ever for a process that is gone, and a launcher can only start again what has ended. 0 seconds: no dog.
    The clock starts with the first `alive`, since compiling takes as long as it takes.
    """

    def __init__(self, after: float | int, folder: str | Path, say: Callable[[str], None]):
        self.after, self.say = after, say
        self.path = Path(folder) / f"hang_process_{jax.process_index()}.txt"
        self._last: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self.after > 0:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def alive(self) -> None:
        """Something was done."""
        self._last = time.monotonic()

    def rest(self) -> None:
        """What comes now may take any time, until the next `alive`: call that as soon as it is done."""
        self._last = None

    def _watch(self) -> None:
        while not self._end.wait(min(self.after / 4, 5.0)):
            last = self._last
            if last is not None and time.monotonic() - last > self.after:
                self._report()
                self._last = time.monotonic() if self._last is not None else None

    def _report(self) -> None:
        several = jax.process_count() > 1
        then = (
            "this process ends; the same command on all goes on from the last checkpoint" if several else "waiting on"
        )
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
                file.flush()
                faulthandler.dump_traceback(file)
            where = f"the stacks of all threads are in {self.path}"
        except OSError:  # the folder may be what hangs
            faulthandler.dump_traceback(sys.stderr)
            where = "the stacks of all threads are above"
        line = f"warning: {processes.me()}: no step was done for {self.after:g} s; {where}; {then}"
        if several:
            print(line, file=sys.stderr, flush=True)
            os._exit(processes.LOST)
        self.say(line)


class Recompilations:
    """Says once when a jitted function that should have compiled once has compiled again."""

    def __init__(self, function: Callable, say: Callable[[str], None]):
        self._size, self.say, self._said = function._cache_size, say, False

    def check(self, step: int) -> None:
        """After step `step`."""
        if not self._said and self._size() > 1:
            self._said = True
            self.say(
                f"warning: the training step was compiled again at step {step}: its inputs changed their shape, dtype"
                " or placement; the batches of a run should all be alike"
            )


class Profile:
    """A trace of `steps` steps, written where TensorBoard's profile plugin and xprof find it; 0 steps: none.

    The first two steps are left out: one compiles, and the next one waits for it.
    """

    def __init__(self, steps: int, folder: str | Path, first: int, say: Callable[[str], None]):
        self.begin, self.end = first + 3, first + 3 + steps
        self.folder, self.say, self.running = Path(folder), say, False

    def before(self, step: int, last: int) -> None:
        """Call before step `step` of `last` is started."""
        if step == self.begin < self.end:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
            self.end = min(self.end, last)
        elif self.running and step >= self.end:
            self.stop()

    def stop(self, result=None) -> None:
        """End the trace, once what was started is done."""
        if self.running:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self.running = False
            self.say(f"profile of steps {self.begin} … {self.end - 1}: tensorboard --logdir {self.folder}")
