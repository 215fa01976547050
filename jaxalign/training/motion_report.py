"""Is a motion subspace about motion? Ridge probes from it, and from as many directions of the raw tokens (PCA).

Asked of every token: the flow of its patch and the mean colour of it, once of the token alone and once of it and its
eight neighbours, for a single patch seldom tells where an edge came from. A subspace of motion tells the first better
and the second worse than the directions of the tokens that vary most: of one token's, and of all those together that
M_ψ's kernel sees, so that nothing is won by seeing more.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxalign.data import pipeline
from jaxalign.metrics.linear_probe import pca, r_squared, ridge
from jaxalign.tasks.denoising import pixels
from jaxalign.teachers.flow_layers import area_pool
from jaxalign.training import prompts
from jaxalign.training.data_settings import clip_settings, counted, split_batch
from jaxalign.training.evaluation import on_device
from jaxalign.training.mesh import fetch
from jaxalign.training.trained import Trained

TARGETS = ("flow", "colour")


def collect(opened: Trained, batches: Iterable[dict]) -> dict[str, np.ndarray]:
    """Everything a probe is fitted on, a row a token: tokens, window (all that M_ψ sees), motion, flow, colour.

    Clips that are there only to fill a batch are left out.
    """
    run, rows = opened.run, []
    t, h, w = run.student_grid
    side = run.model_config.kernel

    @jax.jit
    def look(model, frozen, batch):
        tokens = run.task.tokens(frozen, batch).astype(jnp.float32)
        motion, _, flow = run.task.predict(model, frozen, batch)
        video = pixels(batch["video"])
        per_token = video.shape[1] // t
        seen = area_pool(video[:, video.shape[1] - t * per_token :], (h, w))  # a teacher may leave out the first frame
        colour = seen.reshape(seen.shape[0], t, per_token, h, w, 3).mean(axis=2)
        edge = (side // 2, side // 2)
        around = jnp.pad(tokens, ((0, 0), (1, 1), edge, edge, (0, 0)))
        places = [(k, i, j) for k in range(3) for i in range(side) for j in range(side)]
        window = jnp.concatenate([around[:, k : k + t, i : i + h, j : j + w] for k, i, j in places], axis=-1)
        found = {"tokens": tokens, "window": window, "motion": motion, "colour": colour}
        found["flow"] = area_pool(flow, (h, w))
        return {name: x.reshape(len(x), -1, x.shape[-1]) for name, x in found.items()}

    for batch in batches:
        found = fetch(look(opened.trainable["model"], run.frozen, on_device(batch)))
        rows.append({name: x[: counted(batch)].reshape(-1, x.shape[-1]) for name, x in found.items()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def measure(opened: Trained, *, clips: int) -> list[dict]:
    """A row a kind of features: its width and the R² of flow and colour on `clips` held-out clips.

    Probes and PCA are fitted on twice as many training clips. Raises ValueError for too few of them.
    """
    config = opened.config
    size = min(config.batch_size, clips)
    source, clip = prompts.open_told(config), clip_settings(config)
    train = pipeline.batches(source, seed=config.seed + 1, batch_size=size, **clip)
    fitted = collect(opened, (train[k] for k in range(-(-2 * clips // size))))
    held = collect(opened, split_batch(pipeline.held_out(source, clips, **clip), size))
    width = opened.run.model_config.width
    features = {"motion subspace M": (fitted["motion"], held["motion"])}
    side = opened.run.model_config.kernel
    seen = "three frames' tokens" if side == 1 else f"three frames' {side}x{side} tokens"
    for name, part in (("PCA of the teacher's tokens", "tokens"), (f"PCA of {seen}", "window")):
        project = pca(fitted[part], min(width, fitted[part].shape[1]))
        features[name] = project(fitted[part]), project(held[part])
    rows, grid = [], opened.run.student_grid[1:]
    for name, (x, x_held) in features.items():
        row = {"features": name, "width": x.shape[1]}
        for reach, suffix in ((lambda x: x, ""), (lambda x: with_neighbours(x, grid), ", 3x3")):
            probes = ridge(reach(x), np.concatenate([fitted[target] for target in TARGETS], axis=1))(reach(x_held))
            parts = np.split(probes, [fitted[TARGETS[0]].shape[1]], axis=1)
            row |= {f"R² of {t}{suffix}": r_squared(held[t], p) for t, p in zip(TARGETS, parts, strict=True)}
        rows.append(row)
    return rows


def with_neighbours(x: Float[np.ndarray, "n d"], grid: tuple[int, int]) -> Float[np.ndarray, "n k"]:
    """Every token with the eight around it in its frame, side by side, zeros outside; rows are frames of `grid`."""
    h, w = grid
    padded = np.pad(x.reshape(-1, h, w, x.shape[1]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.concatenate(around, axis=-1).reshape(len(x), -1)
