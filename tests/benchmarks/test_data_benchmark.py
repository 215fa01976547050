"""The data benchmark's two sides get the same clips: those that the pipeline draws, frame for frame."""

import numpy as np
import pytest

from jaxalign.benchmarks import data as benchmark
from jaxalign.data import pipeline, sources, video

CLIPS = dict(seed=0, batch_size=2, num_frames=4, height=24, width=32, stride=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos") / "long"
    benchmark.make_long(folder, files=2, frames=300, height=48, width=64, rate=25)
    source = sources.folder(str(folder))
    paths = [str(folder / item.name) for item in source.items]
    return benchmark.keeping_nothing(source), paths


def test_the_plan_is_what_the_pipeline_decodes(files):
    source, paths = files
    assert [int(video.index_frames(path).key.sum()) for path in paths] == [2, 2]  # one in 250
    readings = benchmark.plan(source, paths, 6, **CLIPS)
    batches = pipeline.batches(source, **CLIPS)
    decoded = np.concatenate([batches[step]["video"] for step in range(3)])
    planned = np.stack([video.read_span(*reading[:4], (24, 32))[0] for reading in readings])
    assert np.array_equal(decoded, planned) and len({reading.start for reading in readings}) > 3


@pytest.mark.parametrize("keep", [False, True])
def test_decord_reads_the_same_frames(files, keep, monkeypatch):
    pytest.importorskip("decord")
    source, paths = files
    readings = benchmark.plan(source, paths, 4, **CLIPS)
    for reading in readings:
        benchmark.check_same(reading, (24, 32))
    clips = benchmark.DecordClips(readings, (24, 32), keep)
    assert clips[1].shape == (4, 24, 32, 3) and np.array_equal(clips[1], clips[5])
    other = clips[1][::-1].copy()
    monkeypatch.setattr(benchmark.DecordClips, "__getitem__", lambda self, k: other)
    with pytest.raises(RuntimeError, match="grey levels apart"):
        benchmark.check_same(readings[1], (24, 32))


def test_measure_counts_batches_after_the_warm_up():
    seen = []
    rate = benchmark.measure(lambda: (seen.append(k) for k in range(10**9)), warm_up=5, seconds=0.01)
    assert len(seen) > 6 and 0 < rate < len(seen) / 0.01
