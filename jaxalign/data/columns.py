"""Long lists as a few arrays: what decode workers are given, each of which holds a copy of its own.

Of half a million videos the lists of objects are 650 MB and take seconds to send and to build again; the arrays are a
tenth of that and are sent as they lie in memory.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxalign.data.clips import Clip, Source, Window


@dataclasses.dataclass(frozen=True, eq=False)
class Texts(Sequence[str]):
    """Strings one after the other: what all begin with, the bytes of what is left, and where each ends."""

    shared: str
    joined: bytes
    ends: Int64[np.ndarray, "m"]  # one more than there are strings: the first is 0

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        # What the first and the last by name begin with, all begin with.
        first, last = (min(texts), max(texts)) if texts else ("", "")
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        shared = "".join(letter for letter, _ in same)
        # The names of files need not be UTF-8; Python has surrogates in them then.
        rest = [text[len(shared) :].encode("utf-8", "surrogatepass") for text in texts]
        return cls(shared, b"".join(rest), np.cumsum([0, *map(len, rest)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> str:
        k = range(len(self))[number]
        rest = self.joined[self.ends[k] : self.ends[k + 1]]
        return self.shared + rest.decode("utf-8", "surrogatepass")


class Told(NamedTuple):
    """What reading a clip asks of a `clips.Item`."""

    name: str
    label: int


@dataclasses.dataclass(frozen=True, eq=False)
class Items(Sequence[Told]):
    """The items of a source."""

    names: Texts
    labels: Int64[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Told:
        return Told(self.names[number], int(self.labels[number]))


@dataclasses.dataclass(frozen=True, eq=False)
class Windows(Sequence[Window]):
    """Windows as rows of item, start, stop; -1 for a stop that is not known."""

    rows: Int64[np.ndarray, "n 3"]

    @classmethod
    def of(cls, windows: Sequence[Window]) -> "Windows":
        rows = [(window.item, window.start, -1 if window.stop is None else window.stop) for window in windows]
        return cls(np.array(rows, np.int64).reshape(-1, 3))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Window:
        item, start, stop = self.rows[number].tolist()
        return Window(item, start, None if stop < 0 else stop)


def to_send(source: Source, clip: Clip) -> Source:
    """The source as decode workers need it: it gives the same clips of this kind, and is good for nothing else."""
    items = Items(Texts.of([item.name for item in source.items]), np.array([i.label for i in source.items], np.int64))
    packed = getattr(source.read, "packed", None)
    read = source.read if packed is None else packed((clip.height, clip.width))
    nothing = {"skipped": (), "notes": (), "missing": (), "captions": (), "tokens": None, "embedded": None}
    return dataclasses.replace(source, items=items, read=read, **nothing)
