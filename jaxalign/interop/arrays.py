"""A read-only mapping from names to arrays whose bytes stay in the file until somebody touches them."""

import difflib
import mmap
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

import numpy as np


class LazyArrays(Mapping):
    """Mapping name -> array view of a memory-mapped file; looking a name up reads no bytes."""

    def __init__(
        self, views: dict[str, Callable[[], np.ndarray]], source: str, release: Callable[[], None] = lambda: None
    ):
        self._views = views
        self.source = source  # the file's path, for error messages
        self.release = release  # takes the pages that were read out of this process; they are read again on demand

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            view = self._views[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self._views, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" ({len(self._views)} others are there)"
            raise KeyError(f"{self.source}: no tensor {name!r}{hint}") from None
        return view()

    def below(self, prefix: str) -> "LazyArrays":
        """The tensors whose names start with `prefix`, which is cut off. Raises ValueError for none."""
        views = {n[len(prefix) :]: view for n, view in self._views.items() if n.startswith(prefix)}
        if not views:
            first = next(iter(self._views), None)
            raise ValueError(f"{self.source}: no tensor's name starts with {prefix!r}; the first is {first!r}")
        return LazyArrays(views, self.source, self.release)

    def without_shared_words(self) -> list["LazyArrays"]:
        """These arrays; where all names begin with the same word ('module.'), those below it; so up to three words.

        Whoever trains in several processes, or inside a bigger module, saves such names.
        """
        found = [self]
        for _ in range(3):
            words = {name.partition(".")[:2] for name in found[-1]}
            if len(words) != 1 or "." not in (word := "".join(*words)):
                break
            found.append(found[-1].below(word))
        return found

    def fitting(self, wanted: Callable[[], Container[str]]) -> "LazyArrays":
        """Of `without_shared_words` the one with the most names of `wanted()`, which is asked only for a choice."""
        found = self.without_shared_words()
        if len(found) == 1:
            return self
        names = wanted()
        return max(found, key=lambda arrays: sum(name in names for name in arrays))

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return f"LazyArrays({len(self)} tensors of {self.source})"


def map_file(path: str | Path) -> tuple[np.ndarray, Callable[[], None]]:
    """(the bytes of a file as a read-only memory map, a function that gives its pages back to the system)."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Pages once read count as this process's memory until somebody needs the room: as much again as the model.
    give_back = getattr(mmap, "MADV_DONTNEED", None)
    release = (lambda: None) if give_back is None else (lambda: mapped.madvise(give_back))
    return np.frombuffer(mapped, np.uint8), release
