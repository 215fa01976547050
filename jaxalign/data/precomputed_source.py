"""The source that reads a folder of clips that were computed before (data/precomputed.py)."""

import bisect
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (makes 'bfloat16' a dtype's name)
import numpy as np

from jaxalign.data.clips import SPLITS, Item, Source
from jaxalign.data.precomputed import AGAIN, Clips, Folder, Series, is_whole, listing, open_folder
from jaxalign.data.readers import record
from jaxalign.data.video import UnreadableVideo


@dataclasses.dataclass(frozen=True, eq=False)
class _Column:
    """One series of a split, for reading."""

    files: tuple[tuple[str, int], ...]  # path, records
    starts: tuple[int, ...]  # number of the first record of each
    dtype: str
    shape: tuple[int, ...]
    first: np.ndarray  # the number of a clip's first record
    padded: bool = False  # a record may have fewer rows, and zeros stand for the rest: prompts do


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
        padded=split == "captions",
    )


def _array(column: _Column, number: int) -> np.ndarray:
    """Record `number` of a series. Raises UnreadableVideo, one line."""
    shard = bisect.bisect_right(column.starts, number) - 1
    path, records = column.files[shard]
    number -= column.starts[shard]
    try:
        data = record((f"{path}[0:{records}]",), number)  # told its length, the library need not look
        array = np.frombuffer(data, column.dtype).reshape(-1, *column.shape[1:])
        if len(array) < column.shape[0] and column.padded:
            filler = np.zeros((column.shape[0] - len(array), *column.shape[1:]), array.dtype)
            array = np.concatenate([array, filler])
        return array.reshape(column.shape)
    except (RuntimeError, ValueError, OSError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        # A good shard that cannot be read just now is no reason to make it anew for hours.
        broken = isinstance(error, ValueError) or "orrupt" in reason or not is_whole(Path(path))
        if isinstance(error, OSError) or not broken:
            # By its own name, as a video: what is known of one record says nothing of a shard's others.
            raise UnreadableVideo(f"{path}: record {number}", f"cannot be read ({reason} …)") from error
        why = f"damaged ({reason} …); remove this file and {AGAIN}: it is made anew"
        _say(f"{path}: {why}")  # another clip stands in, so nobody would be told
        raise UnreadableVideo(path, why) from error


@functools.lru_cache(maxsize=256)  # once each
def _say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


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
        ((str(path), about["records"]),), (0, about["records"]), prompts.dtype, prompts.shape, np.arange(0), padded=True
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
