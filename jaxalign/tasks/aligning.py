"""One alignment of a run: which tokens of the student meet which target, through what head, by which method."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.alignment.grids import Grid, pool_time, resample_time, resize_space
from jaxalign.alignment.methods import (
    AlignmentSettings,
    Cutoff,
    alignment_loss,
    cutoff_start,
    fuse_targets,
    similarity_cutoff,
)
from jaxalign.alignment.projector import Projector, ProjectorConfig
from jaxalign.models.placement import gathered


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Where the student is tapped, what head and target meet, by which method, how much it counts."""

    name: str
    method: str
    depth: int  # 0-based index of the tapped block
    grid: Grid  # (t, h, w) on which student and target meet
    teachers: tuple[str, ...]  # keys into frozen['teachers']; several are fused; none: the target is a deeper block
    head: ProjectorConfig | None  # None: the tapped tokens as they are
    settings: AlignmentSettings
    weight: Callable[[Array], Array]  # step -> weight
    teacher_depth: int | None = None  # the student's own block that is the target (LayerSync)
    pool_time: int = 1  # the teachers' frames after the first are averaged in groups of so many
    # The teachers' tokens are resized in space to the grid, and in time where it has a multiple of their frames.
    resize: bool = False
    cutoff: Cutoff | None = None  # shuts the weight off when the similarity is high enough

    @property
    def taps(self) -> tuple[int, ...]:
        """The student's blocks that this alignment reads."""
        return (self.depth,) if self.teacher_depth is None else (self.depth, self.teacher_depth)


def init_heads(alignments: Sequence[Alignment], key) -> dict[str, Projector]:
    """One fresh projector for each alignment that has a head, each from a key of its own position."""
    headed = [a for a in alignments if a.head is not None]
    keys = jax.random.split(key, max(len(headed), 1))
    return {a.name: Projector(a.head, rngs=nnx.Rngs(k)) for a, k in zip(headed, keys, strict=False)}


def init_gates(alignments: Sequence[Alignment]) -> dict[str, dict[str, Array]]:
    """The state of every cut-off by similarity before the first step: part of the train state, so it resumes."""
    return {a.name: cutoff_start() for a in alignments if a.cutoff is not None}


def update_gates(alignments: Sequence[Alignment], gates: dict, metrics: dict) -> dict:
    """The gates after a step whose metrics hold 'align/NAME', each alignment's distance; similarity is 1 − it."""
    cutoffs = {a.name: a.cutoff for a in alignments if a.name in gates}
    return {
        name: similarity_cutoff(gate, 1 - metrics[f"align/{name}"], cutoffs[name])[0] for name, gate in gates.items()
    }


def tokens_part(key: str) -> str:
    """What a batch calls the tokens of a teacher that was asked before."""
    return f"teacher/{key}"


def saliency_part(grid: Grid) -> str:
    """What a batch calls the motion saliency on a grid."""
    return f"saliency/{'x'.join(map(str, grid))}"


def ask_teachers(
    alignments: Sequence[Alignment],
    teachers: dict,
    video: Float[Array, "b t h w 3"] | None,
    asked: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """{key: tokens [b, t, h, w, d]} of each teacher that some alignment reads, asked once; no gradient.

    `asked` may hold, by `tokens_part`, tokens that were computed before; such a teacher is not asked.
    """
    keys = dict.fromkeys(key for a in alignments for key in a.teachers)
    known = {key: asked[tokens_part(key)] for key in keys if asked and tokens_part(key) in asked}
    # Folders may hold tokens in fp16 (precompute --dtype); the losses compute in fp32 and bf16.
    known = {key: x.astype(jnp.float32) if x.dtype == jnp.float16 else x for key, x in known.items()}
    return {key: jax.lax.stop_gradient(known[key] if key in known else gathered(teachers[key])(video)) for key in keys}


def target(a: Alignment, taught: dict[str, Array], tapped: dict[int, Array]) -> Float[Array, "b t h w d"]:
    """What alignment `a` draws the student to: its teachers' tokens on its grid, or its own deeper block."""
    if a.teacher_depth is not None:
        return jax.lax.stop_gradient(tapped[a.teacher_depth])
    tokens = [pool_time(taught[key], a.pool_time) for key in a.teachers]
    if a.resize:
        tokens = [resample_time(resize_space(x, a.grid[1:]), a.grid[0] // x.shape[1]) for x in tokens]
    return tokens[0] if len(tokens) == 1 else fuse_targets(tokens)


def behind_head(a: Alignment, heads: dict, tapped: dict[int, Array], dtype) -> Float[Array, "b t h w d"]:
    """The student's tokens as alignment `a` compares them; the head computes in `dtype`."""
    return tapped[a.depth] if a.head is None else cast(heads[a.name], dtype)(tapped[a.depth])


def distance(a: Alignment, heads: dict, tapped: dict, taught: dict, video, batch, dtype) -> Float[Array, " b"]:
    """The alignment's loss, one value a sample; 0 is perfect alignment. The batch may hold the saliency."""
    student = behind_head(a, heads, tapped, dtype)
    given = {"video": video, "saliency": batch.get(saliency_part(a.grid)), "settings": a.settings}
    return alignment_loss(a.method, student, target(a, taught, tapped), **given)


def cast(tree, dtype):
    """The floating leaves of a pytree in `dtype`; a no-op where they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
