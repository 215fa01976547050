"""A read-only mapping from names to arrays whose bytes stay in the file until somebody touches them."""

import difflib
from collections.abc import Callable, Iterator, Mapping

import numpy as np


class LazyArrays(Mapping):
    """Mapping name -> array view of a memory-mapped file; looking a name up reads no bytes."""

    def __init__(self, views: dict[str, Callable[[], np.ndarray]], source: str):
        self._views = views
        self.source = source  # the file's path, for error messages

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
        return LazyArrays(views, self.source)

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return f"LazyArrays({len(self)} tensors of {self.source})"
