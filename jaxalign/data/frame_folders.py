"""Videos as folders of frames (jpg, png, …), as SkyTimelapse, FaceForensics and other sets of clips are published.

    ROOT/sky_train/VIDEO/CLIP/NAME_00000001.jpg     SkyTimelapse (MD-GAN); sky_test likewise
    ROOT/train/VIDEO/000001.png                     DIGAN, Latte, StyleGAN-V's crops of FaceForensics
    ROOT/VIDEO/frame1.jpg, ROOT/CLASS/VIDEO/1.jpg   any other

Every folder that holds images is a video; its frames are in the order of the last number in their names. Opening a
source lists folders and opens no image.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxalign.data import splits
from jaxalign.data.clips import Item, Source
from jaxalign.data.columns import Texts
from jaxalign.data.video import THUMB, UnreadableVideo, resize

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
FRAME_RATE = 25.0  # images carry none; it only says how long ten seconds are
SHOWN = 3


def frames(path: str, *, split: int = 1, frame_rate: float = FRAME_RATE) -> Source:
    """Every folder of images below `path` as a video of `frame_rate` frames a second; splits and labels: splits.py.

    Of a video that lacks frames between others the longest stretch without a gap is used. Folders without anything in
    them, and those whose images are no sequence, are skipped and named. Raises FileNotFoundError for a missing folder,
    ValueError for one without images and for a rate that is not positive.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.source={path!r}: no such folder")
    if not frame_rate > 0:
        raise ValueError(f"data.frame_rate={frame_rate}: write the frames a second of the videos, such as 25")
    good, skipped, gaps = [], [], []
    for base, below, names in walk(root):
        name = base.relative_to(root).as_posix() if base != root else root.resolve().name
        images = [n for n in names if n.lower().endswith(SUFFIXES)]
        if not images:
            if not below and not names:
                skipped.append((name, "an empty folder"))
            continue
        try:
            found = in_order(str(base), images)
        except UnreadableVideo as error:
            skipped.append((name, error.why))
            continue
        good.append((name, str(base), len(found.names)))
        if found.gap:
            gaps.append(f"{name} {found.gap}")
    if not good:
        why = f" (the first, {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise ValueError(f"data.source={path!r}: no folder of images in it ({' '.join(SUFFIXES)}){why}")
    good.sort()
    names = [name for name, _, _ in good]
    layout = splits.layout(root, names, split=split, unreadable=[name for name, _ in skipped])
    items = tuple(
        Item(name, count, float(frame_rate), label, part)
        for (name, _, count), label, part in zip(good, layout.labels, layout.splits, strict=True)
    )
    notes = layout.notes
    if gaps:
        more = f"; … ({len(gaps) - SHOWN:,} more)" if len(gaps) > SHOWN else ""
        told = f"{len(gaps):,} video{' lacks' if len(gaps) == 1 else 's lack'} frames between others"
        notes += (f"{told}: the longest stretch is used ({'; '.join(gaps[:SHOWN])}{more})",)
    read = FrameReader(tuple(folder for _, folder, _ in good))
    return Source(str(path), items, layout.classes, tuple(skipped), read=read, notes=notes, missing=layout.missing)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, sub-folders, files) below a folder, nothing hidden; links are followed, but to each folder only once."""
    seen = set()
    for base, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(base), folders, [name for name in names if not name.startswith(".")]


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames of a video in their order; `gap`: where it lacks some, '' if it does not."""

    names: tuple[str, ...]
    gap: str = ""


def in_order(folder: str, names: Sequence[str]) -> Frames:
    """The longest stretch without a gap among images, by the last number in their names (by name if they have none).

    Numbers may be spaced evenly (every third frame, milliseconds); a gap is more than one and a half of the usual
    spacing. Raises UnreadableVideo for names that are no one sequence.
    """
    kinds: dict[tuple[str, str] | None, list[tuple[int, str]]] = {}
    for name in names:
        found = re.search(r"(\d+)(\D*)$", os.path.splitext(name)[0])
        kind = (name[: found.start()], found[2]) if found else None
        kinds.setdefault(kind, []).append((int(found[1]) if found else 0, name))
    if None in kinds and len(kinds) == 1:
        return Frames(tuple(sorted(names)))
    if len(kinds) > 1:
        shown = ", ".join(sorted(min(rows)[1] for rows in kinds.values())[:SHOWN])
        raise UnreadableVideo(folder, f"its images are {len(kinds)} sequences, not one ({shown})")
    (rows,) = kinds.values()
    rows.sort()
    steps = np.diff([number for number, _ in rows])
    if len(steps) and not steps.min():
        k = int(steps.argmin())
        raise UnreadableVideo(folder, f"two frames have the same number ({rows[k][1]}, {rows[k + 1][1]})")
    breaks = np.flatnonzero(steps > 1.5 * np.median(steps)) + 1 if len(steps) else []
    edges = [0, *map(int, breaks), len(rows)]
    longest = max(range(len(edges) - 1), key=lambda k: edges[k + 1] - edges[k])
    gap = f"after {rows[edges[1] - 1][1]}" if len(breaks) else ""
    return Frames(tuple(name for _, name in rows[edges[longest] : edges[longest + 1]]), gap)


@functools.lru_cache(maxsize=1024)  # a list of names is a few kilobytes, and every clip of the video needs it
def frames_of(folder: str) -> Frames:
    """The frames of one video. Raises UnreadableVideo."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UnreadableVideo(folder, "the folder is gone" if not os.path.isdir(folder) else str(error)) from error
    return in_order(folder, [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")])


@dataclasses.dataclass(frozen=True)
class FrameReader:
    """How a source of frame folders is read: `Source.read`. Frames between those of the clip become thumbnails only."""

    folders: Sequence[str]

    def packed(self, cover: tuple[int, int]) -> "FrameReader":
        """The same with its folders as columns, for decode workers."""
        return dataclasses.replace(self, folders=Texts.of(self.folders))

    def __call__(self, item: int, start: int, stop: int, step: int, cover: tuple[int, int]):
        folder = self.folders[item]
        names = frames_of(folder).names
        if start < 0 or stop > len(names) or start >= stop:
            raise UnreadableVideo(folder, f"has {len(names)} frames, not {start} to {stop - 1}")
        video, thumbs = [], []
        for number in range(start, stop):
            wanted = (number - start) % step == 0
            image = _decoded(os.path.join(folder, names[number]), whole=wanted)
            if wanted:
                # Frames of another size are brought to that of the clip's first, as in a file that changes midway.
                size = image.size if not video else (video[0].shape[1], video[0].shape[0])
                image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
                video.append(np.asarray(image))
            thumbs.append(np.asarray(image.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX)))
        return resize(np.stack(video), cover), np.stack(thumbs)


def _decoded(path: str, *, whole: bool) -> Image.Image:
    """An image in RGB; not `whole`: in grey, of a JPEG only as large as a thumbnail needs, at a fifth of the work."""
    try:
        with Image.open(path) as image:
            if whole:
                return image.convert("RGB")
            image.draft("L", (2 * THUMB, 2 * THUMB))
            return image.convert("L")
    except FileNotFoundError as error:
        raise UnreadableVideo(path, "the frame is gone") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow answers damage with
        raise UnreadableVideo(path, f"the frame cannot be decoded ({' '.join(str(error).split())[:100]})") from error


def has_frames(root: Path) -> bool:
    """Whether some folder at or below `root` holds images."""
    return any(name.lower().endswith(SUFFIXES) for _, _, names in walk(root) for name in names)
