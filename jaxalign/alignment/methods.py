"""The named alignment losses: which relation function is called how, and how much a loss counts when."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jaxalign.alignment.relations import cosine_distance, relation_l1, tempered_kl
from jaxalign.alignment.saliency import motion_saliency, select_queries
from jaxalign.alignment.tokens import frame_weights, normalize


@dataclasses.dataclass(frozen=True)
class AlignmentSettings:
    """Static settings; each method reads those that name it."""

    temperature: float = 0.1  # tsa, m_tsa: τ, the best of the paper's ablation
    mask_ratio: float = 0.2  # m_tsa: share of a frame's positions that are queries
    margin: float = 0.1  # trd: smaller differences of cosines cost nothing
    part: str = "full"  # trd: 'full', 'spatial' or 'temporal' pairs
    tau: float = 10.0  # moalign: decay of the weight with the distance of two frames
    neighbour: int = 1  # crepa: distance d of the two neighbour frames
    neighbour_tau: float = 1.0  # crepa: their weight is exp(−d/τ)
    mean_share: float = 0.6  # irepa: share of a frame's mean that is taken off the teacher's tokens


# Each method takes tokens[b, t, h, w, d] of student and teacher on one grid, saliency[b, t, h, w] (or None) and the
# settings, and returns one value a sample, 0 for perfect alignment. Sections are methods.md's.


def repa(student, teacher, saliency, settings):
    """REPA (§1), Align4Gen (§5), SuRA (§6): 1 − mean cosine."""
    return cosine_distance(_flat(student), _flat(teacher))


def irepa(student, teacher, saliency, settings):
    """iREPA (§1): the cosine, the teacher's tokens normalised per channel over the positions of a frame.

    It is iREPA whole with a convolution for a head: ProjectorConfig(hidden=0, conv="frame").
    """
    teacher = _flat(teacher).astype(jnp.float32)
    mean, std = teacher.mean(axis=2, keepdims=True), teacher.std(axis=2, keepdims=True)
    return cosine_distance(_flat(student), (teacher - settings.mean_share * mean) / (std + 1e-6))


def crepa(student, teacher, saliency, settings):
    """CREPA (§1): frame f against the teacher's frame f and, by exp(−d/τ), against its frames f ± d."""
    if settings.neighbour < 1 or not settings.neighbour_tau > 0:
        raise ValueError(
            f"crepa: align.neighbour = {settings.neighbour} and align.neighbour_tau = {settings.neighbour_tau}; write "
            "a distance of 1 frame or more and a positive decay (the paper: 1 and 1.0)"
        )
    student, teacher = _flat(student), _flat(teacher)
    t, d = student.shape[1], settings.neighbour
    loss = cosine_distance(student, teacher)
    if d < t:
        # Each mean is over the t − d frames that have such a neighbour; the sum over frames is divided by t.
        weight = np.exp(-d / settings.neighbour_tau) * (t - d) / t
        loss += weight * cosine_distance(student[:, d:], teacher[:, :-d])
        loss += weight * cosine_distance(student[:, :-d], teacher[:, d:])
    return loss


def trd(student, teacher, saliency, settings):
    """TRD of VideoREPA (§2): mean over token pairs of relu(|A_s − A_r| − margin)."""
    weights = frame_weights(settings.part, student.shape[1])
    return relation_l1(_flat(student), _flat(teacher), frame_weights=weights, margin=settings.margin)


def moalign(student, teacher, saliency, settings):
    """MoAlign's stage 2 (§4): spatial plus soft temporal term, no margin; teacher: the motion subspace."""
    weights = frame_weights("moalign", student.shape[1], settings.tau)
    return relation_l1(_flat(student), _flat(teacher), frame_weights=weights)


def tsa(student, teacher, saliency, settings):
    """TSA (§3, eq. 9): KL between tempered correspondence distributions, every token a query."""
    return tempered_kl(_flat(student), _flat(teacher), temperature=settings.temperature)


def m_tsa(student, teacher, saliency, settings):
    """M-TSA (§3, eq. 13): TSA with the most moving positions of every frame as queries."""
    queries = select_queries(saliency, settings.mask_ratio)
    return tempered_kl(_flat(student), _flat(teacher), temperature=settings.temperature, queries=queries)


METHODS: dict[str, Callable] = {
    "repa": repa,
    "irepa": irepa,
    "crepa": crepa,
    "layersync": repa,  # the teacher is a deeper block of the student itself
    "align4gen": repa,  # the teacher is fuse_targets([DINOv2's tokens, SAM2's tokens])
    "trd": trd,
    "moalign": moalign,
    "tsa": tsa,
    "m_tsa": m_tsa,
}

# These compare relations between tokens, not tokens: student and teacher may differ in width.
RELATIONAL = ("trd", "moalign", "tsa", "m_tsa")


def alignment_loss(
    method: str,
    student: Float[Array, "b t h w d"],
    teacher: Float[Array, "_ _ _ _ _"],
    *,
    video: Float[Array, "_ _ _ _ 3"] | None = None,
    saliency: Float[Array, "b t h w"] | None = None,
    settings: AlignmentSettings | None = None,
) -> Float[Array, " b"]:
    """A named method's loss, one value a sample, on tokens [b, t, h, w, d]; the teacher gets no gradient.

    video: [b, T, H, W, 3] in [−1, 1], read by 'm_tsa' only, and not even then where its `motion_saliency` is given.
    settings: None for the papers' values. Raises ValueError for an unknown method, for grids or batches that differ,
    and for 'm_tsa' without video.
    """
    if method not in METHODS:
        raise ValueError(f"alignment_loss: no method {method!r}; there are {', '.join(METHODS)}")
    if teacher.shape[:4] != student.shape[:4]:
        raise ValueError(
            f"alignment_loss({method!r}): student tokens {student.shape}, teacher tokens {teacher.shape}; "
            "[b, t, h, w] must be equal: give the student a Projector or resize the teacher's tokens"
        )
    if method == "m_tsa" and saliency is None:
        if video is None:
            raise ValueError("alignment_loss('m_tsa') finds its queries in the pixels: give it video=")
        saliency = motion_saliency(video, student.shape[1:4])
    teacher = jax.lax.stop_gradient(teacher)
    return METHODS[method](student, teacher, saliency, settings or AlignmentSettings())


def fuse_targets(teachers: list[Float[Array, "..."]]) -> Float[Array, "..."]:
    """Align4Gen's target (§5): each teacher's tokens at unit length, then side by side in channels; fp32.

    Raises ValueError for teachers on different grids.
    """
    grids = sorted({teacher.shape[:-1] for teacher in teachers})
    if len(grids) != 1:
        raise ValueError(f"fuse_targets: teachers on different grids {grids}; bring them to one (grids.py)")
    return jnp.concatenate([normalize(teacher) for teacher in teachers], axis=-1)


def weight_schedule(
    kind: str, *, weight: float, steps: int = 0, warmup: int = 0, cutoff: int = 0
) -> Callable[[int | Array], Float[Array, ""]]:
    """The alignment's weight as a function of the step (methods.md §1).

    'constant'  weight
    'linear'    falls in a straight line to 0 at `steps`
    'cosine'    falls by half a cosine to 0 at `steps`
    'cutoff'    weight before step `cutoff`, 0 from there on
    Each rises linearly over the first `warmup` steps, and the two decays begin where that ends.
    Raises ValueError for another kind, for a decay without steps > warmup and for 'cutoff' without a cutoff.
    """
    shapes = {
        "constant": lambda step: 1.0,
        "linear": lambda step: 1 - _progress(step, warmup, steps),
        "cosine": lambda step: 0.5 + 0.5 * jnp.cos(jnp.pi * _progress(step, warmup, steps)),
        "cutoff": lambda step: step < cutoff,
    }
    if kind not in shapes:
        raise ValueError(f"weight_schedule: no kind {kind!r}; there are {', '.join(shapes)}")
    if kind in ("linear", "cosine") and steps <= warmup:
        raise ValueError(f"weight_schedule({kind!r}): steps = {steps}, but warmup = {warmup}; give more steps")
    if kind == "cutoff" and cutoff <= 0:
        raise ValueError(f"weight_schedule('cutoff'): cutoff = {cutoff}; give the first step of weight 0")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / (warmup + 1))
        return jnp.asarray(weight * rise * shapes[kind](step), jnp.float32)

    return schedule


@dataclasses.dataclass(frozen=True)
class Cutoff:
    """Shuts an alignment off once the running mean of its similarity (1 − distance) has reached `threshold`.

    permanent: for ever; else it comes back when the mean falls below the threshold again (methods.md §1).
    """

    threshold: float
    decay: float = 0.99  # of the running mean, which begins at 0
    permanent: bool = True


def similarity_cutoff(
    state: dict[str, Array], similarity: Float[Array, ""], cutoff: Cutoff
) -> tuple[dict[str, Array], Float[Array, ""]]:
    """The state after a step of this similarity, and the factor 0 or 1 of the weight from there on.

    state: {'mean', 'open'}, begun as `cutoff_start` and kept in the train state; pure, so it resumes as it was.
    """
    mean = cutoff.decay * state["mean"] + (1 - cutoff.decay) * similarity
    is_open = jnp.where(mean < cutoff.threshold, state["open"] if cutoff.permanent else 1.0, 0.0)
    return {"mean": mean, "open": is_open}, is_open


def cutoff_start() -> dict[str, Array]:
    """The state before the first step: a mean of 0, below any sensible threshold, and the weight on."""
    return {"mean": jnp.zeros(()), "open": jnp.ones(())}


def _progress(step, start, end):
    return jnp.clip((step - start) / (end - start), 0, 1)


def _flat(tokens):
    return rearrange(tokens, "b t h w d -> b t (h w) d")
