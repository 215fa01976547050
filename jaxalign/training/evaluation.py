"""Measuring a student on held-out clips at fixed times and fixed noise, so that two runs meet the same questions."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.diffusion import fixed_times
from jaxalign.training.data_settings import counted, task_parts
from jaxalign.training.mesh import batch_sharding, fetch, put
from jaxalign.training.setup import Run


def fixed_noise(run: Run, first: int, count: int, seed: int = 0) -> jax.Array:
    """Standard normal noise [count, t, h, w, c] for the clips number first, first + 1, ...: one draw a clip."""
    root = jax.random.key(seed)
    draw = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(root, i), run.latent_shape))
    return draw(first + jnp.arange(count))


def on_device(batch: dict) -> dict:
    """The parts of a host batch that a task reads."""
    return {name: jnp.asarray(values) for name, values in task_parts(batch).items()}


def on_devices(tree, mesh: Mesh):
    """The arrays of a pytree, which every process has whole, with their rows spread over the mesh as a batch's are."""
    return put(tree, jax.tree.map(lambda _: batch_sharding(mesh), tree))


def make_held_out(run: Run):
    """The compiled `task.held_out`; keep it, for it compiles once."""
    return jax.jit(run.task.held_out)


def held_out_losses(
    run: Run,
    trainable,
    batches: Iterable[dict],
    *,
    times: int = 8,
    seed: int = 0,
    compiled=None,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Mean losses by time, {name: [times]}, over the clips of `batches` (equal sizes, so one compilation).

    Clips that are there only to fill a batch do not count. Times are the middles of `times` equal parts of the
    process, smallest noise first. `mesh`: where `trainable` lies, if not on one device; batches' sizes divide over it
    (`data_settings.held_out_size`). Raises ValueError without clips.
    """
    held_out = compiled or make_held_out(run)
    fractions = fixed_times(times)
    rows, clips = [], 0
    for batch in batches:
        noise = fixed_noise(run, clips, len(batch["video"]), seed)
        clips += len(batch["video"])
        asked = task_parts(batch), noise
        asked = jax.tree.map(jnp.asarray, asked) if mesh is None else on_devices(asked, mesh)
        found = fetch(held_out(trainable, run.frozen, *asked, fractions))
        rows.append({name: values[:, : counted(batch)] for name, values in found.items()})
    if not rows:
        raise ValueError("there is no held-out clip to evaluate on: give a source with a longer or another video")
    return {name: np.concatenate([row[name] for row in rows], axis=1).mean(axis=1) for name in rows[0]}


def summarise(losses: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over times of each loss, and denoising by third of the process (little, middling, much noise)."""
    means = {name: float(values.mean()) for name, values in losses.items()}
    if "denoising" not in losses:
        return means
    thirds = np.array_split(losses["denoising"], 3)
    return means | {f"denoising_{n}": float(v.mean()) for n, v in zip(("low", "mid", "high"), thirds, strict=True)}
