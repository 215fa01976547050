"""What a person sees of a run: first screen, progress, log.txt, TensorBoard, summary.json.

Only process 0 reports; on the others every method of `Report` returns at once. Reports are not worth a run:
when they cannot be written (full disk, closed pipe), training goes on with one warning and a count.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxalign.interop.sealed import write_atomic
from jaxalign.training import environment, tensorboard


def plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays as lists, paths as text, NaN and infinities as 'nan' and 'inf'."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file or it holds none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def merge_json(path: str | Path, values: Mapping[str, Any], *, whole: Collection[str] = ()) -> dict[str, Any]:
    """Put `values` into the JSON object at `path`, atomically, dicts into dicts; returns the whole object.

    `whole`: the entries that are put in the place of the old ones instead.
    """

    def merge(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        return old | {key: merge(old.get(key), entry) for key, entry in new.items()}

    old = {name: entry for name, entry in read_json(path).items() if name not in whole or name not in values}
    merged = merge(old, plain(values))
    write_atomic(Path(path), json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    return merged


def duration(seconds: float | int) -> str:
    """Seconds for people: '0:42', '1:02:03', '?' when unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def first_screen(trees: Mapping[str, Any], *, mesh: Mesh | None = None, facts: Mapping[str, Any] | None = None) -> str:
    """What a run says before it starts: devices, mesh, `facts`, parameters of each tree and its parts."""
    here = environment.environment()
    cores = f", {here['cpu_cores']} cores" if here["platform"] == "cpu" else ""
    processes = f" in {here['processes']} processes" if here["processes"] > 1 else ""
    lines = [("devices", f"{here['devices']} × {here['device_kind']} ({here['platform']}{cores}){processes}")]
    if mesh is not None:
        lines.append(("mesh", " · ".join(f"{axis} {size}" for axis, size in mesh.shape.items())))
    lines += [(str(name), str(value)) for name, value in (facts or {}).items()]
    for title, tree in trees.items():
        parts = environment.parameters_by_part(tree)
        counts = " · ".join(f"{name} {count:,}" for name, count in parts.items()) if len(parts) > 1 else ""
        lines.append((title, f"{sum(parts.values()):,} parameters" + (f": {counts}" if counts else "")))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def printable(text: str, encoding: str | None = None) -> str:
    """The text as a stream of that encoding takes it: names of files need not be UTF-8, and screens may be ASCII."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Screen:
    """A text stream that may break (a closed pipe, a full disk behind it): what it refuses is counted and forgotten.

    tqdm writes to it too: it keeps its lock where a write raises, and the next thread to speak would wait for ever.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.failures, self.reason = 0, ""

    def _refused(self, error: OSError) -> None:
        self.failures += 1
        self.reason = self.reason or error.strerror or str(error)

    def write(self, text: str) -> int:
        try:
            self._stream.write(printable(text, getattr(self._stream, "encoding", None)))
        except OSError as error:
            self._refused(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._refused(error)

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding
        return getattr(self._stream, name)

    def let_go(self) -> None:
        """Python flushes its output once more at its end, and would leave with status 120 where that still fails."""
        try:
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


class Report:
    """The reports of one run in its workdir; a context manager.

    Every line said goes to the screen and, with the time, to log.txt. `progress` drives a bar on a terminal
    and prints a line every `line_every` seconds elsewhere.
    """

    def __init__(self, workdir: str | Path, *, line_every: float | int = 15, screen: Any = None):
        self.workdir = Path(workdir)
        self.active = jax.process_index() == 0
        self._failed_writes = 0
        self.warnings = 0
        self._screen = _Screen(screen or sys.stdout)
        self._terminal = self._screen.isatty()
        self._line_every = line_every
        self._lock = threading.RLock()  # checkpoints speak from their own thread
        self._said_gaps = self._said_screen = False
        self._bar: tqdm | None = None
        self._events = None
        self._first = self._last = 0
        self.seconds_to_first_step: float | None = None  # since the process was started
        self._marks: deque[tuple[int, float]] = deque(maxlen=21)
        self._next_line = 0.0
        if self.active:
            self.workdir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Within it an OSError (a full disk) is counted and, the first time, said; for any report."""
        try:
            yield
        except OSError as error:
            self._failed_writes += 1
            if not self._said_gaps:
                self._said_gaps = True
                reason = error.strerror or str(error)
                self._show(f"warning: {what} could not be written ({reason}); training goes on, reports have gaps")

    def _show(self, text: str) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.write(text, file=self._screen)
            else:
                print(text, file=self._screen, flush=True)

    @property
    def failed_writes(self) -> int:
        """How often something of the reports could not be written, the screen's lines among them."""
        return self._failed_writes + self._screen.failures

    def _log(self, text: str) -> None:
        if self._screen.failures and not self._said_screen:
            self._said_screen = True
            text += f"\nwarning: the screen could not be written ({self._screen.reason}); training goes on, see here"
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with (
            self._lock,
            self.writing("log.txt"),
            open(self.workdir / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as log,
        ):
            log.writelines(f"{stamp}  {line}\n" for line in text.splitlines())

    def say(self, text: str) -> None:
        """Print a text above the progress bar and put it into log.txt; may be called from any thread."""
        if self.active:
            self.warnings += text.startswith("warning")
            self._show(text)
            self._log(text)

    def first_screen(
        self, trees: Mapping[str, Any], *, mesh: Mesh | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Say the first screen, and write the table of all parameters to parameters.txt."""
        if self.active:
            self.say(first_screen(trees, mesh=mesh, facts=facts))
            with self.writing("parameters.txt"):
                write_atomic(self.workdir / "parameters.txt", environment.parameters_table(trees))

    # ---- progress

    def start(self, first: int, last: int) -> None:
        """Begin the progress behind step `first` of `last`; TensorBoard forgets what was logged after it."""
        self._first, self._last = first, last
        self._marks.append((first, time.monotonic()))
        if not self.active:
            return
        with self.writing("tensorboard"):
            self._events = tensorboard.open_events(self.workdir / "tensorboard", first_step=self._next)
        if self._terminal:
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]{postfix}"
            # Some terminals (in containers) say that they have no columns and no rows, and tqdm believes it.
            sized = shutil.get_terminal_size((0, 0)).columns > 0
            width = {"dynamic_ncols": True} if sized else {"ncols": 100, "nrows": 20}
            self._bar = tqdm(initial=first, total=last, file=self._screen, bar_format=form, **width)

    @property
    def _next(self) -> int:
        """The step from which TensorBoard forgets: a resumed run's first one; what was logged at `first` stays."""
        return self._first + 1 if self._first else 0

    def progress(self, step: int, **numbers: Any) -> None:
        """Step `step` is done. `numbers` (a loss, ...) are shown beside speed and remaining time."""
        now = time.monotonic()
        self._marks.append((step, now))
        if not self.active:
            return
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in numbers.items())
        if math.isfinite(self.steps_per_second):
            text += f"  {self.steps_per_second:.3g} steps/s  ETA {duration(self.seconds_left)}"
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = environment.seconds_since_start()
            text += f"  {self.seconds_to_first_step:.1f} s from the start to this step"
        if self._bar is not None:
            with self._lock:
                self._bar.set_postfix_str(text.strip(), refresh=False)
                self._bar.update(step - self._bar.n)
        if now >= self._next_line or step == self._last:
            self._next_line = now + self._line_every
            line = f"step {step}/{self._last}  {text.strip()}"
            if self._bar is None:
                self._show(line)
            self._log(line)

    @property
    def steps_per_second(self) -> float:
        """The median speed of the last 20 calls of `progress`, pauses and compiling left out. NaN before the second."""
        marks = list(self._marks)
        times = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(marks) if b[0] > a[0]]
        times = times[1:] if marks and marks[0][0] == self._first else times  # the first step compiles
        middle = statistics.median(times) if times else math.nan
        return 1 / middle if middle else math.nan

    @property
    def seconds_left(self) -> float:
        """The remaining steps at that speed; NaN while it is unknown."""
        return (self._last - self._marks[-1][0]) / self.steps_per_second if self._marks else math.nan

    # ---- TensorBoard

    def _write_events(self, write: Callable[..., None], *arguments: Any) -> None:
        if self.active:
            with self._lock, self.writing("tensorboard"):
                if self._events is None:
                    self._events = tensorboard.open_events(self.workdir / "tensorboard", first_step=self._next)
                write(self._events, *arguments)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers under their tags, e.g. {'train/loss': 0.5}."""
        if self.active:  # before the numbers are fetched from the devices
            numbers = {tag: float(value) for tag, value in values.items()}
            self._write_events(tensorboard.add_scalars, step, numbers)

    def image(self, step: int, tag: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """An RGB image."""
        self._write_events(tensorboard.add_image, step, tag, image)

    def video(self, step: int, tag: str, video: UInt8[np.ndarray, "t h w 3"], fps: float | int) -> None:
        """A clip, shown as a moving GIF."""
        self._write_events(tensorboard.add_video, step, tag, video, fps)

    def figure(self, step: int, tag: str, figure: Figure) -> None:
        """A matplotlib figure."""
        self._write_events(tensorboard.add_figure, step, tag, figure)

    # ---- summary and end

    def summary(self, values: Mapping[str, Any], *, whole: Collection[str] = ()) -> None:
        """Merge `values` into summary.json as `merge_json`: what is there already stays."""
        if self.active:
            with self.writing("summary.json"):
                merge_json(self.workdir / "summary.json", values, whole=whole)

    def close(self) -> None:
        """End the bar and the event file."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            if self._events is not None:
                with self.writing("tensorboard"):
                    self._events.close()
                self._events = None
            self._screen.let_go()
