"""Clips that were computed before training: a folder of ArrayRecord shards.

    FOLDER/precomputed.json                             which clips they are (`Clips`)
    FOLDER/SERIES.series.json                           what one array a clip is, and what decided it (`Series`)
    FOLDER/SERIES-SPLIT-00017-of-00128.array_record     its records, each the plain bytes of one array
    FOLDER/SERIES-SPLIT-00017-of-00128.array_record.json   what is in that shard, and how many bytes it has

A shard appears under its name when it is whole and never changes; several processes may write into one folder. The
clips are numbered split by split in the order of the source's windows, so a run that draws from the folder meets them
in the order of a run that decodes. A clip has `variants` x `flips` versions; which one is seen is drawn like the offset
and the flip of a decoded one, from (seed, place in the order).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from jaxalign.interop.sealed import sync, write_atomic

NAME, FORMAT = "precomputed.json", 1
AGAIN = "run the same `python -m jaxalign.precompute` again"


@dataclasses.dataclass(frozen=True)
class Clips:
    """Which clips a folder is of; all of its series are of the same ones."""

    fields: dict[str, Any]  # the config fields that decide it
    windows: dict[str, int]  # by split
    variants: int = 1  # clips a training window, evenly spread over it; a held-out one has one
    flips: int = 1  # 2: each training clip and its mirror image
    classes: tuple[str, ...] = ()
    about: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)  # for people

    def versions(self, split: str) -> int:
        """Records a clip."""
        return self.variants * self.flips if split == "train" else 1


@dataclasses.dataclass(frozen=True)
class Series:
    """One array a clip (or a prompt), and what decides it."""

    name: str
    fields: dict[str, Any]  # the config fields that decide it, apart from the clips'
    dtype: str
    shape: tuple[int, ...]  # of a prompt: rows that are missing at the end of a record are zero
    counts: dict[str, int]  # clips by split, or prompts
    per_shard: int  # of these
    about: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def shards(self, split: str) -> list[str]:
        """The names of its files for a split, in order."""
        count = -(-self.counts.get(split, 0) // self.per_shard)
        return [f"{self.name}-{split}-{k:05d}-of-{count:05d}.array_record" for k in range(count)]

    def units(self, split: str, shard: int) -> range:
        """The clips or prompts in a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.counts[split]))


@dataclasses.dataclass(frozen=True)
class Folder:
    """What is, or is to be, in a folder."""

    path: Path
    clips: Clips
    series: dict[str, Series]


# ---- manifests


def is_precomputed(path: str | Path) -> bool:
    """Whether `python -m jaxalign.precompute` made, or is making, this folder."""
    return (Path(path).expanduser() / NAME).is_file()


def digest(fields: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the fields that decide a content."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """'data.height: 480 there, 256 here; …' of two sets of fields, '' if they are equal."""
    named = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    return "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in named)


def open_folder(path: str | Path) -> Folder:
    """The manifests of a folder. Raises FileNotFoundError where precompute made none, ValueError for damaged ones."""
    path = Path(path).expanduser()
    if not is_precomputed(path):
        raise FileNotFoundError(f"{path}: no {NAME} in it; `python -m jaxalign.precompute --out {path}` makes one")
    clips = _read(path / NAME, Clips)
    series = (_read(file, Series) for file in sorted(path.glob("*.series.json")))
    return Folder(path, clips, {s.name: s for s in series})


def claim(path: Path, clips: Clips) -> Folder:
    """The folder at `path`, made if it is not there, for these clips.

    Raises ValueError for a folder of other clips, naming what differs; FileExistsError for one with other things in it.
    """
    if not is_precomputed(path):
        foreign = path.exists() and (not path.is_dir() or any(NAME not in file.name for file in path.iterdir()))
        if foreign and not is_precomputed(path):  # again: another process may have been faster
            raise FileExistsError(f"{path} holds something else; give another --out")
        path.mkdir(parents=True, exist_ok=True)
        _write(path / NAME, clips)
    folder = open_folder(path)
    if differ := differences(_compared(folder.clips), _compared(clips)):
        raise ValueError(f"{path} was made for other clips ({differ}); give another --out")
    return folder


def claim_series(folder: Folder, series: Series) -> Series:
    """The series of that name in the folder, written down if it is new; its shards are as large as they are there.

    Raises ValueError for one of another content, naming what differs.
    """
    found = folder.series.get(series.name)
    if found is None:
        _write(folder.path / f"{series.name}.series.json", series)
        return series
    if differ := differences(_compared(found), _compared(series)):
        raise ValueError(f"{folder.path} has other {series.name} ({differ}); give another --out")
    return found


def _compared(entry: Clips | Series) -> dict[str, Any]:
    tree = json.loads(json.dumps(dataclasses.asdict(entry)))
    return tree.pop("fields") | {k: v for k, v in tree.items() if k not in ("about", "per_shard")}


def _write(path: Path, entry: Clips | Series) -> None:
    text = json.dumps({"format": FORMAT, "hash": digest(entry.fields), **dataclasses.asdict(entry)}, indent=1)
    write_atomic(path, text + "\n")


def _read(path: Path, kind: type) -> Any:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        written, stored = tree.pop("format"), tree.pop("hash")
        entry = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}); precompute into another folder") from None
    if written != FORMAT:
        raise ValueError(f"{path}: its format is {written!r}, this version reads {FORMAT}; precompute again")
    if stored != digest(entry.fields):
        raise ValueError(f"{path}: its fields are not those it was written with; precompute into another folder")
    return entry


# ---- shards


def is_whole(path: Path) -> bool:
    """Whether a shard is finished."""
    try:
        return path.stat().st_size == json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def new_shard(path: Path) -> Iterator[tuple[Callable[[bytes], None], dict[str, Any]]]:
    """Within it, a function that writes the next record, and a dict for what the JSON beside the shard says of them.

    The shard appears under its name at the end; on any error nothing of it stays. Raises OSError, one line, for a full
    or failing disk.
    """
    unfinished, listed, count = Path(f"{path}.unfinished"), {}, 0
    unfinished.unlink(missing_ok=True)  # of somebody who was killed

    @contextlib.contextmanager
    def said():
        try:
            yield
        except (RuntimeError, OSError) as error:  # the library's own, of several lines
            reason = "the disk is full" if "No space left" in str(error) else " ".join(str(error).split())[:160]
            raise OSError(f"{path} cannot be written ({reason}); once mended, {AGAIN}: it goes on") from None

    def write(record: bytes) -> None:
        nonlocal count
        with said():
            writer.write(record)
        count += 1

    with said():  # one record a group, for random access; numbers hardly compress
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
    try:
        yield write, listed
        with said():
            writer.close()
            if len(ArrayRecordDataSource([str(unfinished)])) != count:
                raise RuntimeError(f"not all of its {count} records arrived")
            sync(unfinished)
            size = unfinished.stat().st_size
            write_atomic(Path(f"{path}.json"), json.dumps({"bytes": size, "records": count, **listed}))
            os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(Exception):
            writer.close()
        unfinished.unlink(missing_ok=True)
        raise


def listing(folder: Folder, series: Series, split: str) -> list[dict[str, Any]]:
    """What the JSON beside each shard says. Raises ValueError, one line, for shards that are not there or not whole."""
    found, missing = [], []
    for name in series.shards(split):
        path = folder.path / name
        if not path.is_file():
            missing.append(name)
            continue
        try:
            about = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
            whole = about["bytes"] == path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: damaged; {AGAIN}: it is made anew")
        found.append(about)
    if missing:
        raise ValueError(
            f"{folder.path}: {len(missing)} of {len(series.shards(split))} shards are not there yet, first "
            f"{missing[0]}; {AGAIN}: it goes on"
        )
    return found
