"""Which videos of a folder are for training, which are held out, and what their labels are: read from their paths.

The first that applies:
  sub-folders    `train` (or `sky_train`) and `test`, `val`, `valid`, `validation`, `held_out` (or `sky_test`)
  UCF-101's lists    trainlist01.txt and testlist01.txt (02, 03 with data.split) in the folder, or in `ucfTrainTestlist`
                     in it or beside it: what is in the first is trained on, what is in the second is held out
  chance    one file in twenty, by its name, of 20 or more; otherwise the beginning and the end of each file
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from jaxalign.data.clips import split_by_name

TRAIN, HELD_OUT = ("train", "sky_train"), ("test", "val", "valid", "validation", "held_out", "sky_test")
MISSING_SHARE = 0.05  # of the videos that lists name; with more missing the folder is not what the lists are about
SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the paths of videos say, parallel to them, and lines about it for the first screen."""

    splits: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def layout(root: Path, names: Sequence[str], *, split: int = 1, unreadable: Sequence[str] = ()) -> Layout:
    """Splits and labels of the videos `names` (paths below `root`, with /).

    Labels are first-level folders (below those of the splits), none if a video lies outside of them. SkyTimelapse's
    folders (sky_train/VIDEO/CLIP) are videos and no classes. `unreadable`: further videos, which are there and cannot
    be used. Raises ValueError, one line, for lists that do not belong together or name too many videos that are not
    there.
    """
    splits, inner, notes = _splits(root, names, unreadable, split)
    folders = [name.split("/")[:-1] for name in inner]
    classes = tuple(sorted({parts[0] for parts in folders})) if all(folders) else ()
    return Layout(splits, [classes.index(p[0]) if classes else 0 for p in folders], classes, notes)


def _splits(root: Path, names, unreadable, split: int) -> tuple[list[str], Sequence[str], tuple[str, ...]]:
    """The split of each name, the names as labels are read from them, and notes."""
    first = [name.split("/")[0] if "/" in name else "" for name in names]
    if set(first) & set(TRAIN) and set(first) & set(HELD_OUT) and set(first) <= {*TRAIN, *HELD_OUT}:
        splits = ["train" if folder in TRAIN else "held_out" for folder in first]
        sky = any(folder.startswith("sky_") for folder in first)
        return splits, [name.rsplit("/", 1)[-1] if sky else name.split("/", 1)[1] for name in names], ()
    if found := _official(root, [*names, *unreadable], split):
        train, test, notes = found
        tails = [_tail(name) for name in names]
        return ["train" if t in train else "held_out" if t in test else "unused" for t in tails], names, notes
    return split_by_name(names), names, ()


def _official(root: Path, names: Sequence[str], number: int) -> tuple[set[str], set[str], tuple[str, ...]] | None:
    """(train, test, notes) of the lists of this number, None where there are no lists of these videos."""
    wanted = [f"{kind}list{number:02d}.txt" for kind in ("train", "test")]
    there = {_tail(name): name for name in names}
    numbers: set[int] = set()
    beside = root.parent / "ucfTrainTestlist"
    for place in (root, root / "ucfTrainTestlist", beside):
        lacking = [name for name in wanted if not (place / name).is_file()]
        if len(lacking) == 1:
            other = next(name for name in wanted if name not in lacking)
            raise ValueError(f"data.source={str(root)!r}: {place} has {other} and lacks {lacking[0]}")
        if lacking:
            found = (re.fullmatch(r"(?:train|test)list(\d+)", file.stem) for file in place.glob("*list*.txt"))
            numbers |= {int(match[1]) for match in found if match}
            continue
        train, test = (_listed(place / name) for name in wanted)
        if place == beside and not (train | test) & there.keys():
            continue  # those of another folder
        return train, test, _checked(root, wanted, train, test, there)
    if number != 1 or numbers:
        known = f"there are those of split {', '.join(map(str, sorted(numbers)))}" if numbers else "none is"
        raise ValueError(f"data.split={number}: no {wanted[0]} in {root} or its ucfTrainTestlist ({known} there)")
    return None


def _checked(root: Path, lists: list[str], train: set[str], test: set[str], there: dict[str, str]) -> tuple[str, ...]:
    """Lines about what the lists and the videos do not share; ValueError where that is too much."""
    named, listed = " and ".join(lists), train | test
    if both := sorted(train & test):
        raise ValueError(f"data.source={str(root)!r}: {_count(both)} stand in both {named}: {_some(both)}")
    missing, unlisted = sorted(listed - there.keys()), sorted(there[tail] for tail in there.keys() - listed)
    lost = f"{len(missing):,} of the {len(listed):,} videos in {named} are not there"
    if len(missing) > MISSING_SHARE * len(listed):
        raise ValueError(
            f"data.source={str(root)!r}: {lost} ({len(missing) / len(listed):.1%}, more than {MISSING_SHARE:.0%}): "
            f"{_some(missing)}; complete the folder or, if these are to be left out, take them out of the lists"
        )
    found = [sum(tail in tails for tail in there) for tails in (train, test)]
    notes = [f"split by {named}: {found[0]:,} videos to train on, {found[1]:,} held out"]
    if missing:
        notes.append(f"{lost}: {_some(missing)}")
    if unlisted:
        notes.append(f"{_count(unlisted)} in neither list and not used: {_some(unlisted)}")
    return tuple(notes)


def _listed(path: Path) -> set[str]:
    """The videos that a list names; trainlist has the number of the class behind each."""
    lines = (re.sub(r"\s+\d+$", "", line.strip()) for line in path.read_text().splitlines())
    return {_tail(line.replace("\\", "/")) for line in lines if line}


def _tail(name: str) -> str:
    """CLASS/VIDEO without the file's ending: the videos may have been encoded anew, or be folders of frames."""
    return re.sub(r"\.[A-Za-z0-9]{2,4}$", "", "/".join(name.split("/")[-2:]))


def _count(names: Sequence[str]) -> str:
    return f"{len(names):,} video{'' if len(names) == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", … ({len(names) - SHOWN:,} more)" if len(names) > SHOWN else "")
