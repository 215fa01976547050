"""What `jaxalign.precompute` computes: its options, the frozen networks, and what makes each series of a folder."""

import dataclasses
import difflib
import functools
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxalign import teachers
from jaxalign.alignment.saliency import motion_saliency
from jaxalign.data import precomputed
from jaxalign.data.clips import SPLITS, Source
from jaxalign.data.precomputed import Folder, Series
from jaxalign.tasks import aligning
from jaxalign.tasks.denoising import pixels
from jaxalign.tasks.motion_subspace import TARGET_PART
from jaxalign.teachers.flow_target import flow_target
from jaxalign.training import contents, environment, setup, subspaces
from jaxalign.training.subspaces import FLOW_NETWORKS

WHAT = ("latents", "text", "teachers", "flow", "video")
FLOW_NETWORK = "raft_large"  # where neither the options nor the config name one
DTYPES = {"keep": None, "bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is stored, of which clips, and how the work is shared."""

    what: tuple[str, ...] = ("latents", "text", "teachers")
    variants: int = 1  # clips a window
    clips: int = 0  # only so many windows, evenly spread; 0: all
    held_out: int = 8  # clips; training looks at 8 (training/loop.py)
    dtype: str = "keep"  # of what is floating: as it is computed | bf16 | fp16 | fp32
    shard_mb: float = 512  # a file is as large, or one clip
    at_once: int = 1  # clips on each device
    threads: int = 0  # that decode; 0: as many as cores that this process may use, at most precompute.MOST_THREADS
    share: tuple[int, int] = (0, 1)  # (k, n): process k of n, which makes the shards k, k + n, …
    shard_range: tuple[int, int] | None = None  # in its place: shards of these numbers
    flow_network: str = ""  # empty: config.motion.flow's, else FLOW_NETWORK
    flow_weights: str = ""

    def __post_init__(self):
        for name in self.what:
            if name not in WHAT:
                near = difflib.get_close_matches(name, WHAT, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(WHAT)}"
                raise ValueError(f"--what: there is no {name!r}; {hint}")
        if not self.what:
            raise ValueError(f"--what is empty; write some of {', '.join(WHAT)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype={self.dtype}: write one of {', '.join(DTYPES)}")
        for name in ("variants", "held_out", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.share[0] < self.share[1]:
            raise ValueError(f"--process_id={self.share[0]}: the processes are 0 … {self.share[1] - 1}")

    def mine(self, number: int) -> bool:
        """Whether this process makes shard `number`."""
        if self.shard_range is not None:
            return self.shard_range[0] <= number < self.shard_range[1]
        return number % self.share[1] == self.share[0]


@dataclasses.dataclass(frozen=True)
class Maker:
    """What makes one series: compute(network, video uint8 [b,t,h,w,3]) -> [b, ...]; None: the video itself."""

    name: str
    fields: dict[str, Any]
    network: Any = None
    compute: Callable | None = None
    splits: tuple[str, ...] = SPLITS


def networks(
    config: ml_collections.ConfigDict, source: Source, options: Options, mesh: jax.sharding.Mesh, *, text: bool
) -> setup.Run:
    """The run with the frozen networks that are asked here, on the mesh; no student and no adapters' base.

    Raises as `setup.build`, and ValueError for a flow network that is none.
    """
    plain = ml_collections.ConfigDict(config.to_dict())
    if plain.get("lora"):
        plain.lora.rank = 0
    flow = asked_flow(config, options) if "flow" in options.what else None
    unasked = [TARGET_PART]  # its network is `flow`
    if "teachers" not in options.what:
        abstract = setup.build(plain, num_classes=len(source.classes), abstract=True)
        unasked += [aligning.tokens_part(key) for key in abstract.frozen["teachers"]]
    run = setup.build(plain, num_classes=len(source.classes), mesh=mesh, with_text=text, given=unasked)
    frozen = {name: tree for name, tree in run.frozen.items() if name != "null_prompt"}
    if flow is not None:
        name, weights, settings = flow
        network = teachers.load(name, weights or None, **settings)
        frozen["flow"] = aligning.cast(network, setup.DTYPES[config.precision])
    return dataclasses.replace(run, frozen=setup.place_frozen(frozen, mesh))


def asked_flow(config: ml_collections.ConfigDict, options: Options) -> tuple[str, str, dict[str, Any]]:
    """(name, weights, settings) of the flow network: the options', else config.motion.flow's, whose settings hold.

    Raises ValueError for a network that gives no flow.
    """
    named, weights, settings = subspaces.asked_flow(config)
    name = options.flow_network or (named if named in FLOW_NETWORKS else FLOW_NETWORK)
    if name not in FLOW_NETWORKS:
        raise ValueError(f"--flow_network={name}: write one of {', '.join(FLOW_NETWORKS)}")
    return name, options.flow_weights or (weights if name == named else ""), settings


def makers(config: ml_collections.ConfigDict, run: setup.Run, options: Options, folder: Folder) -> list[Maker]:
    """What makes the clips' series. Every one is compiled alone: its bits do not depend on what else is asked."""
    found, codec = [], run.frozen.get("codec")  # motion_subspace has none
    has_moments = hasattr(codec, "moments")
    video = "video" in options.what or ("latents" in options.what and not has_moments)
    if "latents" in options.what and has_moments:
        found.append(Maker("latents", contents.of_latents(config), codec, lambda codec, v: codec.moments(pixels(v))))
    if "teachers" in options.what:
        for key, fields in contents.of_teachers(config, run).items():
            name, teacher = contents.series_of_teacher(fields), run.frozen["teachers"][key]
            found.append(Maker(name, fields, teacher, lambda teacher, v: teacher(pixels(v))))
        for grid in () if video or "video" in folder.series else contents.saliency_grids(run):
            look = functools.partial(_saliency, grid=grid)
            found.append(Maker(contents.series_of_saliency(grid), {"grid": list(grid)}, None, look))
    if "flow" in options.what:
        name, weights, _ = asked_flow(config, options)
        fields = contents.of_teacher(name, weights, run.frozen["flow"], config.precision, "flow")
        look = functools.partial(_flow, token_frames=getattr(run.task, "token_frames", config.data.num_frames // 2))
        found.append(Maker("flow_target", fields, run.frozen["flow"], look))
    if video:
        found.append(Maker("video", {}))
    elif "video" not in folder.series:
        found.append(Maker("shown", {}, splits=("held_out",)))  # for people, in figures
    return found


def _saliency(_, video, *, grid):
    return motion_saliency(pixels(video), grid)


def _flow(network, video, *, token_frames: int):
    return flow_target(network(pixels(video)), token_frames)


def stored(maker: Maker, dtype: Any) -> Callable:
    """compute, in the dtype of the folder. Saliency is kept exact: it is small, and its order is what counts."""

    def compute(network, video):
        x = maker.compute(network, video)
        wanted = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) and "grid" not in maker.fields
        return x.astype(dtype) if wanted else x

    return compute


def claim(folder: Folder, makers: Sequence[Maker], options: Options) -> dict[str, Series]:
    """{name: series} as they stand in the folder, new ones written down. Raises ValueError for other contents there."""
    if not makers:  # prompts alone, of a folder that holds the videos
        return {}
    f = folder.clips.fields
    video = jax.ShapeDtypeStruct((1, f["data.num_frames"], f["data.height"], f["data.width"], 3), np.uint8)
    shapes = {}
    for maker in makers:
        compute = (lambda network, v: v) if maker.compute is None else stored(maker, DTYPES[options.dtype])
        shapes[maker.name] = jax.eval_shape(compute, maker.network, video)
    sizes = {name: x.size * x.dtype.itemsize for name, x in shapes.items()}
    # As large for all that is made together, so that a clip is decoded once, and the same for every process.
    largest = max(sizes[m.name] * folder.clips.versions(m.splits[0]) for m in makers)
    per_shard = max(1, int(options.shard_mb * 2**20) // largest)
    claimed = {}
    for maker in makers:
        counts = {split: folder.clips.windows[split] for split in maker.splits}
        x = shapes[maker.name]
        series = Series(maker.name, maker.fields, str(x.dtype), x.shape[1:], counts, per_shard, about())
        claimed[maker.name] = precomputed.claim_series(folder, series)
    return claimed


def announce(
    folder: Folder, series: Mapping[str, Series], whole: Collection[Path], options: Options, say: Callable[[str], None]
) -> None:
    """Say what is made, how large the shards are that are not `whole`, and how much of the disk is free."""
    wanted, there = 0, 0
    for s in series.values():
        each = math.prod(s.shape) * jnp.dtype(s.dtype).itemsize
        for split in s.counts:
            for k, name in enumerate(s.shards(split)):
                size = each * folder.clips.versions(split) * len(s.units(split, k))
                wanted, there = wanted + size, there + (size if folder.path / name in whole else 0)
    free, left = shutil.disk_usage(folder.path).free, wanted - there
    count = folder.clips.windows["train"] * folder.clips.versions("train")
    captions = [f", {s.counts['captions']:,} different captions" for s in series.values() if "captions" in s.counts]
    say(f"{count:,} clips and {options.held_out} held out{''.join(captions)}: {', '.join(series)}")
    more = f" more than the {there / 1e9:,.2f} GB that are there," if there else ""
    say(f"about {left / 1e9:,.2f} GB{more} in {folder.path}, where {free / 1e9:,.1f} GB are free")
    if left > free:
        say(
            f"warning: {(left - free) / 1e9:,.1f} GB too little is free; make room, or take a smaller --what, --clips "
            "or --variants, or --dtype=bf16, with another --out"
        )


def about() -> dict[str, Any]:
    """What a manifest says for people."""
    return {"versions": environment.versions()}
