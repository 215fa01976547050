"""What decode workers are given: the same clips out of a fraction of the bytes."""

import pickle

import numpy as np
import pytest
from PIL import Image

from jaxalign.data.clips import Clip, Item, Source, Window
from jaxalign.data.columns import Texts, Windows, to_send
from jaxalign.data.pipeline import batches
from jaxalign.data.sources import FileReader, folder, open_source
from jaxalign.data.video import VideoInfo

SIZE = {"num_frames": 4, "height": 24, "width": 24}


@pytest.mark.parametrize("texts", [(), ("",), ("a/b.mp4",), ("/v/é.mp4", "/v/", "/v/\udcff.mp4", "/v/深.mp4")])
def test_texts_are_what_they_were(texts):
    kept = Texts.of(texts)
    assert tuple(pickle.loads(pickle.dumps(kept))) == texts and len(kept) == len(texts)
    if texts:
        assert kept[-1] == texts[-1]
    with pytest.raises(IndexError):
        kept[len(texts)]


def test_windows_are_what_they_were():
    windows = (Window(0, 3, 9), Window(7, 0, None))
    assert tuple(Windows.of(windows)) == windows and tuple(Windows.of(())) == ()


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("megabytes", [0, 256])
def test_workers_read_the_same_clips(tmp_path, numbered, frames, megabytes):
    for k, name in enumerate(("A/a", "B/b", "B/c")):
        if frames:
            (tmp_path / "v" / name).mkdir(parents=True)
            for number in range(8):
                Image.fromarray(numbered.frame(number + 20 * k)).save(tmp_path / "v" / name / f"{number}.png")
        else:
            numbered(tmp_path / "v" / f"{name}.mp4", frames=30, first=40 * k)
    source = folder(str(tmp_path / "v"))
    if not frames:
        source.read.cache.megabytes = megabytes
    settings = dict(seed=0, batch_size=6, hflip=True, random_crop=True, **SIZE)
    whole, sent = (
        batches(source, **settings),
        pickle.loads(pickle.dumps(batches(source, workers=1, **settings).dataset)),
    )
    for step in range(2):
        for name, value in whole[step].items():
            np.testing.assert_array_equal(sent[step][name], value)
            assert sent[step][name].dtype == value.dtype


def test_a_source_without_lengths_is_sent_too():
    source = open_source("synthetic")
    settings = dict(seed=0, batch_size=2, **SIZE)
    sent = pickle.loads(pickle.dumps(batches(source, workers=1, **settings).dataset))
    np.testing.assert_array_equal(sent[0]["video"], batches(source, **settings)[0]["video"])


def test_what_is_sent_is_small():
    names = [f"{k:06}.mp4" for k in range(5000)]
    infos = tuple(VideoInfo(90, 25.0, 640 + k, 480) for k in range(5000))
    items = tuple(Item(name, 90, 25.0, 0, "train") for name in names)
    read = FileReader(tuple(f"/data/videos/{name}" for name in names), infos)
    source = Source("many", items, read=read, captions=("a caption",) * 5000, skipped=(("x", "damaged"),) * 5000)
    data = batches(source, workers=1, seed=0, batch_size=2, **SIZE)
    assert len(pickle.dumps(data.dataset)) < 70 * 5000
    sent = to_send(source, Clip(4, 24, 24)).read
    assert not sent.cache.fits(sent.infos, (24, 24)) and read.cache.fits(infos, (1, 1)) and sent.infos is None
