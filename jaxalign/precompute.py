"""Compute once what is slow and frozen, and train from it.

python -m jaxalign.precompute --config configs/tsa.py:SCALE --out FOLDER [--what=…] [--config.FIELD=…]
python -m jaxalign.main --config configs/tsa.py:SCALE --config.data.source=FOLDER

    latents   moments of the codec's posterior, so that latents are drawn anew each time; of pixels: the videos
    text      embeddings of the captions, each different one once, of the empty prompt and of config.sample.prompts
    teachers  the tokens of every teacher that the config aligns with, and the motion saliency if M-TSA asks it
    flow      targets of the flow network of config.motion.flow (or --flow_network, --flow_weights; raft_large where
              neither names one; teachers/flow_target.py)
    video     the clips themselves: teachers that are not stored are then asked while training

The folder holds one clip a window (its centre; --variants takes more, evenly spread) and, with data.hflip, its mirror
image. The same command goes on where it was stopped; another --what adds to the folder. Several processes or machines
deal out the shards by number: --num_processes=N --process_id=K on each, or --shard_range=A:B; Slurm, Open MPI and TPU
slices on GKE are detected, TPU VMs elsewhere with --detect_cluster. Videos that cannot be read are skipped, counted and
named; so are those in a broken place of a disk (EIO) that gives others. Where the machine or the disk is to blame (too
many open files, no memory, a disk that fails), or 16 in a row cannot be read, nor the last one that could, the command
stops and keeps nothing of them.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from jaxalign.convert import Progress
from jaxalign.data import pipeline, precomputed
from jaxalign.data.clips import SPLITS, Clip, Source, Window
from jaxalign.data.containers import UnreadableVideo
from jaxalign.data.precomputed import Clips, Folder, Series
from jaxalign.training import clip_reading, contents, embedded, processes, prompts, setup
from jaxalign.training import config as config_lib
from jaxalign.training.data_settings import clip_settings
from jaxalign.training.makers import DTYPES, WHAT, Options, about, announce, claim, makers, networks, stored
from jaxalign.training.mesh import batch_sharding, make_mesh
from jaxalign.training.report import printable

MOST_THREADS = 32  # where nobody says how many: each holds files and a clip, and a disk feeds few more
WAITING_BYTES = 4 << 30  # of clips that are being decoded, or are and wait
LOOK_EVERY = 2.0  # seconds, for what other processes make


def _say(line: str) -> None:
    print(printable(line, getattr(sys.stdout, "encoding", None)), flush=True)


def precompute(
    config: ml_collections.ConfigDict,
    out: str | Path,
    options: Options | None = None,
    say: Callable[[str], None] = _say,
) -> dict[str, int]:
    """Make what is missing in the folder `out` of a resolved config; returns {'clips', 'bad', 'missing'}.

    bad: clips that could not be read; missing: shards that others have to make. Raises ValueError or OSError, one
    line, for a folder of other clips or contents, settings without sense, weights that are not there, a full disk,
    videos that have all become unreadable.
    """
    options = options or Options()
    source = prompts.open_told(config)
    if source.recall is not None:
        raise ValueError(f"config.data.source = {config.data.source!r} is precomputed already: name the videos")
    mesh = make_mesh(data=1, fsdp=-1, devices=jax.local_devices())
    clip, found = _windows(config, source, options)
    text = "text" in options.what and setup.is_told_by_text(config)
    # A mistake up to here leaves no folder behind that the next try would meet.
    run = networks(config, source, options, mesh, text=text)
    folder = precomputed.claim(
        Path(out).expanduser(),
        Clips(
            fields=contents.of_clips(config, source),
            windows={"train": len(found["train"]), "held_out": options.held_out},
            variants=options.variants,
            # What a source renders is never mirrored (data/clips.py, load).
            flips=2 if config.data.hflip and source.render is None else 1,
            classes=source.classes,
            about={"source": str(config.data.source), **about()},
        ),
    )
    listed = embedded.captions(source, found)
    made = makers(config, run, options, folder)
    series = claim(folder, made, options)
    if text:
        series[embedded.NAME] = embedded.claim(folder, run, listed, config, options)
    whole = {path for path in _files(folder, series) if precomputed.is_whole(path)}
    announce(folder, series, whole, options, say)
    if text:
        embedded.make(folder, series[embedded.NAME], run, source, listed, whole, config, options, mesh)
    decode = functools.partial(clip_reading.decode, source, clip, found, options)
    _make_shards(folder, made, series, whole, decode, listed, options, mesh, say)
    return _report(folder, series, options, say)


def _windows(config, source: Source, options: Options) -> tuple[Clip, dict[str, tuple[Window, ...]]]:
    """The clip and the windows of both splits, as training sees them."""
    clip = Clip(**clip_settings(config))
    if options.variants > 1 and (source.render is not None or clip.stride == 0):
        raise ValueError(f"--variants={options.variants}: a window of this source has one clip only; leave it out")
    found = {split: pipeline.some_windows(source, split, clip) for split in SPLITS}
    count = len(found["train"])
    if 0 < options.clips < count:
        found["train"] = tuple(found["train"][k * count // options.clips] for k in range(options.clips))
    return clip, found


# ---- clips


def _ahead(tasks: Iterable[Callable], threads: int, ahead: int, stop: threading.Event) -> Iterator[Any]:
    """The results of tasks in their order, some of them under way in threads; close() lets the rest be, and waits."""
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stop.set()  # what a thread waits for a disk
        pool.shutdown(cancel_futures=True)


def _files(folder: Folder, series: Mapping[str, Series]) -> dict[Path, str]:
    """{path: name of its series} of all shards, there or not."""
    return {folder.path / name: key for key, s in series.items() for split in s.counts for name in s.shards(split)}


def _make_shards(folder: Folder, makers, series, whole, decode, listed, options: Options, mesh, say) -> None:
    """Every shard of this process's that is not whole yet."""
    work = []
    for size in dict.fromkeys(series[m.name].per_shard for m in makers):
        group = [m for m in makers if series[m.name].per_shard == size]
        numbered = [(split, k) for split in SPLITS for k in range(-(-folder.clips.windows[split] // size))]
        for number, (split, k) in enumerate(numbered):
            paths = {m.name: folder.path / series[m.name].shards(split)[k] for m in group if split in m.splits}
            todo = {name: path for name, path in paths.items() if path not in whole}
            if todo and options.mine(number):
                units = range(k * size, min((k + 1) * size, folder.clips.windows[split]))
                work.append(([m for m in group if m.name in todo], todo, split, units))
    clips = sum(len(units) for *_, units in work)
    if not clips:
        return
    compiled = {m.name: jax.jit(stored(m, DTYPES[options.dtype])) for m in makers if m.compute is not None}
    stop = threading.Event()
    decode = functools.partial(decode, folder.clips.flips, stop=stop)
    tasks = [functools.partial(decode, split, k) for *_, split, units in work for k in units]
    threads, ahead = _room(folder.clips, options, mesh.size)
    stream = _ahead(tasks, threads, ahead, stop)
    failed: dict[int, UnreadableVideo] = {}  # different videos since the last that could be read
    doubtful: list[Path] = []  # whole shards that lack some of these
    with contextlib.closing(stream), Progress("clips", clips) as progress:
        watched = _watched(tasks, stream, failed, doubtful)
        for chosen, paths, split, units in work:
            _make_shard(chosen, paths, split, units, watched, compiled, listed, options, mesh, progress, say)
            if failed:
                doubtful += paths.values()


def _room(clips: Clips, options: Options, devices: int) -> tuple[int, int]:
    """(threads that decode, clips that they may be ahead): few enough for the memory, enough for cores and devices."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = options.threads or min(usable, MOST_THREADS)
    frames, height, width = (clips.fields[f"data.{name}"] for name in ("num_frames", "height", "width"))
    held = frames * height * width * 3 * clips.versions("train")
    ahead = max(1, min(threads + options.at_once * devices, WAITING_BYTES // held))
    return min(threads, ahead + 1), ahead


def _watched(
    tasks: Sequence[Callable], stream: Iterable, failed: dict[int, UnreadableVideo], doubtful: list[Path]
) -> Iterator[Any]:
    """The results of tasks, in their order, while the disk is there.

    Where as many videos in a row cannot be read as make training give up, the last one that could be is read again
    (where none was, others are tried): if it can, these are a folder of bad files; if not, OSError, and what was made
    meanwhile and lacks them goes, or it would lack them for ever.
    """
    known = None
    try:
        for task, (item, *read) in zip(tasks, stream, strict=True):
            if not isinstance(read[0], UnreadableVideo):
                known = task
                failed.clear()
                doubtful.clear()
            else:
                failed[item] = read[0]
                others = (known,) if known else (tasks[0], tasks[len(tasks) // 2], tasks[-1])
                if len(failed) >= pipeline.GIVE_UP_AFTER and any(_reads(other) for other in others):
                    failed.clear()
                    doubtful.clear()
                elif len(failed) >= pipeline.GIVE_UP_AFTER:
                    first = next(iter(failed.values()))
                    raise OSError(
                        f"{len(failed)} videos in a row cannot be read, the first is {first}; is their disk there? "
                        f"Once mended, {precomputed.AGAIN}: it goes on"
                    )
            yield item, *read
    except OSError:  # or a disk that fails now
        for path in doubtful:
            path.unlink(missing_ok=True)
            Path(f"{path}.json").unlink(missing_ok=True)
        raise


def _reads(task: Callable) -> bool:
    """Whether a clip can be read now; one of the held-out ones has substitutes, and fails when those do."""
    try:
        return not isinstance(task()[1], UnreadableVideo)
    except (OSError, ValueError):
        return False


def _make_shard(chosen, paths, split, units, stream, compiled, listed, options, mesh, progress, say) -> None:
    """The shards of one number of all chosen series at once."""
    at_once, rows, pending = options.at_once * mesh.size, [], []
    named, bad = [], []
    names, numbers = listed
    with contextlib.ExitStack() as stack:
        shards = {name: stack.enter_context(precomputed.new_shard(path)) for name, path in paths.items()}

        def flush(count: int) -> None:
            """Start the next batch, write the one before: devices and disk work side by side."""
            if count:
                batch = np.stack([rows[min(k, count - 1)] for k in range(at_once)])  # one shape: one compilation
                del rows[:count]
                placed = jax.device_put(batch, batch_sharding(mesh)) if compiled else None
                made = {m.name: compiled[m.name](m.network, placed) if m.compute else batch for m in chosen}
                pending.append((made, count))
            while len(pending) > (1 if count else 0):
                made, ready = pending.pop(0)
                for name, array in jax.device_get(made).items():
                    for row in array[:ready]:
                        shards[name][0](np.ascontiguousarray(row).tobytes())

        for _ in units:
            item, *read = next(stream)
            if isinstance(read[0], UnreadableVideo):
                named.append(None)
                bad.append([names[item], read[0].why])
                say(f"skipped: {read[0]}")
            else:
                label, versions = read
                named.append([names[item], label, numbers[item]])
                rows += list(versions)
            while len(rows) >= at_once:
                flush(at_once)
            progress(1)
        flush(len(rows))
        flush(0)
        for _, listing in shards.values():
            listing.update(units=named, bad=bad)


# ---- the end, and the command line


def _report(folder: Folder, series: Mapping[str, Series], options: Options, say) -> dict[str, int]:
    """What the folder holds of these series now; of several processes that know of each other, when all are done."""
    files = _files(folder, series)
    missing = [path for path in files if not precomputed.is_whole(path)]
    # Leaving early would end the others: jax.distributed is shut down together. Of given numbers nobody knows whose the
    # others are.
    while missing and jax.process_count() > 1 and options.shard_range is None:
        time.sleep(LOOK_EVERY)
        missing = list(itertools.dropwhile(precomputed.is_whole, missing))
    bad, absent = Counter(), set(missing)
    for path, name in files.items():
        if name != embedded.NAME and path not in absent:
            bad[name] += len(json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))["bad"])
    worst = max(bad.values(), default=0)
    clips = sum(folder.clips.windows[split] * folder.clips.versions(split) for split in SPLITS)
    if worst:
        say(f"{worst} windows could not be read and are skipped")
    if missing:
        whose = "of other --shard_range" if options.shard_range else "other processes'"
        say(f"{len(files) - len(missing)} of {len(files)} shards are there; the others are {whose}")
    else:
        named = ", ".join(series)
        say(f"complete: {len(files)} shards ({named}); train with --config.data.source={folder.path}")
    return {"clips": clips, "bad": worst, "missing": len(missing)}


def share(values: flags.FlagValues) -> tuple[int, int]:
    """(k, n) of this process: by flags, else told by the launcher that started several."""
    if values.coordinator is None and values.num_processes is not None:
        if values.process_id is None:
            raise ValueError(f"--num_processes={values.num_processes} needs --process_id")
        return values.process_id, values.num_processes
    found = values.coordinator, values.num_processes, values.process_id
    if processes.join(*found, detect=values.detect_cluster):
        return jax.process_index(), jax.process_count()
    return 0, 1


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command line's flags."""
    where = {"flag_values": values}
    config_flags.DEFINE_config_file(
        "config", None, "Config file, with a scale after a colon.", lock_config=True, **where
    )
    flags.DEFINE_string("out", None, "The folder.", **where)
    flags.DEFINE_list("what", list(Options.what), f"Some of {', '.join(WHAT)}.", **where)
    flags.DEFINE_integer("variants", 1, "Clips a window, evenly spread over it.", **where)
    flags.DEFINE_integer("clips", 0, "Only so many windows, evenly spread over all; 0: all.", **where)
    flags.DEFINE_integer("held_out", Options.held_out, "Held-out clips.", **where)
    flags.DEFINE_string("dtype", "keep", "Of what is floating: keep (as it is computed), bf16, fp16 or fp32.", **where)
    flags.DEFINE_float("shard_mb", Options.shard_mb, "Size of a file, at most, unless one clip is larger.", **where)
    flags.DEFINE_integer("at_once", 1, "Clips on each device at a time.", **where)
    flags.DEFINE_integer("threads", 0, f"That decode; 0: as many as usable cores, at most {MOST_THREADS}.", **where)
    flags.DEFINE_string("shard_range", None, "A:B, only the shards of these numbers.", **where)
    flags.DEFINE_string(
        "flow_network", "", "Of --what=flow: a RAFT or SEA-RAFT; default: config.motion.flow's.", **where
    )
    flags.DEFINE_string("flow_weights", "", "Its file, or a folder that jaxalign.convert made.", **where)
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0; only where processes have to know of each other.", **where
    )
    flags.DEFINE_integer("num_processes", None, "How many processes share the work.", **where)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", **where)
    flags.DEFINE_bool("detect_cluster", False, "Ask JAX who the other processes are (TPU VMs outside of GKE).", **where)


def main(argv: list[str]) -> int:
    values = flags.FLAGS
    if len(argv) > 1:
        raise ValueError(f"{argv[1]!r}: not understood; options start with --, e.g. --config configs/tsa.py")
    for name in ("config", "out"):
        if values[name].value is None:
            raise ValueError(f"--{name} is missing; write for example --config configs/tsa.py --out FOLDER")
    limits = values.shard_range.split(":") if values.shard_range else None
    if limits is not None and (len(limits) != 2 or not all(limit.isdigit() for limit in limits)):
        raise ValueError(f"--shard_range={values.shard_range}: write A:B for the shards A … B-1")
    fields = {field.name for field in dataclasses.fields(Options)} - {"share", "shard_range", "what"}
    options = Options(
        what=tuple(dict.fromkeys(values.what)),
        share=share(values),
        shard_range=limits and (int(limits[0]), int(limits[1])),
        **{name: values[name].value for name in fields},
    )
    config = config_lib.resolve(values.config)
    with processes.leaving_at_once():
        precompute(config, values.out, options)
    return 0


if __name__ == "__main__":
    define_flags()
    config_lib.run_verb(main)
