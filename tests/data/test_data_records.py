"""ArrayRecord: our own shards there and back, and tfds' prepared folders, without TensorFlow."""

import io
import json
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from jaxalign.data import records
from jaxalign.data.clips import Clip, Window, load, windows
from jaxalign.data.pipeline import batches, held_out
from jaxalign.data.records import array_record, tfds, write_array_record
from jaxalign.data.sources import open_source
from jaxalign.data.video import UnreadableVideo

CLIP = Clip(num_frames=4, height=16, width=24)


def _clips(n, seed=0, frames=9):
    rng = np.random.default_rng(seed)
    for k in range(n):
        yield {
            "video": rng.integers(0, 256, (frames + k % 3, 16, 24, 3), np.uint8),
            "label": k % 2,
            "name": f"c{seed}-{k}",
        }


def test_there_and_back(tmp_path):
    first, second = tmp_path / "a.array_record", tmp_path / "b.array_record-00001-of-00002"
    assert write_array_record(str(first), _clips(3), ("left", "right")) == 3
    write_array_record(str(second), _clips(2, seed=1), ("left", "right"))
    source = open_source(str(tmp_path))
    assert source.classes == ("left", "right") and source.name == str(tmp_path)
    assert [(i.name, i.frames, i.label) for i in source.items] == [
        ("c0-0", 9, 0),
        ("c0-1", 10, 1),
        ("c0-2", 11, 0),
        ("c1-0", 9, 0),
        ("c1-1", 10, 1),
    ]
    written = [*_clips(3), *_clips(2, seed=1)]
    for item, clip in enumerate(written):
        got = load(source, Window(item, 0, len(clip["video"])), CLIP, np.random.default_rng(0), position=0.0)
        np.testing.assert_array_equal(got["video"], clip["video"][:4])
    (tmp_path / "a.array_record.json").unlink()  # somebody else's shard: lengths and labels are read from it
    again = array_record(str(tmp_path))
    assert again.items == source.items
    assert len(list(tmp_path.glob("*unfinished"))) == 0
    with pytest.raises(UnreadableVideo):
        source.read(0, 6, 12, 1, (16, 24))


def test_splits_by_file_name_and_resizing(tmp_path):
    write_array_record(str(tmp_path / "toy-train.array_record-00000-of-00001"), _clips(3))
    write_array_record(str(tmp_path / "toy-test.array_record-00000-of-00001"), _clips(2, seed=1))
    source = array_record(str(tmp_path))
    assert sorted((i.name, i.split) for i in source.items) == [
        ("c0-0", "train"),
        ("c0-1", "train"),
        ("c0-2", "train"),
        ("c1-0", "held_out"),
        ("c1-1", "held_out"),
    ]
    batch = batches(source, seed=0, batch_size=2, num_frames=4, height=8, width=8)[0]
    assert batch["video"].shape == (2, 4, 8, 8, 3)
    assert held_out(source, 2, num_frames=4, height=32, width=32)["video"].shape == (2, 4, 32, 32, 3)


def test_words_in_shard_names(tmp_path):
    def split_of(name):
        return records._split_of(f"/data/test/{name}.array_record-00000-of-00001")

    for name in ("train_0", "my_train_set", "train_00000", "Train", "ucf-train.2", "x_train"):
        assert split_of(name) == "train", name
    for name in ("test_0", "my_test_set", "toy-val", "valid01", "validation_3", "my_held_out", "heldout"):
        assert split_of(name) == "held_out", name
    for name in ("trainer", "strain", "latest", "contest_a", "values", "interval_2"):
        assert split_of(name) is None, name
    write_array_record(str(tmp_path / "a_train_0.array_record"), _clips(1))
    with pytest.raises(ValueError, match=r"data.split=2: .* has no numbered lists"):
        open_source(str(tmp_path), split=2)
    with pytest.raises(ValueError, match=r"none of its 1 videos is for split 'held_out'; .* or into a shard"):
        held_out(open_source(str(tmp_path)), 1, num_frames=4, height=16, width=24)


def test_bad_shards_and_records(tmp_path):
    with pytest.raises(ValueError, match="wanted uint8"):
        write_array_record(str(tmp_path / "x.array_record"), [{"video": np.zeros((2, 4, 4, 3))}])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="array_record"):
        array_record(str(tmp_path))
    write_array_record(str(tmp_path / "none.array_record"), [])
    with pytest.raises(ValueError, match="no records in its 1"):
        array_record(str(tmp_path))
    (tmp_path / "x.array_record").write_bytes(b"nothing of the kind" * 50)
    with pytest.raises(ValueError, match="damaged"):
        array_record(str(tmp_path))
    path = tmp_path / "good" / "y.array_record"
    path.parent.mkdir()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for clip in _clips(2):
        data = io.BytesIO()
        np.savez(data, video=clip["video"])
        writer.write(data.getvalue())
    writer.write(b"not a record")
    writer.close()
    listed = [["a", 9, 0], ["b", 10, 0], ["broken", 9, 0]]
    (path.parent / "y.array_record.json").write_text(json.dumps({"classes": [], "records": listed}))
    data = batches(array_record(str(path.parent)), seed=0, batch_size=3, num_frames=4, height=16, width=24)
    batch = data[0]
    assert dict(zip(data.names(batch["index"]), batch["substituted"].tolist(), strict=True)) == {
        "a": False,
        "b": False,
        "broken": True,
    }


def _tfds(folder, splits):
    """What download_and_prepare(file_format='array_record') leaves of a data set with tfds' Video and
    ClassLabel."""
    from tensorflow_datasets.proto import tf_example_pb2

    folder.mkdir(parents=True)
    kind = "tensorflow_datasets.core.features."
    features = {
        "video": {"pythonClassName": f"{kind}video_feature.Video", "video": {"encodingFormat": "png"}},
        "label": {
            "pythonClassName": f"{kind}class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "2"},
        },
    }
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (folder / "label.labels.txt").write_text("left\nright\n")
    for split, clips in splits.items():
        writer = ArrayRecordWriter(str(folder / f"toy-{split}.array_record-00000-of-00001"), "group_size:1")
        for clip in clips:
            example = tf_example_pb2.Example()
            for frame in clip["video"]:
                data = io.BytesIO()
                Image.fromarray(frame).save(data, "PNG")
                example.features.feature["video"].bytes_list.value.append(data.getvalue())
            example.features.feature["label"].int64_list.value.append(clip["label"])
            writer.write(example.SerializeToString())
        writer.close()


def test_tfds_folders_are_read_without_tensorflow(tmp_path, monkeypatch):
    train, test = list(_clips(3)), list(_clips(2, seed=1))
    _tfds(tmp_path / "toy" / "config" / "1.0.0", {"train": list(_clips(1, seed=9))})
    _tfds(tmp_path / "toy" / "config" / "2.0.10", {"train": train, "test": test})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = open_source("tfds:toy")  # the newest version
    assert source.classes == ("left", "right") and [i.split for i in source.items].count("held_out") == 2
    found = windows(source, "train", CLIP)
    for window, clip in zip(found, train, strict=True):
        got = load(source, window, CLIP, np.random.default_rng(0), position=0.999)
        np.testing.assert_array_equal(got["video"], clip["video"][-4:])
        assert got["label"] == clip["label"]
    assert open_source(str(tmp_path / "toy" / "config" / "2.0.10")).items == source.items
    with pytest.raises(UnreadableVideo, match="only 9 frames"):
        load(source, found[0], Clip(10, 16, 24), np.random.default_rng(0))
    assert "tensorflow" not in sys.modules
    folder = tmp_path / "toy" / "config" / "2.0.10"
    for shard in folder.glob("*.array_record*"):
        shard.rename(str(shard).replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="file_format='array_record'"):
        tfds("toy")


def test_ucf101_of_tfds_is_taken_by_its_split(tmp_path, monkeypatch):
    for config, clips in (("ucf101_1", 3), ("ucf101_1_256", 4), ("ucf101_3", 5)):
        _tfds(tmp_path / "ucf101" / config / "2.0.0", {"train": _clips(clips, frames=2), "test": _clips(1, frames=2)})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert [i.split for i in open_source("tfds:ucf101").items].count("train") == 4
    assert [i.split for i in open_source("tfds:ucf101", split=3).items].count("train") == 5
    assert len(tfds("ucf101/ucf101_1").items) == 4, "a config by its name"
    with pytest.raises(ValueError, match=r"data.split=2: .* is prepared for split 1, 3 only"):
        open_source("tfds:ucf101", split=2)
    third = tmp_path / "ucf101" / "ucf101_3" / "2.0.0"
    for folder in (third, third.parent):  # by its path: it is what it is
        assert tfds(str(folder), split=3).items == tfds(str(folder)).items
        assert tfds(str(folder)).notes == ("prepared from UCF-101's lists of split 3",)
    assert open_source(str(third), split=3).notes == ()
    with pytest.raises(ValueError, match=r"data.split=2: .* is prepared for split 3 only"):
        open_source(f"array_record:{third}", split=2)
    # Another config, newer by its version, has no say in what this one holds.
    newer = tmp_path / "ucf101" / "ucf101_3" / "9.0.0"
    newer.mkdir()
    (newer / "features.json").write_text("{}")
    assert len(tfds("ucf101").items) == 5


def test_a_small_tfds_set_without_a_test_split_holds_one_record_out(tmp_path, monkeypatch):
    _tfds(tmp_path / "toy" / "1.0.0", {"train": _clips(3, frames=2)})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = tfds("toy")
    assert [item.split for item in source.items] == ["train", "train", "held_out"]
    assert "the last one is held out" in source.notes[0]
    with pytest.raises(ValueError, match=r"data.split=2: .* has no numbered splits"):
        tfds("toy", split=2)
