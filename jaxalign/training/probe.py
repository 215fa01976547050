"""How much of a teacher a frozen student holds: a fresh head is trained on its tokens, with the run's own method.

A run's own head says how well head and student fit together; a student without alignment has no head at all. A fresh
head of the same seed, data and number of steps for every student is the same question for all of them.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import optax

from jaxalign.alignment.methods import RELATIONAL
from jaxalign.data import precomputed
from jaxalign.diffusion.process import draw
from jaxalign.tasks import aligning
from jaxalign.training import alignments, contents
from jaxalign.training import config as config_lib
from jaxalign.training.evaluation import held_out_losses, on_device
from jaxalign.training.setup import Run

# Every student is asked through one run's data, codec and process; a run that was trained on others answers nothing.
_SHARED = ("data.split", "data.frame_rate", "data.num_frames", "data.height", "data.width")
_SHARED += ("data.stride", "data.short", "model.name", "model.num_classes", "text.encoder", "text.tokens", "objective")
_OF_OBJECTIVE = {"ddpm": ("learn_sigma",), "v": ("snr_shift",)}
# How much an alignment counts and when: with another weight it is the same question still.
_WEIGHTS = ("weight", "schedule", "schedule_steps", "warmup_steps", "cutoff")


def check_alike(run: str, config: ml_collections.ConfigDict, first: str, base: ml_collections.ConfigDict) -> None:
    """ValueError, naming the fields, unless what `first` is asked can be asked of the student of `run`, too."""
    fields = (*_SHARED, *_OF_OBJECTIVE.get(base.objective, ()))

    def shared(config):
        flat = config_lib.identity(config)  # it lacks what older configs lack, where that is at its default
        codec = {k: v for k, v in contents.of_latents(config).items() if k != "codec.tiling"}
        return {k: v for k, v in flat.items() if k in fields} | codec | {"data.source": _videos(config.data.source)}

    ours, theirs = shared(config), shared(base)
    if differing := [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]:
        pairs = [f"{k}: {ours.get(k, 'the default')!r}, not {theirs.get(k, 'the default')!r}" for k in differing]
        raise ValueError(f"probe: {run} cannot be asked what {first} is asked ({'; '.join(pairs)}): leave one out")


def check_fits(run: str, one: Run, first: str, base: Run) -> None:
    """ValueError unless the tokens of one student are as wide and as many as those that the first one's heads take."""
    found = [(r.student_grid, r.model_config.width) for r in (one, base)]
    if found[0] != found[1]:
        (grid, width), (wanted, first_width) = ((" × ".join(map(str, g)), w) for g, w in found)
        raise ValueError(
            f"probe: {run} cannot be asked what {first} is asked (tokens {grid} of width {width}, not {wanted} of "
            f"width {first_width}): leave one out"
        )


def _videos(source: str) -> str:
    """Where the videos behind a config's data.source lie; of a precomputed folder those that it was made from."""
    if precomputed.is_precomputed(source):
        source = precomputed.open_folder(source).clips.about.get("source", source)
    path = Path(source.removeprefix("folder:")).expanduser()
    return os.path.realpath(path) if path.exists() else source


def asks_alike(one: ml_collections.ConfigDict, other: ml_collections.ConfigDict) -> bool:
    """Whether two runs align the same blocks in the same way with the same teachers, whatever the weights."""

    def asked(config):
        flat = config_lib.flatten(alignments.sections(config))  # 'm_tsa.teacher.name': ...
        return {k: v for k, v in flat.items() if v is not None and k.split(".")[1] not in _WEIGHTS}

    return asked(one) == asked(other)


def fit_heads(
    run: Run,
    students: dict[str, object],
    batches: Iterator[dict],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[int, dict], None] = lambda step, losses: None,
) -> dict[str, dict]:
    """{student's name: heads}: one fresh head each, all from one key, trained on the same draws; students stay frozen.

    `probed(run)` says through which alignment; without one, ValueError.
    """
    task = run.task
    alignment = probed(run)
    root = jax.random.key(seed)
    fresh = aligning.init_heads([alignment], jax.random.fold_in(root, 0))
    heads = {name: jax.tree.map(jnp.copy, fresh) for name in students}
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(heads, students, frozen, batch, key):
        clips = batch["label"].shape[0]
        noise_shape = (clips, *run.latent_shape)
        fractions, noise = draw(key, jnp.zeros(noise_shape))
        losses = {}
        for name, model in students.items():
            tapped = task.student_tokens({"model": model}, frozen, batch, noise, fractions, alignment.taps)
            losses[name] = jnp.mean(task.align(alignment, heads[name], tapped, frozen, batch))
        # The heads share no parameter, so one backward pass of the sum gives each its own gradient.
        return sum(losses.values()), losses

    @jax.jit
    def step(heads, opt_state, students, frozen, batch, key):
        (_, losses), grads = jax.value_and_grad(loss, has_aux=True)(heads, students, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(heads, updates), opt_state, losses

    opt_state = optimizer.init(heads)
    for number in range(steps):
        key = jax.random.fold_in(root, number + 1)
        heads, opt_state, losses = step(heads, opt_state, students, run.frozen, on_device(next(batches)), key)
        progress(number + 1, losses)
    return heads


def probed(run: Run) -> aligning.Alignment:
    """The alignment through which a run's students are probed: the first with a teacher; ValueError without one."""
    for alignment in run.task.alignments:
        if alignment.teachers:
            return alignment
    raise ValueError("probe: the run has no teacher to ask; give one that aligns its student with a teacher")


def raw_tokens_compare(run: Run, alignment: aligning.Alignment) -> bool:
    """Whether tokens without a head can meet this target: on its grid, and of its width where the method wants that."""
    widths = run.model_config.width, alignment.head.teacher_width
    return run.student_grid == alignment.grid and (alignment.method in RELATIONAL or widths[0] == widths[1])


def measure(run: Run, trainable, batches: list[dict], *, times: int) -> dict[str, float]:
    """Held-out {'denoising': ..., 'aligned': ...} of one student, through the heads in `trainable` or, without, raw."""
    alignment = probed(run)
    if not trainable["heads"]:
        alignment = dataclasses.replace(alignment, head=None)
    run = dataclasses.replace(run, task=dataclasses.replace(run.task, alignments=(alignment,)))
    losses = held_out_losses(run, trainable, batches, times=times)
    return {"denoising": float(losses["denoising"].mean()), "aligned": float(losses[alignment.name].mean())}
