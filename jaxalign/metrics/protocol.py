"""How generated videos are scored: which clips, through which network, in which words the number is reported.

The protocol is Align4Gen's (methods §5): 2,048 real videos in the proportions of the classes, one clip at a random
place of each; as many videos generated without guidance in 50 steps; FID on the same frames. Whatever differs from it
is named in the row. Nothing here knows runs: clips come from a source, or by number from whoever draws them
(training/generated.py).
"""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from jaxalign.data import proportional
from jaxalign.data.clips import Clip, Source, fingerprint
from jaxalign.metrics import features as features_lib
from jaxalign.metrics import parts
from jaxalign.metrics.clip_scores import temporal_consistency, text_similarity
from jaxalign.metrics.features import Network
from jaxalign.metrics.frechet import PAPERS_COUNT, Moments, advice, frechet_distance, merge_all, moments
from jaxalign.metrics.inception_score import inception_score, probabilities

NAME = "Align4Gen"
PAPER = {"n": PAPERS_COUNT, "frames": 16, "size": "256×256", "stride": 3, "sampler": "ddim or euler", "steps": 50}
PAPER |= {"guidance": 1.0, "videos": PAPERS_COUNT}
NETWORKS = {"fvd": "videomaev2_g", "fid": "inception", "inception_score": "c3d", "clip": "clip_vit_b32"}
PART_BYTES = 2**28  # of the clips of a part, at most
PART_CLIPS = 64
SPLITS = 10  # of the Inception Score

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips by number, read a part at a time."""

    name: str  # for people
    count: int
    shape: tuple[int, int, int]  # frames, height and width of each
    part: int  # clips in a part
    read: Callable[[range], UInt8[np.ndarray, "n t h w 3"]] = dataclasses.field(compare=False)
    about: Mapping[str, Any]  # all that decides them, for manifests
    differs: Mapping[str, Any]  # what PAPER names, as it is here
    items: tuple[int, ...] = ()  # of the source, one a clip
    labels: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()
    folder: Path | None = None  # where features of them are kept
    notes: tuple[str, ...] = ()
    # Of clips that were read so far and could not be, {number: the video's name}: another one of its class stands there
    replaced: dict[int, str] = dataclasses.field(default_factory=dict, compare=False)


def part_size(clip: Clip, at_once: int) -> int:
    """Clips in a part: whole batches, as many as PART_BYTES and PART_CLIPS allow, at least one batch."""
    fitting = min(PART_CLIPS, PART_BYTES // (clip.num_frames * clip.height * clip.width * 3))
    return max(1, fitting // at_once) * at_once


def of_source(
    source: Source, clip: Clip, *, split: str, count: int, seed: int = 0, at_once: int = features_lib.AT_ONCE
) -> Clips:
    """`count` clips of a split, drawn as the protocol says. Raises ValueError for a source that holds no videos, and
    as `proportional.draw`."""
    if source.recall is not None:
        raise ValueError(f"--real {source.name}: precomputed, it holds no videos; give the ones it was made from")
    drawn = proportional.draw(source, split, count, seed, clip)
    videos = len({window.item for window in drawn})
    notes = [f"{count} clips of only {videos} videos; the protocol wants one a video"] if videos < count else []
    replaced: dict[int, str] = {}

    def read(rows: range) -> np.ndarray:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding leaves Python's lock
            one = functools.partial(proportional.read, source, drawn, clip=clip)
            found = list(pool.map(one, rows))
        for number, row in zip(rows, found, strict=True):
            if row["substituted"]:
                replaced[number] = source.items[drawn[number].item].name
        return np.stack([row["video"] for row in found])

    about = {"source": source.name, "items": fingerprint(source), "split": split, "n": count, "seed": seed}
    about |= dataclasses.asdict(clip) | _files(source, [window.item for window in drawn])
    return Clips(
        name=f"{source.name} ({split})",
        count=count,
        shape=(clip.num_frames, clip.height, clip.width),
        part=part_size(clip, at_once),
        read=read,
        about=about,
        differs={"n": count, "stride": clip.stride} | looks(clip) | ({"videos": videos} if videos < count else {}),
        items=tuple(window.item for window in drawn),
        labels=tuple(_label(source, window.item) for window in drawn),
        captions=tuple(source.captions[window.item] for window in drawn) if source.captions else (),
        notes=tuple(notes),
        replaced=replaced,
    )


def _files(source: Source, items: Sequence[int]) -> dict[str, str]:
    """Of a source of files: where they lie, and a digest of sizes and times of those that hold these items."""
    if isinstance(source.read, functools.partial):  # records: all shards hold them together
        paths = source.read.args[0]
    else:
        every = getattr(source.read, "paths", None) or getattr(source.read, "folders", ())
        paths = tuple(dict.fromkeys(every[item] for item in items)) if every else ()
    if not paths:
        return {}
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(repr(_stamps(path)).encode())
        except OSError:  # whoever reads it says so
            digest.update(b"gone")
    root = os.path.commonpath([os.path.realpath(path) for path in paths])
    return {"source": root, "files": digest.hexdigest()[:16]}


def _stamps(path: str) -> list[tuple[int, int]]:
    """(bytes, time of change) of a file; of a folder of frames its own and the first frame's: frames that come, go or
    are replaced show in the folder, those that are written over in themselves, and then in all of them."""
    looked = [path, os.path.join(path, min(os.listdir(path), default=""))] if os.path.isdir(path) else [path]
    return [(found.st_size, found.st_mtime_ns) for found in map(os.stat, looked)]


def of_videos(source: Source, clip: Clip, *, count: int, seed: int = 0) -> Clips:
    """One clip of each of the first `count` videos in random order, whatever split they are in: a folder to score.

    Of a source that has captions, videos without one are left out, as too short ones are and what only shows all the
    others beside each other; notes say how many.
    """
    sheets = _sheets(source)
    untold = {k for k, caption in enumerate(source.captions) if not caption and k not in sheets}
    splits = ["unused" if k in sheets | untold else "held_out" for k in range(len(source.items))]
    items = tuple(dataclasses.replace(item, split=split) for item, split in zip(source.items, splits, strict=True))
    source = dataclasses.replace(source, items=items)
    told = [item for item in items if item.split == "held_out"]
    short = [item.name for item in told if item.frames is not None and item.frames < clip.fewest]
    left_out = {f"shorter than {clip.num_frames} frames": short, "unreadable": [name for name, _ in source.skipped]}
    left_out["without a caption"] = [items[k].name for k in sorted(untold)]
    left_out["they show the others beside each other"] = [items[k].name for k in sorted(sheets)]
    notes = tuple(f"left out, {why}: {len(k)} videos (the first: {k[0]})" for why, k in left_out.items() if k)
    count = min(count, len(told) - len(short)) or count
    found = of_source(source, clip, split="held_out", count=count, seed=seed)
    return dataclasses.replace(found, name=source.name, differs={"n": count} | looks(clip), notes=notes)


def _sheets(source: Source) -> set[int]:
    """The all.mp4 that `python -m jaxalign.sample` once wrote beside its videos, which are 0000.mp4 and so on."""
    names = {item.name for item in source.items} | {name for name, _ in source.skipped}
    found = {
        k: item.name.removesuffix("all.mp4") for k, item in enumerate(source.items) if item.name.endswith("all.mp4")
    }
    return {k for k, folder in found.items() if folder[-1:] in ("", "/") and f"{folder}0000.mp4" in names}


def looks(clip: Clip) -> dict[str, Any]:
    """What of a clip PAPER names."""
    return {"frames": clip.num_frames, "size": f"{clip.height}×{clip.width}"}


def _label(source: Source, item: int) -> int:
    known = source.items[item]
    return known.label if known.frames is not None or source.look is None else source.look(item)[1]


# ---- features ------------------------------------------------------------------------------------------------------


def feature_parts(
    clips: Clips, network: Network, folder: Path | None, about: Mapping[str, Any], *, at_once: int, say: Say
) -> Iterator[Float[np.ndarray, "n ..."]]:
    """The network's features of each part of the clips, in order; kept in `folder` (None: nowhere) as they come."""
    if folder is not None:
        parts.claim(folder, about, what="features", remedy="remove that folder or give another")
    spans = parts.spans(clips.count, clips.part)
    pace = Pace(clips.count, f"{network.name} features of {clips.name}", say)

    def make(rows: range) -> parts.Arrays:
        pace.start()
        found = features_lib.features(network, clips.read(rows), at_once=at_once)
        pace.did(len(rows), rows.stop)
        return {"features": found}

    for number, rows in enumerate(spans):
        if folder is None:
            arrays = make(rows)
        else:
            made, keep = functools.partial(make, rows), functools.partial(_as_drawn, clips, rows)
            arrays = parts.part(folder, number, made, keep=keep, say=say)
        yield np.asarray(arrays["features"])
    if clips.replaced:
        first = clips.replaced[min(clips.replaced)]
        say(
            f"warning: {len(clips.replaced)} of {clips.count} clips of {clips.name} cannot be read, and others stand in"
            f" for them (the first: {first})"
        )


def _as_drawn(clips: Clips, rows: range) -> bool:
    """Whether none of these clips had to be replaced."""
    return clips.replaced.keys().isdisjoint(rows)


def outputs(clips: Clips, network: Network, *, at_once: int) -> tuple[int, ...]:
    """The shape of the network's features of all clips, found without a clip. Raises ValueError, in one line, for
    clips that the network does not take."""
    size = at_once + -at_once % network.mesh.size
    video = jax.ShapeDtypeStruct((size, *clips.shape, 3), np.uint8)
    try:
        return (clips.count, *jax.eval_shape(network.ask, network.module, video).shape[1:])
    except ValueError as error:
        frames, height, width = clips.shape
        raise ValueError(
            f"--network {network.name} does not take clips of {frames} frames of {height}×{width} (of a run its "
            f"data.num_frames; of --videos --frames and --size): {error}"
        ) from None


def described(clips: Clips, network: Network, kind: str, *, at_once: int) -> dict[str, Any]:
    """All that decides features, for a manifest: the protocol, the network with the digest of its weights, the clips.

    The number of clips in a batch is part of it, since a batch decides the last bits.
    """
    # Unwritten for those that were in full precision always, so that older folders of them are still good.
    precision = {} if network.name.startswith((*features_lib.VIDEO_NETWORKS, "inception")) else {"precision": "fp32"}
    return precision | {
        "protocol": f"{NAME}: one clip a video, classes in proportion",
        "features": kind,
        "network": network.name,
        "settings": dict(network.settings),
        "weights": network.digest,
        "clips": dict(clips.about),
        "at_once": at_once,
    }


def statistics(
    clips: Clips, network: Network, kind: str, *, cache: Path | None = None, at_once: int = 8, say: Say = print
) -> Moments:
    """Moments of the features of clips, kept: in `cache`, or under a name of their own in the user's cache folder.

    Interrupted, it goes on with the part that it was at. Where clips had to be replaced, the statistics are not kept,
    nor are the parts with those clips. Raises ValueError for a `cache` that holds statistics of
    another protocol, which it names with both values, or whose bytes have changed.
    """
    about = described(clips, network, kind, at_once=at_once)
    folder = cache or cache_folder(about)
    known = parts.read_moments(folder, about)
    if known is not None:
        say(f"statistics of {clips.name} from {folder}")
        return known
    parts.claim(folder, about, what="statistics", remedy="give another --cache")
    found = merge_all(_moments(f) for f in feature_parts(clips, network, folder, about, at_once=at_once, say=say))
    if clips.replaced:
        say(f"these statistics of {clips.name} are not kept: another time those clips may be readable")
        return found
    parts.write_moments(folder, found, about)
    say(f"statistics of {clips.name} kept in {folder}")
    return found


def cache_folder(about: Mapping[str, Any]) -> Path:
    """Where statistics are kept when nobody says where: XDG_CACHE_HOME or ~/.cache, a folder for each protocol."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    named = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return home / "jaxalign" / "statistics" / f"{about['network']}-{named}"


def _moments(found: np.ndarray) -> Moments:
    """Of [n, d], or of every frame of [n, t, d]."""
    return moments(found.reshape(-1, found.shape[-1]))


def _kept_in(clips: Clips, network: Network, kind: str) -> Path | None:
    return None if clips.folder is None else clips.folder / f"{kind}-{network.name}"


# ---- scores --------------------------------------------------------------------------------------------------------


def frechet(
    generated: Clips,
    real: Clips,
    network: Network,
    *,
    per_frame: bool,
    cache: Path | None = None,
    at_once: int = 8,
    say: Say = print,
) -> dict[str, Any]:
    """The row of a Fréchet distance: FVD (`per_frame` False) or FID, called as `Network.title` says.

    Raises ValueError as `statistics`. Too few clips are said, with the number that is needed.
    """
    kind = "frames" if per_frame else "clips"
    of_real = statistics(real, network, kind, cache=cache, at_once=at_once, say=say)
    about = described(generated, network, kind, at_once=at_once)
    found = feature_parts(generated, network, _kept_in(generated, network, kind), about, at_once=at_once, say=say)
    of_generated = merge_all(_moments(f) for f in found)
    if warning := advice(min(of_real.count, of_generated.count), of_real.width):
        say(f"warning: {warning}")
    row = {"metric": network.title, "value": frechet_distance(of_generated, of_real), "n": generated.count}
    row |= {"n real": real.count, "of": generated.name, "real": real.name}
    return row | _ending("fid" if per_frame else "fvd", generated, real, network)


def classes(generated: Clips, network: Network, *, at_once: int = 8, splits: int = SPLITS, say: Say = print) -> dict:
    """The row of an Inception Score; every clip is a sample, or of an image network every frame."""
    logits = np.concatenate([f.reshape(-1, f.shape[-1]) for f in _all(generated, network, "logits", at_once, say)])
    mean, deviation = inception_score(probabilities(logits), splits=splits)
    title = "IS (C3D)" if network.name.startswith("c3d") else f"Inception Score ({network.name}; not C3D's)"
    row = {"metric": title, "value": mean, "±": deviation, "splits": splits, "n": generated.count}
    return row | {"of": generated.name} | _ending("inception_score", generated, None, network)


def clip(
    generated: Clips,
    network: Network,
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None,
    *,
    at_once: int = 8,
    say: Say = print,
) -> list[dict]:
    """The rows of CLIP's consistency in time and, of videos with captions and a `tokenize`, of CLIP-T."""
    frames = np.concatenate(list(_all(generated, network, "frames", at_once, say)))
    known = network.name.startswith("clip")
    title = "CLIP consistency" if known else f"consistency in time ({network.name}; not CLIP's)"
    scores = {title: temporal_consistency(frames)}
    if known and generated.captions and tokenize is not None:
        scores["CLIP-T"] = text_similarity(frames, features_lib.text_features(network, tokenize(generated.captions)))
    rows = []
    for title, values in scores.items():
        row = {"metric": title, "value": float(values.mean()), "±": float(values.std()), "n": generated.count}
        rows.append(row | {"of": generated.name} | _ending("clip", generated, None, network))
    return rows


def _all(generated: Clips, network: Network, kind: str, at_once: int, say: Say) -> Iterator[np.ndarray]:
    about = described(generated, network, kind, at_once=at_once)
    return feature_parts(generated, network, _kept_in(generated, network, kind), about, at_once=at_once, say=say)


def _ending(score: str, generated: Clips, real: Clips | None, network: Network) -> dict[str, Any]:
    """What every row ends with: how the number came about, and what of that is not the paper's."""
    known = {**(real.differs if real else {}), **generated.differs, "network": network.name}
    paper = PAPER | {"network": NETWORKS[score]}
    if network.file and network.file not in (files := features_lib.papers_files(network.name)):
        known["weights"], paper["weights"] = network.file, files[0]
    differ = [f"{k} {known[k]} ({v})" for k, v in paper.items() if k in known and known[k] != v]
    protocol = NAME + (f" but for {', '.join(differ)}" if differ else "")
    ending = {"network": network.name, "network file": network.file, "network digest": network.digest}
    ending["protocol"] = protocol
    replaced = {"replaced": generated, "replaced real": real}
    ending |= {title: len(clips.replaced) for title, clips in replaced.items() if clips is not None and clips.replaced}
    of_run = ("sampler", "guidance", "seed", "step", "weights")
    return ending | {k: generated.about[k] for k in of_run if k in generated.about}


class Pace:
    """Says now and then how far something is and how long it will still take, from `start` on."""

    def __init__(self, count: int, what: str, say: Say, *, every: float = 10.0):
        self.count, self.what, self.say, self.every = count, what, say, every
        self.begun = self.said = None
        self.new = 0

    def start(self) -> None:
        """The work begins now, unless it has begun before."""
        if self.begun is None:
            self.begun = self.said = time.monotonic()

    def did(self, new: int, done: int) -> None:
        """`new` more were made; `done` of all are there."""
        self.new += new
        now = time.monotonic()
        if done < self.count and now - self.said < self.every:
            return
        self.said = now
        left = (now - self.begun) / self.new * (self.count - done)
        about = f", about {left / 60:.0f} min left" if left > 90 else ""
        self.say(f"{self.what}: {done}/{self.count}{about}")
