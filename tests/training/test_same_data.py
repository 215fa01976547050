"""What a checkpoint knows of its data, and what is said when that is another."""

import dataclasses

import pytest

from jaxalign.data.pipeline import batches
from jaxalign.data.sources import open_source
from jaxalign.training import same_data


def facts(*, classes=("jump", "run"), more=0, renamed=False):
    source = open_source("synthetic")
    items = (*source.items[:5], *source.items[:more])
    if renamed:
        items = (dataclasses.replace(items[0], name="another"), *items[1:])
    source = dataclasses.replace(source, items=items, classes=classes)
    return same_data.facts(batches(source, seed=0, batch_size=1, num_frames=2, height=8, width=8), 0)


def changes(stored, now, by_label=True):
    return same_data.changes(stored, now, by_label=by_label, where="runs/x")


def test_the_same_data_and_checkpoints_of_before():
    assert changes(facts(), facts()) == [] and changes(None, facts()) == []


def test_other_files_are_said():
    (line,) = changes(facts(), facts(more=2))
    assert line.startswith("warning: the data is not what it was") and line.endswith(": 5 -> 7 videos, 5 -> 7 windows")
    (line,) = changes(facts(), facts(renamed=True))
    assert line.endswith("videos of other names, lengths, labels or splits")
    (line,) = changes(facts() | {"captions": "a"}, facts() | {"captions": "b"})
    assert line.endswith("other captions")


def test_other_classes_are_refused_where_labels_are_told():
    with pytest.raises(ValueError, match=r"runs/x was trained on 2 classes and data.source has 3 now \(new: walk\)"):
        changes(facts(), facts(classes=("jump", "run", "walk")))
    with pytest.raises(ValueError, match="gone: jump; new: leap"):
        changes(facts(), facts(classes=("leap", "run")))
    (line,) = changes(facts(), facts(classes=("leap", "run")), by_label=False)
    assert "2 -> 2 classes (gone: jump; new: leap)" in line
