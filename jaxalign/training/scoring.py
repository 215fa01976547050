"""The words fvd, fid, inception_score and clip of `python -m jaxalign.evaluate`: from a run, or a folder of videos."""

import contextlib
import fcntl
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxalign.data import captions, sources
from jaxalign.data.clips import Clip, Source
from jaxalign.data.frame_folders import FRAME_RATE
from jaxalign.interop import sealed
from jaxalign.metrics import features, protocol
from jaxalign.metrics.networks import clip as clip_network
from jaxalign.metrics.protocol import Clips
from jaxalign.training import generated, trained

NETWORKS = protocol.NETWORKS  # what each score asks when nobody says
AGAINST_REAL = ("fvd", "fid")
RESULTS = ("value", "±", "replaced", "replaced real")  # of a row; all else says what was asked
FLAGS = {"num_frames": "--frames", "split": "--lists", "frame_rate": "--frame_rate"}  # in place of data.NAME


def score(
    word: str,
    *,
    workdir: str | Path | None = None,
    videos: str = "",
    real: str = "",
    network: str = "",
    weights: str | Path | None = None,
    count: int = protocol.PAPER["n"],
    seed: int = 0,
    split: str = "held_out",
    steps: int = protocol.PAPER["steps"],
    sampler: str = "",
    guidance_scale: float = 1.0,
    student: str = "ema",
    frames: int = 16,
    size: tuple[int, int] = (256, 256),
    stride: int = 3,
    videos_stride: int = 1,
    lists: int | None = None,
    frame_rate: float | None = None,
    cache: str | Path | None = None,
    tokenizer: str | Path | None = None,
    at_once: int = features.AT_ONCE,
    out: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The rows of one score, kept in evaluate_WORD_NETWORK.json of the workdir or `out`; see `keep`.

    Give the `workdir` of a run (or the folder of one of its checkpoints: that step is scored, not the newest), whose
    clips are as its data's, or a folder of `videos` with the source `real` to compare it with; `frames`, `size` and
    `stride` are then those of the clips (`videos_stride`: of the folder's own), `lists` the number of UCF-101's lists
    in `real` (None: 1) and `frame_rate` that of folders of frames (None: 25); a run says these itself. `network` with
    its `weights` as `features.open_network`. Raises ValueError or FileNotFoundError, one line, for what is missing or
    does not fit, before anything is generated.
    """
    if word not in NETWORKS:
        raise ValueError(f"{word!r} is no score; write one of {', '.join(NETWORKS)}")
    if (workdir is None) == (not videos):
        raise ValueError("give --workdir, the folder of a run, or --videos, a folder of generated videos")
    if videos and word in AGAINST_REAL and not real:
        raise ValueError(f"--real is missing: {word} compares --videos with the videos of a source (folder, demo, ...)")
    if workdir is not None and (lists, frame_rate) != (None, None):
        raise ValueError("--lists and --frame_rate are for --videos: a run's own are data.split and data.frame_rate")
    name = network or NETWORKS[word]
    kind = dict(per_frame=word in ("fid", "clip") or _each_frame(word, name), logits=word == "inception_score")
    asked = features.open_network(name, weights, **kind)  # first: the most likely to be missing
    if workdir is not None:
        options = dict(steps=steps, sampler=sampler, guidance_scale=guidance_scale, weights=student)
        options |= dict(count=count, real=real, split=split, seed=seed, at_once=at_once, say=say)
        with _said_as("--real") if real else contextlib.nullcontext():
            clips, of_real = generated.of_run(workdir, **options)
        folder, beside = trained.workdir_of(workdir), {"split": split}
    else:
        shape = dict(num_frames=frames, height=size[0], width=size[1])
        rate = dict(frame_rate=FRAME_RATE if frame_rate is None else frame_rate)
        with _said_as("--videos", **FLAGS):
            opened = sources.open_source(videos, **rate)
            opened = _captioned(opened, videos) if word == "clip" and tokenizer else opened
            clips = protocol.of_videos(opened, Clip(**shape, stride=videos_stride), count=count, seed=seed)
        of_real, folder = None, Path(out or "runs/scores")
        beside = {"split": split} if word in AGAINST_REAL else {}
        beside |= {"lists": lists, "frame rate": frame_rate}
        beside |= {"videos stride": videos_stride} if videos_stride > 1 else {}
        if word in AGAINST_REAL:
            clip = Clip(**shape, stride=stride)
            with _said_as("--real", **FLAGS):
                drawn = dict(split=split, count=count, seed=seed, at_once=at_once)
                opened = sources.open_source(real, split=1 if lists is None else lists, **rate)
                of_real = protocol.of_source(opened, clip, **drawn)
    of_real = of_real if word in AGAINST_REAL else None
    _check(word, clips, of_real, asked, at_once=at_once)
    tokenize, notes = _words(clips, name, tokenizer, videos) if word == "clip" else (None, ())
    for note in (*clips.notes, *(of_real.notes if of_real is not None else ()), *notes):
        say(f"note: {note}")
    rows = _rows(word, clips, of_real, asked, cache=cache, tokenize=tokenize, at_once=at_once, say=say)
    rows = [row | {k: v for k, v in beside.items() if v is not None} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    keep(folder / f"evaluate_{word}_{name}.json", rows, say=say)
    return rows


def keep(path: Path, rows: list[dict[str, Any]], *, say: Callable[[str], None] = print) -> None:
    """Puts rows into the JSON list at `path`, in the place of those that were asked the same; the others stay."""
    asked = [_asked(row) for row in rows]
    with _one_at_a_time(path):
        others = [row for row in _rows_in(path, say) if _asked(row) not in asked]
        sealed.write_atomic(path, json.dumps(others + rows, indent=2, ensure_ascii=False) + "\n")
    say(f"kept in {path}" + (f", beside {len(others)} other rows" if others else ""))


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Within it no other process of this machine changes `path`; a disk without locks does without."""
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in RESULTS}


def _rows_in(path: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows that are kept; a file that holds none is put aside, for it may be somebody's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        found = None
    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        return found
    aside = path.with_name(f"{path.name}.old")
    path.replace(aside)
    say(f"warning: {path} holds no rows of scores; it is now {aside.name}")
    return []


def _rows(
    word: str, clips: Clips, real: Clips | None, network: features.Network, *, cache, tokenize, at_once: int, say
) -> list[dict[str, Any]]:
    if word in AGAINST_REAL:
        cache = None if cache is None else Path(cache)
        options = dict(per_frame=word == "fid", cache=cache, at_once=at_once, say=say)
        return [protocol.frechet(clips, real, network, **options)]
    if word == "inception_score":
        return [protocol.classes(clips, network, at_once=at_once, say=say)]
    return protocol.clip(clips, network, tokenize, at_once=at_once, say=say)


def _check(word: str, clips: Clips, real: Clips | None, network: features.Network, *, at_once: int) -> None:
    """Raises ValueError for clips that the network does not take, and for fewer than the score needs."""
    shape = protocol.outputs(clips, network, at_once=at_once)
    samples = {side.name: side.count * math.prod(shape[1:-1]) for side in (clips, real) if side is not None}
    fewest = {"inception_score": protocol.SPLITS, "clip": 1}.get(word, 2)
    for name, found in samples.items():
        if found < fewest:
            raise ValueError(f"--count: {word} needs at least {fewest} samples, and {name} gives {found}")
    if word == "clip" and clips.shape[0] < 2:
        raise ValueError(f"clip: consistency in time needs at least two frames, and clips of {clips.name} have one")


def _captioned(source: Source, spec: str) -> Source:
    """The source with the captions of a file that lies in its folder; ValueError, one line, where that is no such
    file."""
    if not captions.beside_of(spec).is_file():
        return source
    try:
        return captions.captioned(source, spec, "")
    except ValueError as error:
        words = str(error).replace("data.captions=", "").replace("data.source=", "--videos ")
        raise ValueError(
            re.sub(r"; write --config\.data\.\w+=NAME", "; its columns are video and caption", words)
        ) from None


def _words(
    clips: Clips, network: str, tokenizer: str | Path | None, videos: str
) -> tuple[Callable | None, tuple[str, ...]]:
    """What CLIP-T makes tokens with, where there is all that it needs; else a note of what is missing."""
    there = clips.captions or (videos and captions.beside_of(videos).is_file())
    if not there and not tokenizer:
        return None, ()
    if not network.startswith("clip"):
        missing = f"--network {network} reads no text"
    elif not tokenizer:
        missing = "give --tokenizer, the folder or the BPE file of CLIP"
    elif not clips.captions:
        missing = f"the videos have no captions (of a folder: {captions.FILE} in it, columns video, caption)"
    else:
        return clip_network.tokenizer(tokenizer), ()
    return None, (f"no CLIP-T: {missing}",)


def _each_frame(word: str, network: str) -> bool:
    """Whether every frame is a sample: of an Inception Score by a network that sees images."""
    return word == "inception_score" and not network.startswith(features.VIDEO_NETWORKS)


@contextlib.contextmanager
def _said_as(flag: str, **others: str) -> Iterator[None]:
    """Errors of a source speak of a config's fields; here it was a flag, and so were the `others` of data.NAME."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        words = str(error).replace("data.source=", f"{flag} ")
        for name, other in others.items():
            words = words.replace(f"data.{name}", other)
        raise (ValueError if isinstance(error, ValueError) else type(error))(words) from None
