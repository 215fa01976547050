"""Batches: a global order, this host's rows of it, decoded here.

Element `step` of `batches` is global batch `step`. The order is decided before anything is decoded, so a host
reads its own rows only, and a run that resumes simply begins at its step: there is no iterator to save.
Offset, flip and crop come from (seed, position in the global order); with that the global batch is bit for
bit the same for any number of hosts and of decode workers.
"""

import contextlib
import dataclasses
import errno
import functools
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from jaxalign.data import columns, patience
from jaxalign.data.clips import Clip, Source, Window, load, part, windows
from jaxalign.data.faults import not_the_files
from jaxalign.data.patience import Patience, patiently
from jaxalign.data.video import UnreadableVideo

AHEAD = 2  # batches decoded ahead (of each worker): enough to hide a slow clip, little memory
GIVE_UP_AFTER = 16  # different files in a row that cannot be read: the disk is gone, not a clip


@dataclasses.dataclass(frozen=True)
class Batches:
    """Global batches by step: `batches[step]` at once, or `batches.iterate(step)`, which decodes ahead.

    A batch: video uint8 [b,t,h,w,3], label int32 [b], index int64 [b] (the window that was asked for),
    substituted bool [b] (that window could not be read; another stands in), item int64 [b] (the video that is
    seen), tokens int32 [b,n] if the source has them, and flow, visible, state likewise; b is this host's share.
    """

    source: Source
    windows: tuple[Window, ...]
    order: grain.MapDataset  # of (place in the order, window number), by global batches
    decode: Callable[..., dict[str, np.ndarray]]
    workers: int

    @property
    def dataset(self) -> grain.MapDataset:
        """This host's share of every batch, decoded; what the workers are sent."""
        return self.order.map(self.decode)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return _told(self.source, self.decode(self.order[step]))

    def iterate(self, step: int = 0) -> Generator[dict[str, np.ndarray], None, None]:
        """An endless iterator from global batch `step` on; call its close() to end the workers.

        With workers, the calling script needs the usual `if __name__ == "__main__":` (they are spawned
        processes).
        """
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        stop = None if self.workers else patience.new_stop()  # workers are killed, waiting or not
        dataset = self.order.map(functools.partial(self.decode, stop=stop)) if stop else self.dataset
        stream = dataset[step:].to_iter_dataset(ahead)
        if self.workers:
            if not flags.FLAGS.is_parsed():  # Grain asks absl for its flags; a notebook has parsed none
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=AHEAD)
            stream = stream.mp_prefetch(options, worker_init_fn=_begin_worker)
        iterator = iter(stream)
        iterator.start_prefetch()  # at once: the training step is being compiled meanwhile
        told = _until_closed(iterator, functools.partial(_told, self.source), stop)
        next(told)  # into its try: close() of a generator that has not begun does nothing
        return told

    def names(self, index: Int[np.ndarray, "b"] | Sequence[int]) -> list[str]:
        """The videos behind a batch's `index`."""
        return [self.source.items[self.windows[int(k)].item].name for k in index]

    def prompts(self, batch: dict[str, np.ndarray]) -> list[str]:
        """The captions of the videos that are seen in a batch; ValueError if the source has none."""
        if not self.source.captions:
            raise ValueError(f"data.source={self.source.name!r} has no captions")
        return [self.source.captions[int(k)] for k in batch["item"]]


def _told(source: Source, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with the tokens of its captions: put in here, so that no decode worker holds a copy of all of them."""
    if source.tokens is None:
        return batch
    return batch | {"tokens": source.tokens[batch["item"]].astype(np.int32)}


def _until_closed(
    iterator: grain.DatasetIterator, change: Callable, stop: threading.Event | None
) -> Generator[dict[str, np.ndarray], None, None]:
    """Nothing, then the iterator's elements, changed; close() ends its threads, their waits and workers.

    Raises OSError where a worker was killed by what its machine lacks.
    """
    try:
        yield {}
        yield from map(change, iterator)
    except (RuntimeError, OSError) as error:
        if why := _what_workers_lacked(error):
            raise OSError(why) from error
        raise
    finally:
        if stop is not None:
            patience.end(stop)  # a thread that sleeps would keep the process
        iterator.close()


def _what_workers_lacked(error: RuntimeError | OSError) -> str:
    """What the machine lacked where Grain found a worker dead or could start none, and what helps; else empty."""
    ended_by = re.search(r"exit code -(\d+)", str(error))
    number = int(ended_by[1]) if ended_by else 0
    fewer = "or take fewer data.workers (0 needs none)"
    # A tmpfs that is full ends who writes into it by SIGBUS.
    if number == signal.SIGBUS or getattr(error, "errno", None) == errno.ENOSPC:
        size = f" ({shutil.disk_usage('/dev/shm').total / 1e6:.0f} MB)" if os.path.isdir("/dev/shm") else ""
        return (
            f"data.workers: no room left in /dev/shm{size}, by which the workers hand over what they decode; each may "
            f"hold {2 * AHEAD + 1} batches of this host there. Give a container more (docker run --shm-size=16g; "
            f"Kubernetes: an emptyDir with medium: Memory at /dev/shm), {fewer}"
        )
    if number == signal.SIGKILL:
        return f"data.workers: one of them was killed, as Linux does when memory runs out; give it more, {fewer}"
    return ""


def _begin_worker(worker: int, workers: int) -> None:
    # These come to all of a group of processes (Ctrl-C, a scheduler's notice): the main process answers them, and needs
    # its workers until the step is done. It ends them without signals that can be ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A trainer that is killed outright cannot close its workers: without this they would stay for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def batches(
    source: Source,
    *,
    split: str = "train",
    seed: int,
    batch_size: int,
    num_frames: int,
    height: int,
    width: int,
    stride: int = 1,
    short: str = "skip",
    hflip: bool = False,
    random_crop: bool = False,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless shuffled batches of a source; batch_size is global, a host gets rows p·B/P … (p+1)·B/P.

    Every epoch has its own order. Raises ValueError if the source has no window long enough, or B is no
    multiple of P.
    """
    clip = Clip(num_frames, height, width, stride, hflip, random_crop, short)
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes; "
            f"write a multiple of {process_count}"
        )
    found = some_windows(source, split, clip)
    share = batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share)
    dataset = grain.MapDataset.range(len(found)).repeat()
    dataset = dataset.map_with_index(functools.partial(_shuffled, seed, len(found)))
    dataset = dataset.batch(batch_size, drop_remainder=True)
    read = (columns.to_send(source, clip), columns.Windows.of(found)) if workers else (source, found)
    return Batches(source, found, dataset, functools.partial(_decode, *read, clip, seed, rows), workers)


def _shuffled(seed: int, count: int, place: int, _) -> np.ndarray:
    """(place, window number) at one place of the endless order.

    Not MapDataset.shuffle: its lazy permutation takes 12 ms an index for three windows (measured; 9 µs for
    4096), and epoch e of seed s is epoch 0 of seed s + e, so neighbouring seeds would share their orders.
    """
    epoch, k = divmod(place, count)
    return np.array([place, _permutation(seed, epoch, count)[k]], np.int64)


@functools.lru_cache(maxsize=8)  # a batch sees one or two epochs; a million windows are 34 ms and 8 MB
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def _decode(source, found, clip: Clip, seed: int, rows: slice, batch: np.ndarray, *, stop=None) -> dict:
    """This host's rows of a global batch of (place in the order, window number); `stop` ends what is waited."""
    left = Patience(stop)
    return _stack([_row(source, found, clip, seed, int(place), int(number), left) for place, number in batch[rows]])


def held_out(
    source: Source, n: int, *, num_frames: int, height: int, width: int, stride: int = 1, short: str = "skip"
) -> dict[str, np.ndarray]:
    """A batch of n held-out clips, always the same ones, spread evenly over the held-out windows.

    Neither flipped nor randomly cropped. Raises ValueError if nothing held out is long enough.
    """
    clip = Clip(num_frames, height, width, stride, short=short)
    found = some_windows(source, "held_out", clip)
    left = Patience()
    return _told(source, _stack([held_out_clip(source, found, clip, k, n, left) for k in range(n)]))


def held_out_clip(source: Source, found: Sequence[Window], clip: Clip, k: int, n: int, left: Patience) -> dict:
    """Number k of `held_out`'s n clips; `found` are the held-out windows."""
    if n >= len(found):  # several clips a window: early, middle, late
        number, turn = k % len(found), k // len(found)
        turns = (n - number - 1) // len(found) + 1
    else:
        # Anywhere in the k-th of n parts: equal steps would take one kind alone where kinds alternate (synthetic).
        first, last = (edge * len(found) // n for edge in (k, k + 1))
        number, turn, turns = int(np.random.default_rng((2, k)).integers(first, last)), 0, 1
    return _row(source, found, clip, 0, k, number, left, position=(turn + 0.5) / turns)


def some_windows(source: Source, split: str, clip: Clip) -> tuple[Window, ...]:
    """`windows`, or ValueError that says why there is none and what helps."""
    if found := windows(source, split, clip):
        return found
    raise ValueError(why_none(source, split, clip))


def why_none(source: Source, split: str, clip: Clip) -> str:
    """Why no video of a split is long enough for a clip, and what helps; one line."""
    where, count = f"data.source={source.name!r}", len(source.items)
    mine = [item for item in source.items if item.split in (split, "both")]
    word = "train" if split == "train" else "test"
    if not mine:
        return (
            f"{where}: none of its {count} videos is for split {split!r}; put some into a folder named {word}, or into "
            f"a shard that has the word {word} in its name"
        )
    longest = max((item.frames for item in source.items if item.frames is not None), default=None)
    if longest is None or longest < clip.fewest:  # None: lengths show when videos are read
        told = "" if longest is None else f" (the longest video has {longest})"
        return (
            f"{where}: nothing in its {count} videos for split {split!r} has num_frames={clip.num_frames} frames{told}"
            "; lower data.num_frames"
        )
    most = max(stop - start for start, stop in (part(item, split) for item in mine))
    return (
        f"{where}: of its {count} videos {len(mine)} are for split {split!r} and have at most {most} frames there, not "
        f"num_frames={clip.num_frames}; lower data.num_frames, or put longer ones into a folder named {word}"
    )


def _row(source, found, clip: Clip, seed: int, place: int, number: int, left: Patience, position=None) -> dict:
    """The clip at one place of the global order, or one out of the next file that can be read; raises as `in_turn`."""

    def read(window):
        return load(source, window, clip, np.random.default_rng((seed, 1, place)), position)

    candidates = (found[(number + other) % len(found)] for other in range(len(found)))
    row, item, substituted = in_turn(source, candidates, read, left)
    del row["name"]
    return {**row, "index": number, "substituted": substituted, "item": item}


def in_turn(
    source: Source, candidates: Iterable[Window], read: Callable[[Window], dict], left: Patience
) -> tuple[dict, int, bool]:
    """(read(window), its item, whether it is not the first) of the first window that can be read.

    A disk that is away is waited for. Raises ValueError where file after file cannot be read, OSError where that is
    the disk's or the machine's fault; one line.
    """
    failed: dict[int, UnreadableVideo] = {}
    tried, before = [], left.left
    for window in candidates:
        if window.item in failed:
            continue
        tried.append(window)
        try:
            # One file is waited for: if the next can be read, it was that one.
            row = patiently(functools.partial(read, window), left) if left.left == before else read(window)
        except UnreadableVideo as error:
            failed[window.item] = error
            if len(failed) >= GIVE_UP_AFTER:
                break
            continue
        left.disk_works()
        return row, window.item, bool(failed)
    told = f"data.source={source.name!r}: {len(failed)} videos in a row cannot be read"
    fault = next(filter(not_the_files, failed.values()), None)
    if fault is None:
        raise ValueError(f"{told}; the first is {next(iter(failed.values()))}")
    # It worked a while ago, so nothing was waited for: now it is away.
    for _ in left.waits() if left.left == before else ():
        for window in tried:
            with contextlib.suppress(UnreadableVideo):
                row = read(window)
                left.in_vain = False
                return row, window.item, window is not tried[0]
    waited = f", not within {before - left.left:g} s" if left.left < before and not left.stopped else ""
    raise OSError(f"{told}{waited}; the disk or this machine fails: {fault}")


_DTYPES = {"label": np.int32, "index": np.int64, "substituted": np.bool_, "item": np.int64}


def _stack(rows: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([np.asarray(row[name], _DTYPES.get(name)) for row in rows]) for name in rows[0]}
