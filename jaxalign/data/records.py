"""Videos out of ArrayRecord shards: our own plain format, and prepared tfds data sets. No TensorFlow.

Our format. A shard is `NAME.array_record` (or tfds' `NAME-SPLIT.array_record-00000-of-00004`); a record is
the bytes of `numpy.savez(video=uint8 [t,h,w,3], label=int, name=str, caption=str)`, all but video optional. Beside each
shard may lie `SHARD.json` with {"classes": […], "records": [[name, frames, label, caption], …]}; a shard without it is
read through once when the source is opened. Shards whose file name has the word train are for training, with
test, val, valid, validation or held_out for evaluation (`train_0`, `my-test-set`; `trainer` is no such word); without
such names records are split as the files of a folder are.
"""

import dataclasses
import functools
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from jaxalign.data.clips import Item, Source, split_by_name, thumbnails
from jaxalign.data.readers import reader, record
from jaxalign.data.video import UnreadableVideo, resize

RECORD_FPS = 25.0  # records carry no rate; it only says how long ten seconds are
_TRAIN, _HELD_OUT = "train", "test|val|valid|validation|held_?out"


def write_array_record(path: str, clips: Iterable[dict], classes: tuple[str, ...] = ()) -> int:
    """Writes a shard and its JSON from dicts of video (uint8 [t,h,w,3]), label, name, caption; returns how many.

    The shard appears under its name only when it is whole. Raises ValueError for a video of another shape or
    dtype.
    """
    listed, unfinished = [], f"{path}.unfinished"
    writer = ArrayRecordWriter(unfinished, "group_size:1")  # random access wants one record a group
    try:
        for number, clip in enumerate(clips):
            video, name = np.asarray(clip["video"]), str(clip.get("name", number))
            if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
                raise ValueError(f"record {name}: video is {video.dtype}{list(video.shape)}; wanted uint8 [t,h,w,3]")
            data = io.BytesIO()
            caption = str(clip.get("caption", ""))
            told = {"caption": np.array(caption)} if caption else {}
            np.savez(data, video=video, label=np.int64(clip.get("label", 0)), name=np.array(name), **told)
            writer.write(data.getvalue())
            listed.append([name, len(video), int(clip.get("label", 0)), *([caption] if caption else [])])
    except BaseException:
        writer.close()
        os.remove(unfinished)
        raise
    writer.close()
    Path(f"{path}.json").write_text(json.dumps({"classes": list(classes), "records": listed}))
    os.replace(unfinished, path)
    return len(listed)


def shards(folder: Path) -> list[str]:
    """The ArrayRecord files of a folder, sorted."""
    return sorted(str(f) for f in folder.glob("*.array_record*") if re.search(r"\.array_record(-\d+-of-\d+)?$", f.name))


def array_record(path: str, *, split: int = 1) -> Source:
    """The records of a folder's ArrayRecord shards (format: see this file's beginning), or a tfds folder.

    `split`: as of `tfds`. Raises FileNotFoundError for no such folder or no shards, ValueError for a shard or record
    that cannot be read and for a `split` that there is not.
    """
    folder = Path(path).expanduser()
    if (folder / "features.json").is_file():
        return tfds(str(folder), split=split)
    paths = shards(folder) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"data.source={path!r}: no *.array_record files in it")
    if split != 1:
        raise ValueError(f"data.split={split}: data.source={path!r} has no numbered lists of videos; leave it at 1")
    found, captions, classes = [], [], ()
    for shard in paths:
        count, sidecar = _count(shard), Path(f"{shard}.json")
        listed = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
        if len(listed.get("records", ())) != count:  # none, or another shard's
            listed["records"] = [_describe(shard, k) for k in range(count)]
        classes = tuple(listed.get("classes") or classes)
        found += [(_split_of(shard), *record[:3]) for record in listed["records"]]
        captions += [record[3] if len(record) > 3 else "" for record in listed["records"]]
    if not found:
        raise ValueError(f"data.source={path!r}: no records in its {len(paths)} *.array_record files")
    if all(split is None for split, *_ in found):
        splits = split_by_name([name for _, name, _, _ in found])
    else:
        splits = [split or "train" for split, *_ in found]
    labels = max(label for *_, label in found) + 1
    classes = classes or (tuple(f"class {k}" for k in range(labels)) if labels > 1 else ())
    items = tuple(
        Item(name, frames, RECORD_FPS, label, split)
        for (_, name, frames, label), split in zip(found, splits, strict=True)
    )
    told = tuple(captions) if any(captions) else ()
    return Source(str(path), items, classes, read=functools.partial(_read_record, tuple(paths)), captions=told)


def _describe(shard: str, number: int) -> list:
    record = _record((shard,), number)
    name = record["name"] or f"{Path(shard).name}:{number}"
    return [name, len(record["video"]), record["label"], record["caption"]]


def _split_of(shard: str) -> str | None:
    def says(words: str) -> bool:
        return re.search(rf"(?<![a-z])(?:{words})(?![a-z])", Path(shard).name.lower()) is not None

    return "train" if says(_TRAIN) else "held_out" if says(_HELD_OUT) else None


def _count(shard: str) -> int:
    """Records in a shard. Raises ValueError, one line."""
    try:
        return len(reader((shard,)))
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{shard}: no ArrayRecord file, or damaged ({error})") from error


@functools.lru_cache(maxsize=4)  # a clip that moves off a cut reads its record again
def _record(paths: tuple[str, ...], number: int) -> dict:
    """One record of our format as {'video', 'label', 'name', 'caption'}. Raises UnreadableVideo."""
    name = f"{paths[0] if len(paths) == 1 else Path(paths[0]).parent}: record {number}"
    data = _bytes(paths, number, name)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            video = stored["video"]
            label = int(stored["label"]) if "label" in stored else 0
            title, caption = (str(stored[key]) if key in stored else "" for key in ("name", "caption"))
    except (RuntimeError, ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise UnreadableVideo(name, f"not the bytes of numpy.savez with a field 'video' ({error})") from error
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
        raise UnreadableVideo(name, f"its video is {video.dtype}{list(video.shape)}, not uint8 [t,h,w,3]")
    return {"video": video, "label": label, "name": title, "caption": caption}


def _bytes(paths: tuple[str, ...], number: int, name: str) -> bytes:
    try:
        return record(paths, number)
    except (RuntimeError, ValueError, OSError) as error:
        raise UnreadableVideo(name, f"cannot be read ({error})") from error


def _read_record(paths: tuple[str, ...], item: int, start: int, stop: int, step: int, cover: tuple[int, int]):
    video = _record(paths, item)["video"]
    if stop > len(video):
        raise UnreadableVideo(f"record {item}", f"has {len(video)} frames, not {start} to {stop - 1}")
    return resize(video[start:stop:step], cover), thumbnails(video[start:stop])


def tfds(path: str, *, split: int = 1) -> Source:
    """A prepared tfds data set with a `video` (and perhaps a `label`): its name ('ucf101') or its folder.

    Its train split is trained on, its test split held out; without one, one record in twenty is, and at least one. Of
    ucf101, which tfds has once for each of the official `split`s, the one of that number is taken; a folder that is one
    of them already is taken with `split` 1 too.

    It is read from its ArrayRecord files directly (tfds' own Video feature needs TensorFlow even to be read),
    so it has to be prepared once, where TensorFlow is, with
    `download_and_prepare(file_format='array_record')`. Raises FileNotFoundError if it is not there,
    ValueError if it is prepared in another format, has no video, or knows no such `split`.
    """
    home = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    root = Path(path).expanduser() if Path(path).expanduser().is_dir() else home / path
    found = sorted(root.rglob("features.json"), key=lambda file: _version(file.parent)) if root.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"data.source='tfds:{path}': no prepared data set in {root}; prepare it with "
            f"tfds.builder({path!r}).download_and_prepare(file_format='array_record')"
        )
    described, notes = _of_split(path, root, found, split)
    folder = described.parent
    features = json.loads(described.read_text()).get("featuresDict", {}).get("features", {})
    if "video" not in features:
        raise ValueError(f"data.source='tfds:{path}': no feature 'video' in {folder} (it has {', '.join(features)})")
    paths = shards(folder)
    if not paths:
        raise ValueError(
            f"data.source='tfds:{path}': no *.array_record files in {folder}; prepare it again with "
            "download_and_prepare(file_format='array_record')"
        )
    names = folder / "label.labels.txt"
    classes = tuple(names.read_text().split("\n")) if names.is_file() else ()
    listed, splits = [], []
    for shard in paths:
        title = Path(shard).name.split(".array_record")[0]
        listed += [f"{title}:{Path(shard).name.rpartition('.')[2]}:{k}" for k in range(_count(shard))]
        splits += [_split_of(shard) or "train"] * (len(listed) - len(splits))
    if "held_out" not in splits:
        splits = split_by_name(listed)
    # Lengths are not known here: few records cannot be split by time inside each video.
    items = [Item(n, None, RECORD_FPS, 0, "train" if s == "both" else s) for n, s in zip(listed, splits, strict=True)]
    if len(items) > 1 and all(item.split == "train" for item in items):
        items[-1] = dataclasses.replace(items[-1], split="held_out")
        notes += (f"no test split: of its {len(items)} records the last one is held out",)
    return Source(
        f"tfds:{path}",
        tuple(items),
        tuple(name for name in classes if name),
        read=functools.partial(_read_tfds, tuple(paths)),
        look=functools.partial(_look_tfds, tuple(paths)),
        notes=notes,
    )


def _of_split(path: str, root: Path, found: list[Path], split: int) -> tuple[Path, tuple[str, ...]]:
    """The newest that was prepared from UCF-101's lists of this number (configs ucf101_1, ucf101_1_256, ucf101_2, …),
    and what there is to say of it. Of another data set: the newest."""
    # The config is the folder around the version's; `root` may be either of them.
    configs = [(file.relative_to(root).parts[-3:-2] or file.resolve().parts[-3:-2])[0] for file in found]
    matches = [re.fullmatch(r"ucf101_(\d)(_\d+)?", config) for config in configs]
    numbers = [int(match[1]) if match else 0 for match in matches]
    if not any(numbers):
        if split != 1:
            raise ValueError(f"data.split={split}: data.source='tfds:{path}' has no numbered splits; leave it at 1")
        return found[-1], ()
    there = sorted({n for n in numbers if n})
    one_config = len(there) == 1 and len(found[-1].relative_to(root).parts) < 3
    if one_config and split == 1 != there[0]:  # named by its folder, and nobody said otherwise
        return found[-1], (f"prepared from UCF-101's lists of split {there[0]}",)
    if split not in numbers:
        known = ", ".join(map(str, there))
        raise ValueError(f"data.split={split}: data.source='tfds:{path}' is prepared for split {known} only, in {root}")
    return [file for file, number in zip(found, numbers, strict=True) if number == split][-1], ()


def _version(folder: Path) -> tuple:
    return tuple(int(n) for n in re.findall(r"\d+", folder.name)), str(folder)


@functools.lru_cache(maxsize=4)
def _example(paths: tuple[str, ...], number: int) -> tuple[list[bytes], int]:
    """(encoded frames, label) of one tf.train.Example. Raises UnreadableVideo."""
    from tensorflow_datasets.proto import tf_example_pb2  # half a second that only this source should pay

    data = _bytes(paths, number, f"record {number}")
    try:
        fields = tf_example_pb2.Example.FromString(data).features.feature
    except Exception as error:  # protobuf's DecodeError has no stable home; a bad record must not end a run
        raise UnreadableVideo(f"record {number}", f"no tf.train.Example ({error})") from error
    label = fields["label"].int64_list.value if "label" in fields else ()
    return list(fields["video"].bytes_list.value), int(label[0]) if label else 0


def _look_tfds(paths: tuple[str, ...], item: int) -> tuple[int, int]:
    """(frames, label) of an item whose length the data set does not say."""
    frames, label = _example(paths, item)
    return len(frames), label


def _read_tfds(paths: tuple[str, ...], item: int, start: int, stop: int, step: int, cover: tuple[int, int]):
    frames, _ = _example(paths, item)
    try:  # every frame is stored as an image: only the clip's are decoded
        video = np.stack([np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")) for frame in frames[start:stop]])
    except (OSError, ValueError) as error:
        raise UnreadableVideo(f"record {item}", f"a frame cannot be decoded ({error})") from error
    return resize(video[::step], cover), thumbnails(video)
