"""Which videos of a folder are for training, which are held out, and what their labels are: read from their paths.

The first that applies:
  sub-folders    `train` (or `sky_train`) and `test`, `val`, `valid`, `validation`, `held_out` (or `sky_test`), in any
                 case of letters, in the folder or inside of the one that holds everything; with both kinds there, what
                 lies outside of them is not used. CLASS/train and CLASS/test are splits where every video is in one.
  UCF-101's lists    trainlist01.txt and testlist01.txt (02, 03 with data.split) in the folder, or in `ucfTrainTestlist`
                     in it or beside it: what is in the first is trained on, what is in the second is held out
  chance    one file in twenty, by its name, of 20 or more; otherwise the beginning and the end of each file
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    missing: tuple[str, ...] = ()  # what lists name and nobody has


def layout(root: Path, names: Sequence[str], *, split: int = 1, unreadable: Sequence[str] = ()) -> Layout:
    """Splits and labels of the videos `names` (paths below `root`, with /).

    Labels are first-level folders (below those of the splits), none if a video that is used lies outside of them; with
    UCF-101's lists the folder that a video is in. SkyTimelapse's folders (sky_train/VIDEO/CLIP) are videos and no
    classes. `unreadable`: further videos, which are there and cannot be used. Raises ValueError, one line, for lists
    that do not belong together or name too many videos that are not there.
    """
    found = _in_folders(names) or _official(root, names, unreadable, split) or _by_chance(names)
    folders = {k: name.split("/")[:-1] for k, name in enumerate(found.inner) if found.splits[k] != "unused"}
    classes = tuple(sorted({parts[0] for parts in folders.values()})) if all(folders.values()) else ()
    number = {name: k for k, name in enumerate(classes)}
    labels = [number[folders[k][0]] if classes and k in folders else 0 for k in range(len(names))]
    return Layout(found.splits, labels, classes, found.notes, found.missing)


class _Found(NamedTuple):
    """The split of each name, and the names as labels are read from them; notes and missing as in Layout."""

    splits: list[str]
    inner: Sequence[str]
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def _in_folders(names: Sequence[str]) -> _Found | None:
    """The splits of folders that are named for them, None where there are not both kinds."""
    paths = [name.split("/") for name in names]
    around = _shared(paths)
    for depth in (around, around + 1):
        kinds = [_kind(parts, depth) for parts in paths]
        if not {"train", "held_out"} <= set(kinds) or (depth > around and None in kinds):
            continue
        # A folder around everything is no class, were it named for a split itself; those between it and the splits are.
        classes = slice(around, depth if len({parts[around] for parts in paths}) > 1 else around)
        inner = ["/".join(parts[classes] + parts[depth + 1 :]) for parts in paths]
        if any(parts[depth].lower().startswith("sky_") for parts, kind in zip(paths, kinds, strict=True) if kind):
            inner = [parts[-1] for parts in paths]
        outside = [name for name, kind in zip(names, kinds, strict=True) if kind is None]
        notes = ()
        if outside:
            folders = sorted({parts[depth] for parts, kind in zip(paths, kinds, strict=True) if kind})
            notes = (f"{_count(outside)} outside of {', '.join(folders)} not used: {_some(outside)}",)
        return _Found([kind or "unused" for kind in kinds], inner, notes)
    return None


def _by_chance(names: Sequence[str]) -> _Found:
    """One file in twenty; a note where folders at any depth look like splits that nobody follows."""
    paths = [name.split("/") for name in names]
    depth = _shared(paths)
    alone = bool(paths) and all(_kind(parts, depth) for parts in paths)  # a lone train folder is no class
    inner = names
    if alone:
        sky = any(parts[depth].lower().startswith("sky_") for parts in paths)
        inner = [parts[-1] if sky else "/".join(parts[depth + 1 :]) for parts in paths]
    below = [part for parts in paths for part in parts[depth:-1]]
    ignored = sorted({part for part in below if part.lower() in (*TRAIN, *HELD_OUT)})
    notes = ()
    if any(part.lower() in TRAIN for part in ignored) and any(part.lower() in HELD_OUT for part in ignored):
        notes = (
            f"warning: the split is by chance, though there are folders {', '.join(ignored)}: put them side by side in "
            "the folder that data.source names",
        )
    return _Found(split_by_name(names), inner, notes)


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many folders stand around all of the videos, up to the first that is named for a split."""
    for depth in itertools.count():
        folders = {parts[depth] if len(parts) > depth + 1 else "" for parts in paths}
        if len(folders) != 1 or folders <= {""} or _kind(paths[0], depth):
            return depth


def _kind(parts: Sequence[str], depth: int) -> str | None:
    """'train' or 'held_out' if the folder at that depth is named so."""
    folder = parts[depth].lower() if len(parts) > depth + 1 else ""
    return "train" if folder in TRAIN else "held_out" if folder in HELD_OUT else None


def _official(root: Path, names: Sequence[str], unreadable: Sequence[str], number: int) -> _Found | None:
    """What the lists of this number say, None where there are no lists of these videos."""
    lists = _lists(root, [*names, *unreadable], number)
    if lists is None:
        return None
    train, test, notes, missing = lists
    tails = [_tail(name) for name in names]
    splits = ["train" if t in train else "held_out" if t in test else "unused" for t in tails]
    return _Found(splits, ["/".join(name.split("/")[-2:]) for name in names], notes, missing)


def _lists(root: Path, names: Sequence[str], number: int) -> tuple[set[str], set[str], tuple, tuple] | None:
    """(train, test, notes, missing) of the lists of this number, None where there are no lists of these videos."""
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
        return train, test, *_checked(root, wanted, train, test, there)
    if number != 1 or numbers:
        known = f"there are those of split {', '.join(map(str, sorted(numbers)))}" if numbers else "none is"
        raise ValueError(f"data.split={number}: no {wanted[0]} in {root} or its ucfTrainTestlist ({known} there)")
    return None


def _checked(root: Path, lists: list[str], train: set[str], test: set[str], there: dict[str, str]) -> tuple:
    """Lines about what the lists and the videos do not share, and all that are missing; ValueError for too many."""
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
    return tuple(notes), tuple(missing)


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
