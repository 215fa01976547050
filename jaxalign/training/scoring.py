"""The words fvd, fid, inception_score and clip of `python -m jaxalign.evaluate`: from a run, or a folder of videos."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxalign.data import sources
from jaxalign.data.clips import Clip
from jaxalign.interop import sealed
from jaxalign.metrics import features, protocol
from jaxalign.metrics.networks import clip as clip_network
from jaxalign.metrics.protocol import Clips
from jaxalign.training import generated

# What each score asks when nobody says: the network of the papers.
NETWORKS = {"fvd": "i3d", "fid": "inception", "inception_score": "c3d", "clip": "clip_vit_b32"}
AGAINST_REAL = ("fvd", "fid")


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
    cache: str | Path | None = None,
    tokenizer: str | Path | None = None,
    at_once: int = features.AT_ONCE,
    out: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The rows of one score, kept as evaluate_WORD_NETWORK.json in the workdir or `out`.

    Give the `workdir` of a run, whose clips are as its data's, or a folder of `videos` with the source `real` to
    compare it with; `frames`, `size` and `stride` are then those of the clips (`videos_stride`: of the folder's own).
    `network` with its `weights` as `features.open_network`. Raises ValueError or FileNotFoundError, one line, for what
    is missing or does not fit, before anything is generated.
    """
    if word not in NETWORKS:
        raise ValueError(f"{word!r} is no score; write one of {', '.join(NETWORKS)}")
    if (workdir is None) == (not videos):
        raise ValueError("give --workdir, the folder of a run, or --videos, a folder of generated videos")
    if videos and word in AGAINST_REAL and not real:
        raise ValueError(f"--real is missing: {word} compares --videos with the videos of a source (folder, demo, ...)")
    name = network or NETWORKS[word]
    tokenize = clip_network.tokenizer(tokenizer) if tokenizer and word == "clip" else None
    kind = dict(per_frame=word in ("fid", "clip") or _each_frame(word, name), logits=word == "inception_score")
    asked = features.open_network(name, weights, **kind)  # first: the most likely to be missing
    if workdir is not None:
        options = dict(steps=steps, sampler=sampler, guidance_scale=guidance_scale, weights=student)
        options |= dict(count=count, real=real, split=split, seed=seed, at_once=at_once, say=say)
        with _said_as("--real") if real else contextlib.nullcontext():
            clips, of_real = generated.of_run(workdir, **options)
        folder = Path(workdir)
    else:
        shape = dict(num_frames=frames, height=size[0], width=size[1])
        with _said_as("--videos"):
            opened = sources.open_source(videos)
            clips = protocol.of_videos(opened, Clip(**shape, stride=videos_stride), count=count, seed=seed)
        of_real, folder = None, Path(out or "runs/scores")
        if word in AGAINST_REAL:
            clip = Clip(**shape, stride=stride)
            with _said_as("--real"):
                drawn = dict(split=split, count=count, seed=seed, at_once=at_once)
                of_real = protocol.of_source(sources.open_source(real), clip, **drawn)
    for note in (*clips.notes, *(of_real.notes if of_real is not None and word in AGAINST_REAL else ())):
        say(f"note: {note}")
    rows = _rows(word, clips, of_real, asked, cache=cache, tokenize=tokenize, at_once=at_once, say=say)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"evaluate_{word}_{name}.json"
    sealed.write_atomic(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    say(f"kept in {path}")
    return rows


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


def _each_frame(word: str, network: str) -> bool:
    """Whether every frame is a sample: of an Inception Score by a network that sees images."""
    return word == "inception_score" and not network.startswith(features.VIDEO_NETWORKS)


@contextlib.contextmanager
def _said_as(flag: str) -> Iterator[None]:
    """Errors of a source speak of a config's fields; here it was a flag."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        words = str(error).replace("data.source=", f"{flag} ").replace("data.num_frames", "--frames")
        raise (ValueError if isinstance(error, ValueError) else type(error))(words) from None
