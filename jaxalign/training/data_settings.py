"""From a config's data section to the arguments and shapes that the data functions take."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxalign.data.sources import open_source
from jaxalign.training.mesh import BATCH_AXES, batch_sharding

# What a task reads, if the batch has it: these, and "teacher/KEY", "saliency/GRID" (tasks/aligning.py), "motion/flow"
# (tasks/motion_subspace.py).
BATCH_PARTS = ("video", "label", "tokens", "moments", "prompt", "teacher", "saliency", "motion")

REPEATED = "repeated"  # bool [b] in a batch of `split_batch`


def clip_settings(config: ml_collections.ConfigDict) -> dict[str, int | str]:
    """What a clip looks like, as the data functions take it."""
    return {name: config.data[name] for name in ("num_frames", "height", "width", "stride", "short")}


def source_settings(config: ml_collections.ConfigDict) -> dict[str, int | float]:
    """How `sources.open_source` is to read what data.source names; a config of before these fields has none of them."""
    return {name: config.data[name] for name in ("split", "frame_rate") if name in config.data}


def classes_of(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The classes of what data.source names. Raises as `sources.open_source`."""
    return open_source(config.data.source, **source_settings(config)).classes


def task_parts(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What of a batch a task reads."""
    return {name: values for name, values in batch.items() if name.split("/")[0] in BATCH_PARTS}


def abstract_batch(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    *,
    text: bool,
    given: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    beside: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and placement of a global batch, with the tokens of a prompt where the student is told by `text`.

    `given`, {name: (shape of a row, dtype)}, is what batches hold instead that were computed before (`Source.given`);
    `beside`, likewise, what they hold as well (`Source.beside`).
    """
    b, d = config.batch_size, config.data
    batch = {"video": ((b, d.num_frames, d.height, d.width, 3), np.uint8), "label": ((b,), np.int32)}
    if text:
        batch["tokens"] = (b, config.text.tokens), np.int32
    if given:
        batch = {"label": batch["label"]} | {k: ((b, *shape), jnp.dtype(dtype)) for k, (shape, dtype) in given.items()}
    batch |= {k: ((b, *shape), jnp.dtype(dtype)) for k, (shape, dtype) in (beside or {}).items()}
    rows = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in batch.items()}


def held_out_size(config: ml_collections.ConfigDict, mesh: Mesh | AbstractMesh, clips: int) -> int:
    """How many rows the batches have in which a run looks at its held-out `clips`: as few as the mesh allows.

    They can be spread over the mesh, and are never more than a training step holds at once.
    """
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    batches = math.ceil(clips / (config.batch_size // config.optimizer.grad_accum))
    return math.ceil(clips / (batches * rows)) * rows


def split_batch(batch: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """A batch in parts of `size` rows; the last part takes rows of the first again, so that all shapes are equal.

    `repeated` in each says which those are: always the last, and what is measured on them does not count
    (`counted`).
    """
    count = len(batch["video"])
    parts = [np.arange(k, k + size) for k in range(0, count, size)]
    return [
        {name: values[rows % count] for name, values in batch.items()} | {REPEATED: rows >= count} for rows in parts
    ]


def counted(batch: Mapping[str, np.ndarray]) -> int:
    """How many rows of a batch, from the first on, count: all that `split_batch` did not repeat."""
    return len(batch["video"]) - int(np.sum(batch.get(REPEATED, 0)))
