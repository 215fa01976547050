"""Lists and folders that say what is for training, and what is said of lists that are about something else."""

import sys

import pytest

from jaxalign.data.clips import split_by_name
from jaxalign.data.splits import layout

VIDEOS = [f"C{c}/v_{k}.avi" for c in range(2) for k in range(30)]


@pytest.fixture
def lists(tmp_path):
    """lists(train, test, number) writes the lists; the root is beside them."""
    root = tmp_path / "UCF-101"
    root.mkdir()
    place = tmp_path / "ucfTrainTestlist"
    place.mkdir()

    def write(train, test, number=1):
        for kind, names in (("train", train), ("test", test)):
            if names is not None:
                (place / f"{kind}list{number:02d}.txt").write_text("".join(f"{name} 1\n" for name in names))
        return root

    return write


def test_a_few_missing_videos_are_counted_and_named(lists):
    root = lists([*VIDEOS[:40], "C0/gone.avi"], VIDEOS[40:])
    found = layout(root, VIDEOS)
    assert found.classes == ("C0", "C1") and found.labels == [0] * 30 + [1] * 30
    assert found.splits == ["train"] * 40 + ["held_out"] * 20
    assert found.notes[1:] == ("1 of the 61 videos in trainlist01.txt and testlist01.txt are not there: C0/gone",)
    torn = layout(root, VIDEOS, unreadable=["C0/gone.avi"])
    assert len(torn.notes) == 1, "a torn file is there"


def test_many_missing_videos_stop(lists):
    root = lists([*VIDEOS[:40], *(f"C2/v_{k}.avi" for k in range(5))], VIDEOS[40:])
    with pytest.raises(
        ValueError,
        match=r"5 of the 65 videos in trainlist01.txt and testlist01.txt are not there \(7.7%, more than 5%\): "
        r"C2/v_0, C2/v_1, C2/v_2, … \(2 more\); complete the folder",
    ) as caught:
        layout(root, VIDEOS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "number", "said"),
    [
        (VIDEOS, VIDEOS[:2], 1, r"2 videos stand in both trainlist01.txt and testlist01.txt: C0/v_0, C0/v_1"),
        (VIDEOS, None, 1, r"has trainlist01.txt and lacks testlist01.txt"),
        (VIDEOS[:40], VIDEOS[40:], 2, r"data.split=1: no trainlist01.txt in .* \(there are those of split 2 there\)"),
    ],
)
def test_lists_that_do_not_belong_together(lists, train, test, number, said):
    with pytest.raises(ValueError, match=said):
        layout(lists(train, test, number), VIDEOS)


def test_lists_of_another_folder_beside_this_one_are_not_its_own(lists):
    root = lists(["X/a.avi"], ["X/b.avi"])
    assert set(layout(root, VIDEOS).splits) == {"train", "held_out"}
    (root / "trainlist01.txt").write_text("X/a.avi\n")
    (root / "testlist01.txt").write_text("X/b.avi\n")
    with pytest.raises(ValueError, match=r"2 of the 2 videos .* are not there"):
        layout(root, VIDEOS)


def test_a_number_without_lists(tmp_path):
    with pytest.raises(ValueError, match=r"data.split=3: no trainlist03.txt in .* \(none is there\)"):
        layout(tmp_path, VIDEOS, split=3)


def test_sky_folders_are_splits_and_hold_no_classes(tmp_path):
    names = ["sky_train/a/a_1", "sky_train/a/a_2", "sky_train/b/b_1", "sky_test/c/c_1"]
    found = layout(tmp_path, names)
    assert found.splits == ["train"] * 3 + ["held_out"] and found.classes == () and found.labels == [0] * 4
    assert layout(tmp_path, [name.replace("sky_", "") for name in names]).classes == ("a", "b", "c")
    around = layout(tmp_path, [f"SkyTimelapse/clips/{name}" for name in names])
    assert (around.splits, around.labels, around.classes) == (found.splits, found.labels, ())


TRAIN, TEST = [f"train/C{c}/{k}.mp4" for c in range(2) for k in range(12)], ["test/C0/a.mp4", "test/C1/b.mp4"]


@pytest.mark.parametrize("change", [str, lambda name: name.title(), lambda name: f"data/{name}"])
def test_split_folders_in_any_case_and_inside_of_another(tmp_path, change):
    found = layout(tmp_path, [change(name) for name in (*TRAIN, *TEST)])
    assert found.splits == ["train"] * 24 + ["held_out"] * 2
    assert found.labels == [0] * 12 + [1] * 12 + [0, 1] and found.classes == ("C0", "C1") and found.notes == ()


@pytest.mark.parametrize("stray", ["stray.mp4", "extra/C9/x.mp4"])
def test_what_lies_beside_split_folders_is_not_used(tmp_path, stray):
    found = layout(tmp_path, [*TRAIN, stray, *TEST])
    assert found.splits == ["train"] * 24 + ["unused"] + ["held_out"] * 2
    assert found.classes == ("C0", "C1") and found.labels[-2:] == [0, 1]
    assert found.notes == (f"1 video outside of test, train not used: {stray}",)


def test_split_folders_inside_of_classes(tmp_path):
    names = [f"C{c}/{part}/{k}.mp4" for c in range(2) for part in ("train", "test") for k in range(15)]
    found = layout(tmp_path, names)
    assert found.splits == (["train"] * 15 + ["held_out"] * 15) * 2
    assert found.labels == [0] * 30 + [1] * 30 and found.classes == ("C0", "C1")
    assert layout(tmp_path, [f"train/{part}/{k}.mp4" for part in ("train", "test") for k in range(3)]).classes == ()
    # Some videos in no such folder: the folders may mean something else, so nothing is guessed and it is said.
    (note,) = layout(tmp_path, [*names, "C2/a.mp4"]).notes
    assert "the split is by chance, though there are folders test, train" in note


def test_a_lone_split_folder_is_no_class(tmp_path):
    found = layout(tmp_path, TRAIN)
    assert found.classes == ("C0", "C1") and found.labels == [0] * 12 + [1] * 12
    assert found.splits == split_by_name(TRAIN), "its videos are split as they were"
    assert layout(tmp_path, ["train/a.mp4", "train/b.mp4"]).classes == ()
    assert layout(tmp_path, ["train/a.mp4", "bus/b.mp4"]).classes == ("bus", "train"), "a class of vehicles"


def test_labels_of_listed_videos_are_the_folders_that_they_are_in(lists):
    root = lists(VIDEOS[:40], VIDEOS[40:]).parent  # the folder that holds UCF-101/ and ucfTrainTestlist/
    found = layout(root, [f"UCF-101/{name}" for name in VIDEOS])
    assert found.classes == ("C0", "C1") and found.labels == [0] * 30 + [1] * 30
    assert found.splits == ["train"] * 40 + ["held_out"] * 20


def test_all_missing_videos_are_known_though_few_are_shown(lists):
    gone = [f"C0/gone_{k}" for k in range(5)]
    videos = [f"C0/v_{k}.avi" for k in range(200)]
    found = layout(lists([*videos[:150], *gone], videos[150:]), videos)
    assert found.missing == tuple(gone) and "C0/gone_2, … (2 more)" in found.notes[1]


def test_many_classes_are_not_searched_one_by_one(tmp_path):
    called = set()
    names = [f"c{k:03}/v.avi" for k in range(300)]
    sys.setprofile(lambda frame, event, of: called.add(of.__name__) if event == "c_call" else None)
    try:
        found = layout(tmp_path, names)
    finally:
        sys.setprofile(None)
    assert found.labels == list(range(300)) and "index" not in called
