"""Clips that were computed before training: a folder of ArrayRecord shards, and the source that reads it.

    FOLDER/precomputed.json                             which clips they are (`Clips`)
    FOLDER/SERIES.series.json                           what one array a clip is, and what decided it (`Series`)
    FOLDER/SERIES-SPLIT-00017-of-00128.array_record     its records, each the plain bytes of one array
    FOLDER/SERIES-SPLIT-00017-of-00128.array_record.json   what is in that shard, and how many bytes it has

A shard appears under its name when it is whole and never changes; several processes may write into one folder. The
clips are numbered split by split in the order of the source's windows, so a run that draws from the folder meets them
in the order of a run that decodes. A clip has `variants` x `flips` versions; which one is seen is drawn like the offset
and the flip of a decoded one, from (seed, place in the order).
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes 'bfloat16' a dtype's name)
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from jaxalign.data.clips import SPLITS, Item, Source
from jaxalign.interop.sealed import sync, write_atomic

NAME, FORMAT = "precomputed.json", 1
OPEN_FILES = 256  # shards that a process keeps open; a folder may have thousands
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Column:
    """One series of a split, for reading."""

    files: tuple[tuple[str, int], ...]  # path, records
    starts: tuple[int, ...]  # number of the first record of each
    dtype: str
    shape: tuple[int, ...]
    first: np.ndarray  # the number of a clip's first record


def _column(folder: Folder, series: Series, split: str, listed: list[dict]) -> _Column:
    files = tuple(
        (str(folder.path / name), about["records"]) for name, about in zip(series.shards(split), listed, strict=True)
    )
    sizes = [records for _, records in files]
    if "units" in listed[0]:
        versions = [0 if unit is None else folder.clips.versions(split) for about in listed for unit in about["units"]]
    else:
        versions = [1] * sum(sizes)
    return _Column(
        files,
        tuple(itertools.accumulate(sizes, initial=0)),
        series.dtype,
        series.shape,
        np.cumsum([0, *versions[:-1]]),
    )


@functools.lru_cache(maxsize=OPEN_FILES)  # readers are thread-safe, and every process makes its own
def _reader(path: str, records: int) -> ArrayRecordDataSource:
    return ArrayRecordDataSource([f"{path}[0:{records}]"])  # told its length, it need not look


def _array(column: _Column, number: int) -> np.ndarray:
    """Record `number` of a series. Raises ValueError, one line, for a damaged shard."""
    shard = bisect.bisect_right(column.starts, number) - 1
    path, records = column.files[shard]
    try:
        array = np.frombuffer(_reader(path, records)[number - column.starts[shard]], column.dtype)
        array = array.reshape(-1, *column.shape[1:])
        if len(array) < column.shape[0]:
            filler = np.zeros((column.shape[0] - len(array), *column.shape[1:]), array.dtype)
            array = np.concatenate([array, filler])
        return array.reshape(column.shape)
    except (RuntimeError, ValueError, OSError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: damaged ({reason} …); remove this file and {AGAIN}: it is made anew") from None


# ---- the source


def source(path: str) -> Source:
    """The clips of a folder as they are, for who knows no config: videos and labels, where videos are stored.

    `training/contents.py` says which series a run takes. Raises as `open_folder`.
    """
    folder = open_folder(path)
    return taken(folder, {"video": folder.series["video"]} if "video" in folder.series else {})


def taken(folder: Folder, parts: Mapping[str, Series], prompts: Series | None = None, notes=()) -> Source:
    """The source whose batches hold `parts`, {name in the batch: series}, and 'prompt' out of the series `prompts`.

    Held-out batches have their videos always, for people to look at. Clips that could not be computed are skipped and
    named. Raises ValueError, one line, for shards that are not there or not whole.
    """
    items, skipped, said = [], [], []
    columns: dict[str, dict[str, _Column]] = {}
    for split in SPLITS:
        chosen = {name: series for name, series in parts.items() if split in series.counts}
        if split == "held_out" and "video" not in chosen and "shown" in folder.series:
            chosen["video"] = folder.series["shown"]
        read = {name: (series, listing(folder, series, split)) for name, series in chosen.items()}
        columns[split] = {name: _column(folder, series, split, listed) for name, (series, listed) in read.items()}
        # Of a source without any part only names and labels are known, out of whichever series has them.
        told = [listed for _, listed in read.values()] or [
            listing(folder, s, split) for s in folder.series.values() if split in s.counts
        ][:1]
        for about in zip(*([unit for shard in listed for unit in shard["units"]] for listed in told), strict=True):
            name, label, prompt = next((unit for unit in about if unit is not None), ("?", 0, -1))
            items.append(Item(name, None, 25.0, label, "unused" if None in about else split))
            said.append(prompt)
        skipped += [(name, why) for listed in told[:1] for shard in listed for name, why in shard["bad"]]
    given = {name: (series.shape, series.dtype) for name, series in parts.items() if "train" in series.counts}
    captions, embedded, words = (), None, None
    if prompts is not None:
        listed = listing(folder, prompts, "captions")
        told = [prompt for about in listed for prompt in about["prompts"]]
        words = _column(folder, prompts, "captions", listed)
        captions = tuple(told[k] if k >= 0 else "" for k in said)
        given |= {"prompt": (prompts.shape, prompts.dtype)}
        embedded = functools.partial(_embedded, *_asked(folder, prompts), words, {p: k for k, p in enumerate(told)})
    # Numbers of the clips within their splits.
    offset = {"train": 0, "held_out": folder.clips.windows["train"]}
    recall = functools.partial(_recall, folder.path, folder.clips, columns, offset, words, np.array(said, np.int64))
    return Source(
        str(folder.path),
        tuple(items),
        folder.clips.classes,
        tuple(skipped),
        recall=recall,
        captions=captions,
        notes=(*_notes(folder, parts, prompts), *notes),
        given=given,
        embedded=embedded,
    )


def _notes(folder: Folder, parts: Mapping[str, Series], prompts: Series | None) -> list[str]:
    clips = folder.clips
    shown = [*(series.name for series in parts.values()), *([prompts.name] if prompts else [])]
    mirrored = ", and its mirror image" if clips.flips == 2 else ""
    counted = "one clip" if clips.variants == 1 else f"{clips.variants} clips"
    return [f"precomputed from {clips.about.get('source', '?')}: {counted} a window{mirrored}; " + ", ".join(shown)]


def _recall(path, clips: Clips, columns, offset, words, prompts, item: int, place: float, flip: bool) -> dict:
    """The arrays of one clip, of the variant at `place` (0 to 1) of its window, mirrored or not."""
    split = "train" if item < offset["held_out"] else "held_out"
    if not columns[split]:
        raise ValueError(
            f"data.source='{path}' holds no videos of its training clips: write --what=video in precompute's command, "
            "or give the videos themselves"
        )
    version = 0
    if split == "train":
        version = int(place * clips.variants) * clips.flips + (int(flip) if clips.flips == 2 else 0)
    row = {
        name: _array(column, int(column.first[item - offset[split]]) + version)
        for name, column in columns[split].items()
    }
    if words is not None:
        row["prompt"] = _array(words, int(prompts[item]))
    return row


ASKED = "asked-prompts-00000-of-00001.array_record"  # the empty prompt and those that a run samples from


def _asked(folder: Folder, prompts: Series) -> tuple[_Column, dict[str, int]]:
    """What was asked for beside the captions, and {prompt: record}."""
    path = folder.path / ASKED
    if not is_whole(path):
        raise ValueError(f"{path}: not there or damaged; {AGAIN}: it is made anew")
    about = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    column = _Column(
        ((str(path), about["records"]),), (0, about["records"]), prompts.dtype, prompts.shape, np.arange(0)
    )
    return column, {prompt: k for k, prompt in enumerate(about["prompts"])}


def asked(folder: Folder) -> list[str]:
    """The prompts that are stored beside the captions."""
    if not is_whole(folder.path / ASKED):
        return []
    return json.loads(Path(f"{folder.path / ASKED}.json").read_text(encoding="utf-8"))["prompts"]


def _embedded(others: _Column, numbers: dict[str, int], captions: _Column, listed: dict[str, int], prompt: str):
    """The stored embeddings [n, d] of a prompt, '' for the empty one; KeyError if there are none."""
    if prompt in numbers:
        return _array(others, numbers[prompt])
    return _array(captions, listed[prompt])
