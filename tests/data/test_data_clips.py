"""Windows, splits by time, cuts, crops and flips."""

import itertools

import numpy as np
import pytest

from jaxalign.data.clips import Clip, Item, Source, Window, find_cuts, load, part, short_items, windows
from jaxalign.data.sources import FileCache, FileReader, demo, folder
from jaxalign.data.video import UnreadableVideo, probe, read_span

SMALL = Clip(num_frames=8, height=24, width=24)


def _source(*frames, split="both", fps=25.0):
    return Source("s", tuple(Item(f"v{k}", n, fps, 0, split) for k, n in enumerate(frames)))


def test_splits_by_time_are_disjoint_with_a_gap():
    for frames in [7, 40, 99, 132, 250, 1001]:
        item = _source(frames).items[0]
        (start, stop), (later, end) = part(item, "train"), part(item, "held_out")
        assert (start, end) == (0, frames) and later - stop >= 0.05 * frames
        assert stop <= 0.8 * frames and end - later <= 0.15 * frames


def test_windows_cover_the_split_and_long_items_give_more():
    source = _source(100, 2500, 9, 7)
    train = windows(source, "train", SMALL)
    assert [w for w in train if w.item == 0] == [Window(0, 0, 80)]
    long = [w for w in train if w.item == 1]  # 2000 frames of 25 a second: eight stretches of ten seconds
    assert len(long) == 8 and long[0].start == 0 and long[-1].stop == 2000
    assert all(a.stop == b.start for a, b in itertools.pairwise(long))
    held = windows(source, "held_out", SMALL)
    assert {w.item for w in held} == {0, 1} and all(w.start >= 85 for w in held)
    assert short_items(source, SMALL) == ("v2", "v3")
    assert windows(_source(50, split="train"), "held_out", SMALL) == ()
    assert windows(_source(9, split="train"), "train", SMALL) == (Window(0, 0, 9),)
    with pytest.raises(ValueError, match="held_out"):
        windows(source, "test", SMALL)
    with pytest.raises(ValueError, match=r"data\.stride=-1"):
        Clip(8, 24, 24, stride=-1)


def _recording(frames=60, cuts=()):
    """A source whose reads are remembered; frame k is grey value k (+ noise that a cut replaces)."""
    reads = []
    shots = np.random.default_rng(1).integers(0, 256, (len(cuts) + 1, 32, 32), np.uint8)

    def read(item, start, stop, step, cover):
        reads.append((start, stop, step))
        numbers = np.arange(start, stop)
        video = np.broadcast_to(numbers[::step, None, None, None], (len(numbers[::step]), *cover, 3)).astype(np.uint8)
        return video, shots[np.searchsorted(cuts, numbers, side="right")] if cuts else np.zeros(
            (stop - start, 32, 32), np.uint8
        )

    return Source("s", (Item("v", frames, 25.0, 3, "train"),), read=read), reads


def test_clips_stay_inside_their_window_and_use_all_of_it():
    source, reads = _recording()
    starts = set()
    for seed in range(300):
        got = load(source, Window(0, 20, 40), SMALL, np.random.default_rng(seed))
        numbers = got["video"][:, 0, 0, 0].tolist()
        assert numbers == list(range(numbers[0], numbers[0] + 8)) and got["label"] == 3 and got["name"] == "v"
        starts.add(numbers[0])
    assert starts == set(range(20, 33))
    assert {stop - start for start, stop, _ in reads} == {8}
    ends = [
        load(source, Window(0, 20, 40), SMALL, np.random.default_rng(0), position=p)["video"][0, 0, 0, 0]
        for p in (0.0, 0.999)
    ]
    assert ends == [20, 32]


def test_stride_shrinks_only_as_far_as_it_must():
    source, reads = _recording()
    for stride, length, expected in [(3, 40, 3), (3, 22, 3), (3, 21, 2), (3, 15, 2), (3, 14, 1), (9, 8, 1)]:
        load(source, Window(0, 0, length), Clip(8, 24, 24, stride), np.random.default_rng(0))
        assert reads[-1][2] == expected, (stride, length)
    with pytest.raises(UnreadableVideo, match="only 7 frames"):
        load(source, Window(0, 0, 7), SMALL, np.random.default_rng(0))
    one = load(source, Window(0, 5, 6), Clip(1, 24, 24, 4), np.random.default_rng(0))
    assert one["video"].shape == (1, 24, 24, 3) and one["video"][0, 0, 0, 0] == 5


@pytest.mark.parametrize("stride", [1, 2])
def test_clips_keep_off_cuts_where_there_is_room(stride):
    cuts = (23, 41)
    source, reads = _recording(cuts=cuts)
    clip = Clip(8, 24, 24, stride)
    for seed in range(100):
        reads.clear()
        video = load(source, Window(0, 0, 60), clip, np.random.default_rng(seed))["video"][:, 0, 0, 0]
        assert video[-1] - video[0] == 7 * stride and len(reads) <= 2  # the first other place is right
        assert len(set(np.searchsorted(cuts, video, side="right").tolist())) == 1, (seed, video)
    # No shot inside the window is long enough: a clip all the same, the one that was drawn first.
    crowded, _ = _recording(cuts=(4, 8, 12, 16))
    got = load(crowded, Window(0, 0, 20), SMALL, np.random.default_rng(0), position=0.5)["video"]
    assert got[0, 0, 0, 0] == 6 and len(got) == 8


def test_cuts_of_the_demo_clips_are_found_and_nothing_else():
    expected = {"bikes.mp4": [30, 76, 137, 187, 242], "bigbuckbunny.mp4": [], "carphone_pristine.mp4": []}
    source = demo()
    for item, path in zip(source.items, source.read.paths, strict=True):
        assert find_cuts(read_span(path, 0, item.frames, 1, (24, 24))[1]) == expected[item.name]
    # a black screen with sensor noise
    noise = np.random.default_rng(0).integers(0, 6, (20, 32, 32), np.uint8)
    assert find_cuts(noise) == []
    flash = np.random.default_rng(0).integers(0, 100, (1, 32, 32), np.uint8).repeat(9, 0)
    flash[4:] += 100  # a light goes on: the same scene
    assert find_cuts(flash) == []


def test_real_file_with_cuts(tmp_path, numbered):
    rng = np.random.default_rng(5)
    shots = [np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(3)]
    frames = [np.roll(shots[k // 15], k, 1) for k in range(45)]
    (tmp_path / "v").mkdir()
    numbered.encode(tmp_path / "v" / "cuts.mp4", frames)
    source = folder(str(tmp_path / "v"))
    path = source.read.paths[0]
    assert find_cuts(read_span(path, 0, 45, 1, (24, 32))[1]) == [15, 30]
    for seed in range(10):
        got = load(source, Window(0, 0, 45), Clip(8, 24, 32), np.random.default_rng(seed))["video"].astype(int)
        assert np.abs(np.diff(got, axis=0)).mean((1, 2, 3)).max() < 45


def test_crop_and_flip_come_from_the_generator(tmp_path, numbered):
    numbered(tmp_path / "v" / "a.mp4")
    source = folder(str(tmp_path / "v"))
    window = Window(0, 0, 60)
    plain = Clip(4, 24, 24)
    for seed in range(6):
        base = load(source, window, plain, np.random.default_rng(seed))["video"]
        same = load(source, window, plain, np.random.default_rng(seed))["video"]
        np.testing.assert_array_equal(base, same)
        flipped = load(source, window, Clip(4, 24, 24, hflip=True), np.random.default_rng(seed))["video"]
        # The same draws whatever is switched on: a flip is the same clip, mirrored or not.
        if np.random.default_rng(seed).random(4)[1] < 0.5:
            np.testing.assert_array_equal(flipped, base[:, :, ::-1])
        else:
            np.testing.assert_array_equal(flipped, base)
    crops = {
        load(source, window, Clip(4, 24, 24, random_crop=True), np.random.default_rng(s), position=0.3)[
            "video"
        ].tobytes()
        for s in range(20)
    }
    assert 3 < len(crops) <= 9  # 32 columns shrunk from 64, 24 wanted: nine places


def test_kept_files_give_what_the_file_gives(tmp_path, numbered):
    paths = [str(numbered(tmp_path / name, first=10 * k)) for k, name in enumerate(("a.mp4", "b.mp4"))]
    infos = [probe(path) for path in paths]
    keeping, none = FileCache(), FileCache(megabytes=0)
    kept, read = (FileReader(tuple(paths), tuple(infos), cache) for cache in (keeping, none))
    for item, start, stop, step in [(0, 3, 18, 2), (1, 50, 60, 3), (0, 0, 60, 1)]:
        for one, other in zip(
            kept(item, start, stop, step, (24, 24)), read(item, start, stop, step, (24, 24)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert len(keeping.files) == 2 and not none.files
    with pytest.raises(UnreadableVideo):
        kept(0, 55, 63, 1, (24, 24))
    kept(0, 0, 4, 1, (12, 12))
    assert len(keeping.files) == 1  # one frame size at a time


def test_a_place_that_is_known_to_lie_across_a_cut_is_not_read(tmp_path, numbered):
    rng = np.random.default_rng(5)
    shots = [np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(2)]
    numbered.encode(tmp_path / "cut.mp4", [shots[k // 15] for k in range(30)])
    path = str(tmp_path / "cut.mp4")
    reader, calls = FileReader((path,), (probe(path),), FileCache(megabytes=0)), []

    class Counting(FileReader):
        def __call__(self, *place):
            calls.append(place[1:3])
            return super().__call__(*place)

    item = Item("cut.mp4", 30, 25.0, 0, "train")
    counting = Source("cut", (item,), read=Counting(reader.paths, reader.infos, reader.cache))
    first, again = (load(counting, Window(0, 0, 30), Clip(8, 24, 32), np.random.default_rng(0), 0.5) for _ in range(2))
    np.testing.assert_array_equal(first["video"], again["video"])
    assert calls == [(11, 19), (15, 23), (15, 23)]
