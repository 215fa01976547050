"""Captions out of a CSV and of the sources themselves; clips that span their video, and short ones that are padded."""

import dataclasses

import numpy as np
import pytest

from jaxalign.data import captions, pipeline
from jaxalign.data.clips import Clip, Item, Source, Window, fingerprint, load, short_items, windows
from jaxalign.data.records import array_record, write_array_record
from jaxalign.data.sources import open_source
from jaxalign.data.summary import summary


def _read(item, start, stop, step, cover):
    """Frames whose grey value is their number."""
    numbers = np.arange(start, stop)
    video = np.broadcast_to(numbers[::step, None, None, None], (len(numbers[::step]), *cover, 3)).astype(np.uint8)
    return video, np.zeros((stop - start, 32, 32), np.uint8)


def _source(*frames, names=None, **fields):
    names = names or [f"v{k}.mp4" for k in range(len(frames))]
    items = tuple(Item(name, n, 25.0, 0, "train") for name, n in zip(names, frames, strict=True))
    return Source("s", items, read=_read, **fields)


def _csv(folder, *rows, header="video,caption,score"):
    path = folder / "c.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_csv_beside_its_videos(tmp_path):
    source = _source(9, 9, 9, 9, names=["a/one.mp4", "b/one.mp4", "two.mp4", "three.mp4"], skipped=(("x.mp4", "torn"),))
    rows = ['a/one.mp4,"a cat, sitting",1', "two.mp4,  a dog ,2", "x.mp4,unreadable,3", "one.mp4,which one?,3"]
    rows += ["three.mp4,a hen,4"]
    found = captions.attach(source, _csv(tmp_path, *rows))
    assert found.captions == ("a cat, sitting", "", "a dog", "a hen")  # `one.mp4` names two: nobody's
    assert [item.split for item in found.items] == ["train", "unused", "train", "train"]
    assert found.notes == (f"captions {tmp_path / 'c.csv'}: 1 videos have no row and are not used (b/one.mp4)",)
    assert found.notes[0] in "\n".join(summary(found, num_frames=4, height=8, width=8))
    assert fingerprint(found) != fingerprint(dataclasses.replace(found, captions=("", "", "", "")))
    # The same file under other columns; captions.csv in the folder is found by itself.
    renamed = _csv(tmp_path, *rows, header="file,text,score")
    renamed.rename(tmp_path / captions.FILE)
    again = captions.captioned(source, str(tmp_path), "", "file", "text")
    assert again.captions == found.captions


def test_rows_of_videos_that_are_not_there(tmp_path):
    names = [f"v{k}.mp4" for k in range(18)]
    rows = [f"{name},words" for name in names]
    found = captions.attach(_source(*[9] * 18, names=names), _csv(tmp_path, *rows, "gone.mp4,words"))
    assert "1 of 19 rows name videos not there (gone.mp4)" in found.notes[0] and len(set(found.captions)) == 1
    with pytest.raises(
        ValueError, match=r"3 of its 21 rows name videos that are not in 's' \(g0.mp4, g1.mp4, g2.mp4\)"
    ):
        captions.attach(_source(*[9] * 18, names=names), _csv(tmp_path, *rows, *(f"g{k}.mp4,words" for k in range(3))))


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        (["a.mp4,x"], "path,caption", r"no column 'video' \(it has path, caption\); write --config.data.video_column"),
        (["a.mp4,x"], "video,text", "no column 'caption'"),
        ([], "video,caption", "a header and no rows"),
        (["a.mp4,x", "b.mp4, "], "video,caption", r"1 videos with an empty caption \(b.mp4\)"),
        (["a.mp4,x", "a.mp4,x"], "video,caption", r"1 videos named twice \(a.mp4\)"),
        (["a.mp4,x", ",y"], "video,caption", r"1 rows without a video \(row 3\)"),
    ],
)
def test_files_that_are_no_captions(tmp_path, rows, header, said):
    with pytest.raises(ValueError, match=said):
        captions.read_csv(_csv(tmp_path, *rows, header=header))


def test_no_captions_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        captions.read_csv(tmp_path / "nowhere.csv")
    with pytest.raises(
        ValueError,
        match=r"2 of its 2 videos have no caption, but the student is told by text; put captions.csv \(columns",
    ):
        captions.captioned(_source(9, 9), str(tmp_path), "")
    with pytest.raises(ValueError, match="no row names a video"):
        captions.attach(
            _source(9, names=["a.mp4"], skipped=(("b.mp4", "torn"),)),
            _csv(tmp_path, "b.mp4,words", header="video,caption"),
        )


def test_sources_with_captions_of_their_own(tmp_path):
    for name in ("demo", "synthetic"):
        source = captions.captioned(open_source(name), name, "")
        assert len(source.captions) == len(source.items) and all(source.captions)
    clips = [{"video": np.zeros((5, 8, 8, 3), np.uint8), "caption": f"clip {k}"} for k in range(2)]
    write_array_record(str(tmp_path / "a.array_record"), clips)
    assert array_record(str(tmp_path)).captions == ("clip 0", "clip 1")
    (tmp_path / "a.array_record.json").unlink()
    assert array_record(str(tmp_path)).captions == ("clip 0", "clip 1")


@pytest.mark.parametrize("kind", ["", "folder:", "frames:", "array_record:"])
def test_captions_beside_a_folder_however_it_is_named(tmp_path, kind):
    _csv(tmp_path, "v0.mp4,a dog", header="video,caption").rename(tmp_path / captions.FILE)
    assert captions.captioned(_source(9), f"{kind}{tmp_path}", "").captions == ("a dog",)


def test_a_batch_says_what_it_shows():
    source = _source(9, 9, captions=("one", "two"), tokens=np.array([[1, 2], [3, 0]], np.uint16))
    data = pipeline.batches(source, seed=0, batch_size=2, num_frames=4, height=8, width=8)
    batch = data[0]
    assert data.prompts(batch) == [source.captions[k] for k in batch["item"]]
    np.testing.assert_array_equal(batch["tokens"], source.tokens[batch["item"]])
    assert batch["tokens"].dtype == np.int32
    stream = data.iterate()
    np.testing.assert_array_equal(next(stream)["tokens"], batch["tokens"])
    stream.close()


def test_stride_zero_spans_the_video():
    """VideoREPA's frames: 0, s, 2s, … with s = len // num_frames, whatever the seed."""
    clip = Clip(num_frames=4, height=8, width=8, stride=0)
    source = _source(400, 11, 3)
    assert windows(source, "train", clip) == (Window(0, 0, 400), Window(1, 0, 11))
    for window, wanted in ((Window(0, 0, 200), [0, 50, 100, 150]), (Window(1, 0, 11), [0, 2, 4, 6])):
        video = load(source, window, clip, np.random.default_rng(5))["video"]
        assert video[:, 0, 0, 0].tolist() == wanted
    assert "each spanning its video" in summary(source, num_frames=4, height=8, width=8, stride=0)[0]


def test_short_videos_are_skipped_or_padded():
    source = _source(9, 3, 1)
    skip, pad = (Clip(num_frames=4, height=8, width=8, short=how) for how in ("skip", "pad"))
    assert short_items(source, skip) == ("v1.mp4", "v2.mp4") and short_items(source, pad) == ()
    found = windows(source, "train", pad)
    assert [window.item for window in found] == [0, 1, 2]
    clips = [load(source, window, pad, np.random.default_rng(0))["video"][:, 0, 0, 0].tolist() for window in found[1:]]
    assert clips == [[0, 1, 2, 2], [0, 0, 0, 0]]
    said = "\n".join(summary(source, num_frames=4, height=8, width=8, short="pad"))
    assert "2 windows shorter than 4 frames: the last frame is repeated" in said and "skipped" not in said
    with pytest.raises(ValueError, match=r"data\.short='cut': write skip or pad"):
        Clip(4, 8, 8, short="cut")
