"""Folders of frames: their order, splits, pixels beside those of files, and what is wrong with some."""

import pickle

import numpy as np
import pytest
from PIL import Image

from jaxalign.data.clips import Clip, Window, load, windows
from jaxalign.data.frame_folders import FrameReader, frames_of, in_order
from jaxalign.data.pipeline import batches
from jaxalign.data.sources import folder, open_source
from jaxalign.data.summary import summary
from jaxalign.data.video import UnreadableVideo, resize

SIZE = {"num_frames": 4, "height": 48, "width": 64}


@pytest.fixture
def write(numbered):
    def write(path, numbers, pattern="{:08d}.png", first=0, **kind):
        path.mkdir(parents=True, exist_ok=True)
        for k, number in enumerate(numbers):
            Image.fromarray(numbered.frame(first + k)).save(path / pattern.format(number), **kind)
        return path

    return write


@pytest.fixture
def sky(tmp_path, write):
    root = tmp_path / "sky_timelapse"
    for name, count in (("sky_train/ab/ab_1", 12), ("sky_train/ab/ab_2", 3), ("sky_train/cd/cd_1", 9)):
        write(root / name, range(1, count + 1), name.split("/")[1] + "_frames_{:08d}.jpg", quality=95)
    write(root / "sky_test" / "ef" / "ef_1", range(7, 15), "ef_frames_{:08d}.jpg")
    (root / "sky_train" / "gh" / "gh_1").mkdir(parents=True)
    (root / "readme.txt").write_text("about")
    return root


def test_sky_timelapse_as_it_is_published(sky, numbered):
    source = open_source(str(sky), frame_rate=30.0)
    assert [(i.name, i.frames, i.fps, i.label, i.split) for i in source.items] == [
        ("sky_test/ef/ef_1", 8, 30.0, 0, "held_out"),
        ("sky_train/ab/ab_1", 12, 30.0, 0, "train"),
        ("sky_train/ab/ab_2", 3, 30.0, 0, "train"),
        ("sky_train/cd/cd_1", 9, 30.0, 0, "train"),
    ]
    assert source.classes == () and source.skipped == (("sky_train/gh/gh_1", "an empty folder"),)
    text = "\n".join(summary(source, stride=2, **SIZE))
    assert "gh_1: an empty folder" in text and "shorter than 4 frames: 1 file (sky_train/ab/ab_2)" in text
    got = load(source, Window(1, 0, 12), Clip(4, 48, 64, stride=3), np.random.default_rng(0), position=0.999)
    assert [numbered.number(frame) for frame in got["video"]] == [2, 5, 8, 11]
    assert open_source(f"frames:{sky}").items == open_source(str(sky)).items


def test_pixels_and_thumbnails_are_those_of_a_file(tmp_path, write, numbered):
    """The same frames as a lossless file and as PNGs: equal pixels, nearly equal thumbnails."""
    frames = [numbered.frame(k) for k in range(9)]
    write(tmp_path / "images" / "v", range(9))
    (tmp_path / "file").mkdir()
    numbered.encode(tmp_path / "file" / "v.mkv", frames, codec="ffv1", pixels="bgr0", b_frames=0)
    images, file = folder(str(tmp_path / "images")), folder(str(tmp_path / "file"))
    assert [i.frames for i in images.items] == [i.frames for i in file.items] == [9]
    one, other = (s.read(0, 1, 8, 3, (24, 32)) for s in (images, file))
    np.testing.assert_array_equal(one[0], resize(np.stack(frames[1:8:3]), (24, 32)))
    assert one[0].shape == other[0].shape and np.abs(one[0].astype(int) - other[0]).max() <= 2
    assert one[1].shape == other[1].shape and np.abs(one[1].astype(int) - other[1]).max() <= 2
    write(tmp_path / "jpegs" / "v", range(9), "{}.jpg", quality=95)
    thumbs = folder(str(tmp_path / "jpegs")).read(0, 1, 8, 3, (24, 32))[1]
    assert np.abs(thumbs.astype(int) - one[1]).mean() < 2, "of frames that are not wanted, from a coarser decoding"


@pytest.mark.parametrize("layout", ["train/{}", "{}"])
def test_flat_folders_and_batches_with_a_torn_frame(tmp_path, write, layout):
    for k in range(3):
        write(tmp_path / layout.format(f"v{k}"), range(10), "frame{}.jpg", first=20 * k)
    if "train" in layout:
        write(tmp_path / "val" / "v9", range(10), "frame{}.jpg")
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    assert source.classes == ()
    assert frames_of(source.read.folders[0]).names == tuple(f"frame{k}.jpg" for k in range(10))
    found = windows(source, "train", Clip(**SIZE))
    assert len(found) == 3
    torn = tmp_path / layout.format("v1") / "frame5.jpg"
    torn.write_bytes(torn.read_bytes()[:200])
    data = batches(source, seed=0, batch_size=3, stride=2, **SIZE)
    seen = [data[step] for step in range(4)]
    assert any(batch["substituted"].any() for batch in seen) and not all(batch["substituted"].all() for batch in seen)
    with pytest.raises(UnreadableVideo, match=r"frame5.jpg: the frame cannot be decoded"):
        source.read(1, 4, 8, 1, (24, 32))
    torn.unlink()  # known from the listing, gone since
    with pytest.raises(UnreadableVideo, match=r"frame5.jpg: the frame is gone"):
        source.read(1, 4, 8, 1, (24, 32))
    with pytest.raises(UnreadableVideo, match=r"has 10 frames, not 8 to 11"):
        source.read(1, 8, 12, 1, (24, 32))


def test_frames_of_several_sizes_take_the_first_ones(tmp_path, numbered):
    (tmp_path / "v").mkdir()
    for k, (height, width) in enumerate([(48, 64), (96, 128), (60, 60)]):
        Image.fromarray(numbered.frame(k, height, width)).convert("RGBA").save(tmp_path / "v" / f"{k}.png")
    video, thumbs = folder(str(tmp_path)).read(0, 0, 3, 1, (48, 48))
    assert video.shape == (3, 48, 64, 3) and thumbs.shape == (3, 32, 32)
    assert [numbered.number(frame) for frame in video] == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "kept", "gap"),
    [
        (["f10.jpg", "f9.jpg", "f8.png"], ["f8.png", "f9.jpg", "f10.jpg"], ""),
        (["a_1.jpg", "a_2.jpg", "a_5.jpg", "a_6.jpg", "a_7.jpg"], ["a_5.jpg", "a_6.jpg", "a_7.jpg"], "after a_2.jpg"),
        ([f"{k}.jpg" for k in (0, 33, 67, 100, 133)], [f"{k}.jpg" for k in (0, 33, 67, 100, 133)], ""),
        (["v_1_of_9.jpg"], ["v_1_of_9.jpg"], ""),
        (["b.jpg", "a.jpg"], ["a.jpg", "b.jpg"], ""),
    ],
)
def test_the_order_of_frames(names, kept, gap):
    found = in_order("v", names)
    assert list(found.names) == kept and found.gap == gap


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["1.jpg", "2.jpg", "1_mask.jpg", "2_mask.jpg"], r"2 sequences, not one \(1.jpg, 1_mask.jpg\)"),
        (["1.jpg", "2.jpg", "cover.jpg"], r"2 sequences, not one \(1.jpg, cover.jpg\)"),
        (["1.jpg", "1.png"], r"two frames have the same number \(1.jpg, 1.png\)"),
    ],
)
def test_images_that_are_no_sequence(names, said):
    with pytest.raises(UnreadableVideo, match=said):
        in_order("v", names)


def test_gaps_and_bad_folders_are_one_line_each(tmp_path, write):
    write(tmp_path / "good", range(6))
    write(tmp_path / "gap", [0, 1, 2, 3, 4, 9, 10])
    write(write(tmp_path / "two", [1, 2]), [1, 2], "mask{}.png")
    source = open_source(str(tmp_path))
    assert [(i.name, i.frames) for i in source.items] == [("gap", 5), ("good", 6)]
    assert [name for name, _ in source.skipped] == ["two"]
    text = "\n".join(summary(source, **SIZE))
    assert "1 video lacks frames between others: the longest stretch is used (gap after 00000004.png)" in text
    assert "two: its images are 2 sequences" in text
    with pytest.raises(ValueError, match=r"data.frame_rate=0"):
        open_source(str(tmp_path), frame_rate=0.0)
    empty = tmp_path / "empty"
    (empty / "below").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no videos and no folders of frames in it .*\.mp4.*\.png"):
        open_source(str(empty))
    with pytest.raises(ValueError, match=r"no folder of images in it .*the first, below: an empty folder"):
        open_source(f"frames:{empty}")
    with pytest.raises(UnreadableVideo, match="the folder is gone"):
        FrameReader((str(empty / "x"),))(0, 0, 1, 1, (8, 8))
