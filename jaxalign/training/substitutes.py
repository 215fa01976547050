"""Clips that could not be read while a run trains: named when they are met, counted over all processes."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.training import processes

SAID, SHARE = 3, 0.01


class Substitutes:
    """Where others stand in for clips that cannot be read (`data.pipeline.Batches`).

    Each process writes a video once, when it is first met, into WORKDIR/unreadable_PROCESS.txt: a run of days that
    loses a disk shows it then, and after a kill too. The first SAID are said, and a share above SHARE is, once.
    """

    def __init__(self, workdir: Path, say: Callable[[str], None]):
        self.counts: Counter[str] = Counter()
        self._path = workdir / f"unreadable_{jax.process_index()}.txt"
        self._say = say
        self._now, self._all = np.zeros(2), np.zeros(2)  # clips replaced, clips seen
        self._warned = False

    def note(self, names: Sequence[str], seen: int) -> None:
        """The videos that could not be read in a batch of which this process has `seen` clips."""
        self._now += len(names), seen
        new = [name for name in dict.fromkeys(names) if name not in self.counts]
        said = len(self.counts)
        self.counts.update(names)
        if not new:
            return
        for name in new[: max(SAID - said, 0)]:
            self._say(f"warning: {name} cannot be read; another clip stands in. Such videos are named in {self._path}")
        try:
            # Names of files need not be UTF-8; Python has surrogates in them then.
            with self._path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(f"{name}\n" for name in new)
        except OSError as error:  # a full disk ends no run
            self._say(f"warning: {self._path} could not be written ({error})")

    def share(self) -> float:
        """Share of all clips since the last call that were replaced; every process must call it at the same steps."""
        now, self._now = self._now, np.zeros(2)
        if jax.process_count() > 1:
            now = multihost_utils.process_allgather(now.astype(np.float32)).sum(axis=0)
        self._all += now
        replaced, seen = self._all
        if seen and replaced / seen > SHARE and not self._warned:
            self._warned = True
            self._say(
                f"warning: {replaced / seen:.1%} of the clips so far could not be read, and others stood in for them: "
                f"look at the disk of data.source; {self._path.with_name('unreadable_*.txt')} names them"
            )
        return float(now[0] / max(now[1], 1))

    def of_all(self) -> dict[str, int]:
        """{video: how often it was replaced} since the start, of all processes, all of which must call it."""
        if jax.process_count() == 1:
            return dict(self.counts)
        return dict(sum(map(Counter, processes.gather(self.counts)), Counter()))
