"""What a source holds, in a few lines for the first screen."""

from collections.abc import Sequence

from jaxalign.data.clips import Clip, Source, short_items, windows

SHOWN = 5  # names of a kind; the rest is counted


def summary(
    source: Source, *, num_frames: int, height: int, width: int, stride: int = 1, short: str = "skip"
) -> list[str]:
    """Lines: videos, seconds, windows of each split, classes, what is skipped and why; decodes nothing."""
    clip = Clip(num_frames, height, width, stride, short=short)
    train, held_out = windows(source, "train", clip), windows(source, "held_out", clip)
    seconds = sum((item.frames or 0) / item.fps for item in source.items)
    length = f", {seconds:,.0f} s" if seconds else ""
    lines = [
        f"data {source.name}: {_count(len(source.items), 'clip' if source.recall else 'video')}{length}; "
        f"{len(train)} train and {len(held_out)} held-out windows for clips of {num_frames} frames "
        f"at {height}×{width}, "
        + (f"stride {stride}" if stride else f"each spanning its video (frames // {num_frames})")
    ]
    if source.classes:
        lines.append(f"  {len(source.classes)} classes: {_some(source.classes)}")
    if source.skipped:
        lines.append(f"  skipped, unreadable: {_count(len(source.skipped), 'file')}")
        lines += [f"    {name}: {why}" for name, why in source.skipped[:SHOWN]]
        if len(source.skipped) > SHOWN:
            lines.append(f"    … and {len(source.skipped) - SHOWN} more")
    if left_out := short_items(source, clip):
        lines.append(
            f"  skipped, shorter than {clip.fewest} frames: {_count(len(left_out), 'file')} ({_some(left_out)})"
        )
    spans = [w.stop - w.start for w in (*train, *held_out) if w.stop is not None]
    if padded := sum(frames < num_frames for frames in spans):
        lines.append(f"  {_count(padded, 'window')} shorter than {num_frames} frames: the last frame is repeated")
    slower = sum(num_frames <= frames < (num_frames - 1) * stride + 1 for frames in spans)
    if slower:
        lines.append(f"  {_count(slower, 'window')} too short for stride {stride}: taken at the largest that fits")
    return lines + [f"  {note}" for note in source.notes]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = f", … ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
