"""From a source to one clip: where in the file it starts, how it keeps off cuts, how it is cropped.

A Source is a list of items (files, records, numbers of a random world) and two functions that read them.
Windows are stretches of items; a clip is drawn inside its window. Everything random comes from the generator
that is passed in.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from jaxalign.data.video import THUMB, UnreadableVideo, resize

STRETCH_SECONDS = 10.0  # a longer item gives one window for about every ten seconds
# By time: train before the first, held out after the second, a gap between.
TRAIN_PART, HELD_OUT_PART = 0.80, 0.85
SPLITS = ("train", "held_out")
SHORT = ("skip", "pad")
# Of a folder with at least that many files; a smaller one is split by time inside each file.
HELD_OUT_ONE_IN = 20


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a clip looks like: frames, pixels, frames of the file from one to the next, and what is random."""

    num_frames: int
    height: int
    width: int
    stride: int = 1  # 0: the clip spans its window, with a stride of ⌊frames / num_frames⌋ (VideoREPA)
    hflip: bool = False
    random_crop: bool = False
    short: str = "skip"  # of a video with fewer than num_frames frames; 'pad' repeats its last frame (VideoREPA)

    def __post_init__(self):
        for name, least in (("num_frames", 1), ("height", 1), ("width", 1), ("stride", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"data.{name}={value!r}: write a whole number of at least {least}")
        if self.short not in SHORT:
            raise ValueError(f"data.short={self.short!r}: write {' or '.join(SHORT)}")

    @property
    def fewest(self) -> int:
        """Frames that a video must have."""
        return 1 if self.short == "pad" else self.num_frames


@dataclasses.dataclass(frozen=True)
class Item:
    """One video of a source. frames None: unknown until read. split: train, held_out, both (by time) or unused."""

    name: str
    frames: int | None
    fps: float
    label: int
    split: str


@dataclasses.dataclass(frozen=True)
class Window:
    """Frames [start, stop) of an item, out of which a clip is drawn; stop None: to the item's end."""

    item: int
    start: int
    stop: int | None


@dataclasses.dataclass(frozen=True)
class Source:
    """A list of videos and how to read them; picklable, so that decode workers can have it.

    read(item, start, stop, step, cover) -> (uint8 [t,h,w,3], thumbnails of frames start … stop-1);
    read.seen(item, start, stop), where a reader has it -> those thumbnails if they are known already, else None;
    look(item) -> (frames, label), for items whose `frames` is None;
    render(window, clip) -> dict, instead of `read`, for sources that make their clips (synthetic);
    recall(item, place, flip) -> dict, instead of `read`, for clips that were computed before (precomputed.py); `given`,
    {name: (shape, dtype)}, is then what training batches hold of it, embedded(prompt) -> [n, d] the stored prompts;
    beside(row) -> further arrays of a clip, from the row as it will be seen (host_flow.py); with `recall`, not asked;
    skipped: (name, why) of what was found and cannot be used.
    captions: what each item shows, parallel to `items`, '' where nobody said; empty where there are none;
    tokens: [items, n], the captions as a text encoder takes them, set by training/prompts.py; cut_prompts of them were
    too long for it;
    missing: names of videos that the lists of a data set have and its folder has not;
    notes: further lines for the first screen.
    """

    name: str
    items: Sequence  # of Item; in decode workers the columns of them that reading needs (columns.py)
    classes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    read: Callable | None = None
    look: Callable | None = None
    render: Callable | None = None
    captions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    tokens: np.ndarray | None = dataclasses.field(default=None, compare=False)
    cut_prompts: int = 0
    recall: Callable | None = None
    given: Mapping[str, tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=dict, compare=False)
    embedded: Callable | None = None
    beside: Callable | None = None


def windows(source: Source, split: str, clip: Clip) -> tuple[Window, ...]:
    """The windows of `split` ('train' or 'held_out') that are long enough for a clip.

    An item gives one window an epoch, a longer one a window for about every ten seconds, so that a film
    counts for more than a snippet; at stride 0 every item is one. An item shorter than num_frames gives none
    (`short_items` names it) unless it is padded; one that is long enough only at a smaller stride is taken at the
    largest stride that fits.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: write 'train' or 'held_out'")
    found = []
    for number, item in enumerate(source.items):
        if item.split not in (split, "both"):
            continue
        if item.frames is None:
            found.append(Window(number, 0, None))
            continue
        start, stop = part(item, split)
        if stop - start < clip.fewest:
            continue
        if clip.stride == 0:
            found.append(Window(number, start, stop))
            continue
        span = (clip.num_frames - 1) * clip.stride + 1
        count = max(1, (stop - start) // max(span, round(STRETCH_SECONDS * item.fps)))
        edges = [start + (stop - start) * k // count for k in range(count + 1)]
        found += [Window(number, a, b) for a, b in itertools.pairwise(edges)]
    return tuple(found)


def part(item: Item, split: str) -> tuple[int, int]:
    """Frames [start, stop) of an item in a split: all, or the first 80 % / the last 15 % of 'both'."""
    if item.split != "both":
        return 0, item.frames
    if split == "train":
        return 0, int(item.frames * TRAIN_PART)
    return math.ceil(item.frames * HELD_OUT_PART), item.frames


def short_items(source: Source, clip: Clip) -> tuple[str, ...]:
    """Names of the items that give no window at all because they are shorter than num_frames."""
    used = {window.item for split in SPLITS for window in windows(source, split, clip)}
    listed = enumerate(source.items)
    return tuple(item.name for number, item in listed if number not in used and item.split != "unused")


def split_by_name(names: Sequence[str]) -> list[str]:
    """'held_out' for one name in twenty, by digest; 'both' if there are few.

    New files leave old ones where they are, but for two cases: with the twentieth file the rule is another, and where
    no digest is in the lowest twentieth, the lowest one is held out, which a new file may undercut.
    """
    if len(names) < HELD_OUT_ONE_IN:
        return ["both"] * len(names)
    digests = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) for name in names]
    limit = max(2**32 // HELD_OUT_ONE_IN, min(digests) + 1)  # at least one
    return ["held_out" if digest < limit else "train" for digest in digests]


def fingerprint(source: Source) -> str:
    """Digest of what a run sees and in which order (names, lengths, labels, splits, captions), to compare hosts or
    runs."""
    digest = hashlib.sha256()
    for item in source.items:
        digest.update(repr(dataclasses.astuple(item)).encode())
    digest.update(repr(source.captions).encode() if source.captions else b"")
    return digest.hexdigest()[:16]


def load(source: Source, window: Window, clip: Clip, rng: np.random.Generator, position: float | None = None) -> dict:
    """One clip: {'video': uint8 [t,h,w,3], 'label': int, 'name': str}, and whatever else a source renders.

    rng decides the time offset (unless `position`, 0 to 1, says where in the window), the flip and the crop,
    always with the same draws in the same order. A clip that would straddle a cut moves next to the cut if
    there is room. Raises UnreadableVideo.
    """
    offset, flip, top, left = rng.random(4)
    offset = offset if position is None else position
    item = source.items[window.item]
    if source.recall is not None:
        row = source.recall(window.item, float(offset), bool(clip.hflip and flip < 0.5))
        return {**row, "label": item.label, "name": item.name}
    if source.render is not None:  # exact flow would have to be flipped and cropped with it: taken as it is
        return _with_beside(source, {**source.render(window, clip), "label": item.label, "name": item.name})
    stop, label = (window.stop, item.label) if window.stop is not None else source.look(window.item)
    if stop - window.start < clip.fewest:
        raise UnreadableVideo(item.name, f"only {stop - window.start} frames, num_frames={clip.num_frames}")
    video = _draw(source, window.item, window.start, stop, clip, offset)
    if len(video) < clip.num_frames:
        video = np.concatenate([video, np.repeat(video[-1:], clip.num_frames - len(video), axis=0)])
    spare = video.shape[1] - clip.height, video.shape[2] - clip.width
    if clip.random_crop:
        top, left = int(top * (spare[0] + 1)), int(left * (spare[1] + 1))
    else:
        top, left = spare[0] // 2, spare[1] // 2
    video = video[:, top : top + clip.height, left : left + clip.width]
    if clip.hflip and flip < 0.5:
        video = video[:, :, ::-1]
    return _with_beside(source, {"video": np.ascontiguousarray(video), "label": label, "name": item.name})


def _with_beside(source: Source, row: dict) -> dict:
    return row if source.beside is None else row | source.beside(row)


def _draw(source: Source, item: int, low: int, high: int, clip: Clip, offset: float) -> UInt8[np.ndarray, "t h w 3"]:
    """A clip inside frames [low, high), next to a cut rather than across it if one of four places will do.

    At stride 0, and where there are fewer frames than the clip wants, there is one place only.
    """
    cover = clip.height, clip.width
    if high - low < clip.num_frames:
        return source.read(item, low, high, 1, cover)[0]
    if clip.stride == 0:
        step = (high - low) // clip.num_frames
        return source.read(item, low, low + (clip.num_frames - 1) * step + 1, step, cover)[0]
    step = min(clip.stride, (high - low - 1) // max(1, clip.num_frames - 1)) if clip.num_frames > 1 else 1
    span = (clip.num_frames - 1) * step + 1
    room = high - low - span
    start = low + min(room, int(offset * (room + 1)))
    tried, waiting, first = [], [start], None
    seen = getattr(source.read, "seen", lambda *place: None)
    while waiting and len(tried) < 5:
        start = waiting.pop(0)
        tried.append(start)
        # A place that is known to lie across a cut is not read.
        video, thumbs = None, seen(item, start, start + span)
        if thumbs is None:
            video, thumbs = source.read(item, start, start + span, step, cover)
        first = video if len(tried) == 1 else first
        cuts = find_cuts(thumbs)
        if not cuts:
            return source.read(item, start, start + span, step, cover)[0] if video is None else video
        # The shot after the last cut and the shot before the first one; the nearer of the two first.
        places = sorted((start + cuts[-1], start + cuts[0] - span), key=lambda p, at=start: abs(p - at))
        waiting += [place for place in places if low <= place <= high - span and place not in tried]
    return source.read(item, tried[0], tried[0] + span, step, cover)[0] if first is None else first


def find_cuts(thumbs: UInt8[np.ndarray, "s y x"]) -> list[int]:
    """Numbers of the frames that begin a new shot, from grey thumbnails of successive frames.

    A cut is one pair of frames whose difference, brightness removed and measured in standard deviations, is
    large and stands alone: fast motion makes every pair differ. Measured on a clip with five cuts among 249
    pairs: 0.47 and more at cuts, 0.26 and less elsewhere; 2.7 times the neighbouring pairs' difference at
    cuts, 1.4 elsewhere.
    """
    grey = thumbs.astype(np.float32)
    grey -= grey.mean((1, 2), keepdims=True)
    contrast = grey.std((1, 2)) + 4.0  # the constant keeps noise in black frames from counting
    change = np.abs(np.diff(grey, axis=0)).mean((1, 2))
    around = np.pad(change, 1)
    alone = change > 1.5 * np.maximum(around[:-2], around[2:])
    return [int(k) + 1 for k in np.flatnonzero((change > 0.36 * (contrast[1:] + contrast[:-1])) & alone)]


def thumbnails(video: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t y x"]:
    """Grey thumbnails (32 × 32) of frames in memory, for `find_cuts`."""
    small = video if min(video.shape[1:3]) <= THUMB else resize(video, (THUMB, THUMB))
    return (small[..., 0] * 0.299 + small[..., 1] * 0.587 + small[..., 2] * 0.114).astype(np.uint8)
