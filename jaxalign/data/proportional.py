"""Real clips to measure generated ones against: classes in the proportions of a split, one random clip a video.

This is the protocol behind Align4Gen's tables (methods §5, the paper's appendix on FVD): 2,048 videos, each giving one
clip at a random place.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.clips import SPLITS, Clip, Source, Window, load, part
from jaxalign.data.patience import Patience
from jaxalign.data.pipeline import in_turn, why_none
from jaxalign.data.video import UnreadableVideo


def draw(source: Source, split: str, count: int, seed: int, clip: Clip) -> list[Window]:
    """`count` windows of exactly one clip each, one a video, as many of a class as its share of the split says.

    A pure function of its arguments. Shares are within one of exact; a video comes a second time (at another place)
    only when every video of its class has come. Videos that are too short for `clip` are left out, as in training. The
    windows are in random order, so that any beginning of the list is a fair sample too. Of a source that does not know
    its lengths and labels (tfds) every video is looked at. Raises ValueError for no such split, for one without videos
    that are long enough, and for a count below 1.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: write 'train' or 'held_out'")
    if count < 1:
        raise ValueError(f"{count} clips are asked for; write at least 1")
    spans: dict[int, tuple[int, int | None]] = {}
    classes: dict[int, list[int]] = defaultdict(list)
    for number, item in enumerate(source.items):
        if item.split not in (split, "both"):
            continue
        span, label = _span(source, number, split)
        if span[1] is None or span[1] - span[0] >= clip.fewest:
            spans[number] = span
            classes[label].append(number)
    if not spans:
        raise ValueError(why_none(source, split, clip))
    rng = np.random.default_rng((seed, 3))  # 0 and 1 are the pipeline's: its orders and its offsets
    drawn: list[Window] = []
    for label, quota in zip(sorted(classes), shares([len(classes[c]) for c in sorted(classes)], count), strict=True):
        members = np.array(classes[label])
        while quota > 0:
            chosen = rng.permutation(members)[:quota]
            drawn += [_one_clip(int(number), *spans[int(number)], clip, rng.random()) for number in chosen]
            quota -= len(chosen)
    return [drawn[k] for k in rng.permutation(count)]


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` in proportion to `sizes`, whole numbers that sum to it, by largest remainders (ties: the first)."""
    whole, rest = np.divmod(count * np.array(sizes, np.int64), sum(sizes))
    whole[np.argsort(-rest, kind="stable")[: count - whole.sum()]] += 1
    return whole.tolist()


def read(source: Source, drawn: Sequence[Window], k: int, clip: Clip) -> dict[str, Any]:
    """Clip number k of what was drawn, as `clips.load` gives it, with its `item` and whether it is `substituted`.

    A video that cannot be read is replaced by the next one of its class in the list, or else by the next one at all, so
    what is measured is the same for every reader. Raises as `pipeline.in_turn` when many in a row cannot be read.
    """
    at = [drawn[(k + other) % len(drawn)] for other in range(len(drawn))]
    label = source.items[at[0].item].label
    at.sort(key=lambda window: source.items[window.item].label != label)  # stable

    def clip_of(window):
        return load(source, window, clip, np.random.default_rng((0, 3)))

    row, item, substituted = in_turn(source, at, clip_of, Patience())  # as in training
    return {**row, "item": item, "substituted": substituted}


def _span(source: Source, number: int, split: str) -> tuple[tuple[int, int | None], int]:
    """Frames [start, stop) of an item in a split and its label; stop None where a clip may be as long as one likes."""
    item = source.items[number]
    if item.frames is not None:
        return part(item, split), item.label
    if source.look is None:  # it renders or recalls its clips
        return (0, None), item.label
    try:
        frames, label = source.look(number)
    except UnreadableVideo:
        return (0, 0), item.label
    return (0, frames), label


def _one_clip(number: int, start: int, stop: int | None, clip: Clip, place: float) -> Window:
    """The window of one clip at `place` (0 to 1) of frames [start, stop), at the largest stride that fits."""
    if stop is None or clip.stride == 0 or stop - start <= clip.num_frames:
        return Window(number, start, stop)
    stride = min(clip.stride, (stop - start - 1) // max(1, clip.num_frames - 1))
    span = (clip.num_frames - 1) * stride + 1
    first = start + min(stop - start - span, int(place * (stop - start - span + 1)))
    return Window(number, first, first + span)
