"""Videos from prompts: a list of (prompt, seed), a file each, an index; what is there is not drawn again.

The text encoder is needed once and first: all prompts are encoded, then it goes, then the student and the codec come.
A video depends on its prompt, its seed and the settings alone, not on the batch that it was drawn in nor on how many
devices or processes there are. Processes share the list out among themselves and each uses its own devices.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign import codecs
from jaxalign.figures import video as video_files
from jaxalign.tasks.aligning import cast
from jaxalign.tasks.denoising import DenoisingTask
from jaxalign.training import config as config_lib
from jaxalign.training import contents, drawn, processes, setup, trained
from jaxalign.training import prompts as prompts_lib
from jaxalign.training import published as published_lib
from jaxalign.training.mesh import batch_sharding, make_mesh, replicate, replicated
from jaxalign.training.restore import find_checkpoint
from jaxalign.training.showing import SAMPLING, to_uint8

ENCODED_AT_ONCE = 8
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")  # of a published folder: what a video is of


class Subject(NamedTuple):
    """Something to sample from: a run or a published folder."""

    name: str  # what distinguishes it from others, for the index
    about: dict[str, Any]  # and what else its videos depend on, for the index too
    task: DenoisingTask
    latent_shape: tuple[int, int, int, int]
    extra: int  # latent frames in front that are dropped before decoding
    embed: Callable[[Sequence[str]], tuple[np.ndarray, int]]  # prompts -> (embeddings [k, n, d], how many were cut)
    load: Callable[[Any], tuple[Any, Any]]  # mesh -> (student, codec), on its devices
    settings: dict[str, Any]  # SAMPLING, steps, fps: its own


class Asked(NamedTuple):
    """One video to be."""

    prompt: str
    seed: int
    file: str


def of_run(workdir: str | Path, *, weights: str = "ema") -> Subject:
    """A checkpoint (`workdir` itself, or its newest whole one) of a run that is told by text. Raises as
    `trained.open_run`."""
    config = trained.read_config(workdir)
    unaligned = {"align": {"method": "none"}}  # no teacher is loaded, for nobody asks it
    config.update(unaligned)
    run = setup.build(config_lib.resolve(config), abstract=True, with_text=False)
    task = dataclasses.replace(run.task, lora=None)  # `trained.whole` merges adapters into their base
    checkpoint = find_checkpoint(workdir)

    def embed(prompts):
        ids, cut = prompts_lib.tokenize(config, prompts)
        encoder = codecs.load(config.text.encoder, setup.text_weights(config), dtype=task.dtype)
        return _encoded(encoder, ids, task.dtype), cut

    def load(mesh):
        opened = trained.open_run(workdir, weights=weights, checkpoint=checkpoint, overrides=unaligned, with_text=False)
        opened = trained.whole(opened)
        # A student that is sampled from is read, never trained: the compute dtype will do.
        model = cast(opened.trainable["model"], task.dtype)
        return replicate(model, mesh), replicate(opened.run.frozen["codec"], mesh)

    s = config.sample
    settings = {name: s[name] for name in SAMPLING} | {"fps": s.fps}
    about = drawn.of_checkpoint(checkpoint, weights)
    return Subject(about.pop("of"), about, task, run.latent_shape, 0, embed, load, settings)


def of_folder(path: str | Path, **size: Any) -> Subject:
    """A published folder; `size` as in `published.describe`. Upstream's settings: 50 steps, guidance 6, 8 frames/s."""
    found = published_lib.describe(path, **size)
    config, dtype = found.model_config, found.task.dtype

    def embed(prompts):
        ids, cut = codecs.tokenize("t5_xxl", path, prompts, config.text_tokens)
        encoder = codecs.load("t5_xxl", path, dtype=dtype)
        if encoder.width != config.text_width:
            raise ValueError(f"{path}: text_encoder/ is {encoder.width} wide, transformer/ takes {config.text_width}")
        return _encoded(encoder, ids, dtype), cut

    def load(mesh):
        return published_lib.load(found, sharding=replicated(mesh))

    settings = dict(sampler=found.sampler, guidance_scale=6.0, dynamic_guidance=False, steps=50, fps=8)
    about = dict(zip(("num_frames", "height", "width"), found.video_shape, strict=True))
    about |= dict(dtype=jnp.dtype(dtype).name, tiling=found.codec.config.tiling)
    about |= {part: contents.weights_identity(Path(path) / part) for part in PARTS}  # another export may lie there
    name = f"folder {Path(path).resolve()}"
    return Subject(name, about, found.task, found.latent_shape, found.extra, embed, load, settings)


def ask(prompts: Sequence[str], *, count: int = 1, seed: int = 0) -> list[Asked]:
    """`count` videos a prompt, of the seeds `seed`, `seed` + 1, …; each with the name of its file."""
    if not prompts:
        raise ValueError("no prompts: give --prompts FILE (one a line) or --prompt TEXT")
    return [
        Asked(prompt, seed + k, f"{number:04d}_{_slug(prompt)}_seed{seed + k}.mp4")
        for number, prompt in enumerate(prompts)
        for k in range(count)
    ]


def draw(
    subject: Subject,
    asked: Sequence[Asked],
    out: str | Path,
    *,
    at_once: int = 0,
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
    **changes: Any,
) -> list[Path]:
    """Write the videos that are asked for and not there yet into `out`; the files of all of them, in order.

    `at_once`: videos in a batch (0: one a device). `share` (k, n): of n processes this is number k, which draws every
    n-th video from the k-th on. `changes` override the subject's settings. `out`/index.jsonl has a line a video: file,
    prompt, seed, what it was drawn from, settings. Raises ValueError when a file there was drawn from something else.
    Of processes that know of each other (jax.distributed) each returns when all are done.
    """
    out, (this, count) = Path(out), share
    if not 0 <= this < count:
        raise ValueError(f"--process_id={this}: the processes are 0 … {count - 1}")
    out.mkdir(parents=True, exist_ok=True)
    settings = subject.settings | changes
    of = dict(of=subject.name, **subject.about)
    rows = {a.file: dict(file=a.file, prompt=a.prompt, seed=a.seed, **of, **settings) for a in asked}
    processes.check_agreement({"what is drawn": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]})
    processes.check_shared(out)
    missing = drawn.missing(out, rows)
    # By place in the whole list: another process may look at the folder later, when more is there.
    mine = [a for k, a in enumerate(asked) if k % count == this and a.file in missing]
    if len(missing) < len(rows):
        say(f"{len(rows) - len(missing)} of {len(rows)} videos are in {out} already")
    if mine:
        fps = settings.pop("fps")
        for number, (a, clip) in enumerate(videos(subject, mine, at_once=at_once, say=say, **settings), 1):
            video_files.write_mp4(out / a.file, to_uint8(clip), fps)  # under a temporary name until it is whole
            drawn.append(drawn.index(out, share), rows[a.file])
            say(f"{number}/{len(mine)}  {out / a.file}")
    if jax.process_count() > 1 and drawn.missing(out, rows):
        say("waiting for the other processes")
    while jax.process_count() > 1 and drawn.missing(out, rows):
        time.sleep(1)  # leaving early would end the others: jax.distributed is shut down together
    if count > 1 and (theirs := drawn.missing(out, rows)):
        say(f"{len(rows) - len(theirs)} of {len(rows)} videos are there; the others are other processes'")
    return [out / a.file for a in asked]


def videos(
    subject: Subject, asked: Sequence[Asked], *, at_once: int = 0, say: Callable[[str], None] = print, **settings: Any
) -> Iterator[tuple[Asked, Float[Array, "t h w 3"]]]:
    """Each video in [-1, 1] with what was asked for, in order, batch by batch on this process's devices."""
    different = list(dict.fromkeys(["", *(a.prompt for a in asked)]))
    embeddings, cut = subject.embed(different)
    if cut:
        say(f"{cut} of {len(different) - 1} prompts are longer than {embeddings.shape[1]} tokens and are cut")
    told = dict(zip(different, embeddings, strict=True))
    mesh = make_mesh(devices=jax.local_devices())
    size = min(at_once or mesh.size, len(asked))
    size += -size % mesh.size  # every device has its part of the batch
    model, codec = subject.load(mesh)
    rows = batch_sharding(mesh)

    def run(model, codec, noise, prompt, null, keys):
        frozen = {"codec": codec, "null_prompt": null}
        latents = subject.task.latents(model, frozen, noise, prompt, keys, **settings)
        return subject.task.decode(frozen, latents[:, subject.extra :])

    run = jax.jit(run)
    null = jax.device_put(told[""], replicated(mesh))
    for first in range(0, len(asked), size):
        batch = asked[first : first + size]
        full = [*batch, *batch[:1] * (size - len(batch))]  # one shape, one compilation
        noise = jnp.stack([initial_noise(a.seed, subject.latent_shape) for a in full])
        keys = jnp.stack([jax.random.fold_in(jax.random.key(a.seed), 1) for a in full])
        prompt = np.stack([told[a.prompt] for a in full])
        noise, prompt, keys = (jax.device_put(x, rows) for x in (noise, prompt, keys))
        yield from zip(batch, run(model, codec, noise, prompt, null, keys), strict=False)


def initial_noise(seed: int, shape: tuple[int, int, int, int]) -> Float[Array, "t h w c"]:
    """The standard normal latents that a seed's video begins with."""
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, one a line; empty lines are left out. Raises FileNotFoundError, ValueError for none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--prompts={path}: no such file; write one prompt a line")
    found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"--prompts={path}: no prompt in it; write one a line")
    return found


def _encoded(encoder, ids: np.ndarray, dtype) -> np.ndarray:
    """Embeddings on the host; when this returns nobody holds the encoder any more."""
    encode = jax.jit(lambda encoder, ids: encoder(ids).astype(dtype))
    size = min(ENCODED_AT_ONCE, len(ids))
    parts = []
    for k in range(0, len(ids), size):
        rows = np.arange(k, k + size) % len(ids)
        parts.append(np.asarray(encode(encoder, ids[rows])))
    return np.concatenate(parts)[: len(ids)]


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}".lstrip("-")
