"""Real clips for a Fréchet distance: proportions, places, no video twice before all have come."""

from collections import Counter

import numpy as np
import pytest

from jaxalign.data.clips import Clip, Item, Source, find_cuts, part
from jaxalign.data.proportional import draw, read, shares
from jaxalign.data.synthetic import synthetic
from jaxalign.data.video import UnreadableVideo

CLIP = Clip(4, 8, 8, stride=3)


def listed(counts, frames=40, split="held_out", **fields):
    """A source of `counts[c]` videos of class c whose frames hold their own number."""
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    items = tuple(Item(f"v{k}", frames, 25.0, c, split) for k, c in enumerate(labels))

    def numbered(item, start, stop, step, cover):
        if item == 0:
            raise UnreadableVideo("v0", "torn")
        video = np.arange(start, stop, step, dtype=np.uint8)[:, None, None, None] + np.zeros((8, 8, 3), np.uint8)
        return video, np.zeros((stop - start, 8, 8), np.uint8)

    return Source("listed", items, tuple(map(str, range(len(counts)))), read=numbered, **fields)


@pytest.mark.parametrize("count", [1, 7, 64, 112, 113, 500])
def test_classes_come_in_their_proportions_and_videos_once(count):
    counts = (3, 80, 29)
    source = listed(counts)
    drawn = draw(source, "held_out", count, 0, CLIP)
    assert len(drawn) == count == sum(shares(counts, count))
    classes = Counter(source.items[w.item].label for w in drawn)
    for label, size in enumerate(counts):
        assert abs(classes[label] - count * size / 112) < 1
        seen = Counter(w.item for w in drawn if source.items[w.item].label == label)
        assert not seen or max(seen.values()) == -(-classes[label] // size), "all come before one comes again"
    assert all(w.stop - w.start == 10 and 0 <= w.start <= 30 for w in drawn)


def test_the_seed_decides_and_any_beginning_is_a_mixture():
    source = listed((50, 50))
    first = draw(source, "held_out", 60, 5, CLIP)
    assert first == draw(source, "held_out", 60, 5, CLIP) != draw(source, "held_out", 60, 6, CLIP)
    assert {source.items[w.item].label for w in first[:12]} == {0, 1}
    starts = [w.start for s in range(40) for w in draw(source, "held_out", 60, s, CLIP)]
    assert set(starts) == set(range(31)), "every place can come"


def test_a_clip_is_what_was_drawn_and_a_torn_video_is_replaced_by_its_class():
    source = listed((2, 2), split="both", frames=100)
    assert part(source.items[0], "train") == (0, 80)
    drawn = draw(source, "train", 4, 0, CLIP)
    assert all(w.stop <= 80 for w in drawn)
    for k, window in enumerate(drawn):
        row = read(source, drawn, k, CLIP)
        assert row["substituted"] == (window.item == 0)
        if window.item == 0:
            assert row["item"] == 1
        else:
            assert row["video"][:, 0, 0, 0].tolist() == [window.start + 3 * i for i in range(4)]
    only = listed((1,))
    with pytest.raises(ValueError, match=r"1 videos in a row cannot be read; the first is v0: torn"):
        read(only, draw(only, "held_out", 1, 0, CLIP), 0, CLIP)


def test_what_is_too_short_or_unknown():
    short = listed((4,), frames=8)  # long enough for stride 2 only
    assert {(w.start, w.stop) for s in range(9) for w in draw(short, "held_out", 4, s, CLIP)} == {(0, 7), (1, 8)}
    with pytest.raises(ValueError, match=r"nothing in its 4 videos for split 'held_out' has num_frames=4"):
        draw(listed((4,), frames=3), "held_out", 4, 0, CLIP)
    with pytest.raises(ValueError, match="none of its 4 videos is for split 'train'"):
        draw(short, "train", 4, 0, CLIP)
    with pytest.raises(ValueError, match="write 'train' or 'held_out'"):
        draw(short, "test", 4, 0, CLIP)
    with pytest.raises(ValueError, match="write at least 1"):
        draw(short, "held_out", 0, 0, CLIP)
    # Labels and lengths that only a look tells (tfds).
    unknown = Source(
        "unknown",
        tuple(Item(f"r{k}", None, 25.0, 0, "train") for k in range(8)),
        ("a", "b"),
        look=lambda item: (30 if item else 2, item % 2),
    )
    drawn = draw(unknown, "train", 7, 0, CLIP)
    assert sorted(w.item for w in drawn) == [1, 2, 3, 4, 5, 6, 7]
    made = synthetic(train=4, held_out=6)
    drawn = draw(made, "held_out", 6, 0, CLIP)
    row = read(made, drawn, 0, CLIP)
    assert row["video"].shape == (4, 8, 8, 3) and row["item"] == drawn[0].item and not find_cuts(row["video"][..., 0])
