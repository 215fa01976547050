"""Where student meets teacher: three losses on tokens [b, t, n, d], one value a sample.

  cosine_distance  each token against the teacher's token of the same place         REPA, Align4Gen, SuRA
  relation_l1      |A_s − A_r| over all pairwise cosines A, weighted by frame pair   TRD, MoAlign
  tempered_kl      KL of the softmaxes of A/τ over each frame's positions            TSA; with queries M-TSA

`definitions` has them as plain formulas. Here A is never whole in memory: `sweep` visits it block by block
and forms the gradient on the way, `spread` deals the visits out to the devices of a mesh. All three normalise
inside, so pass tokens as they are; a zero token stays zero and gets a zero gradient. Products run in the
tokens' dtype and accumulate in fp32, all else is fp32. Student and teacher may differ in width in the last
two. The teacher's gradient is zero. When nobody differentiates, nothing of the gradient is computed.
Forward-mode and second derivatives of the last two do not exist.

On a mesh call the same functions: `spread` splits batch and work by the mesh that the tokens are on.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.alignment import spread, sweep, tokens


def cosine_distance(student: Float[Array, "b t n d"], teacher: Float[Array, "_ _ _ _"]) -> Float[Array, " b"]:
    """1 − mean over tokens of the cosine of student and teacher (REPA's loss plus 1, methods.md §1), fp32.

    Raises ValueError for grids, batches or widths that differ.
    """
    tokens.check_pair(student, teacher, "cosine_distance", same_width=True)
    teacher = jax.lax.stop_gradient(teacher)
    return 1 - jnp.mean(jnp.sum(tokens.normalize(student) * tokens.normalize(teacher), axis=-1), axis=(1, 2))


def relation_l1(
    student: Float[Array, "b t n d"],
    teacher: Float[Array, "_ _ _ _"],
    *,
    frame_weights: np.ndarray | Float[Array, "..."] | None = None,
    margin: float = 0.0,
) -> Float[Array, " b"]:
    """Σ_{f,g} W[f,g] · mean_{i∈f, j∈g} relu(|A_s − A_r| − margin), fp32: TRD (methods.md §2), MoAlign (§4).

    frame_weights: W [t, t], None for 1/t² (one mean over all N² pairs); `tokens.frame_weights` makes the
    papers'. W need not be symmetric (A is, so (W + Wᵀ)/2 is the same loss) and is not differentiated. Pairs
    of frames of weight 0 cost nothing, provided that W is a concrete array and no tracer. Raises ValueError
    for grids or batches that differ and for frame_weights that are not [t, t].
    """
    tokens.check_pair(student, teacher, "relation_l1")
    t, n = student.shape[1:3]
    tokens.check_weights(frame_weights, t)
    if frame_weights is None:
        frame_weights = np.full((t, t), 1 / t**2, np.float32)
    visited = None
    if not isinstance(frame_weights, jax.core.Tracer):
        visited = tuple(map(tuple, (np.asarray(frame_weights) != 0).tolist()))
    # A block counts (f, g) and (g, f) alike, and sums where the definition takes the mean.
    weights = jax.lax.stop_gradient(jnp.asarray(frame_weights, jnp.float32))
    weights = (weights + weights.T) / (2 * n**2)
    # Nothing here needs a whole frame, as a softmax does: a large one is swept as several short frames.
    pieces = sweep.choose_pieces(n)
    if pieces > 1:
        weights = weights.repeat(pieces, 0).repeat(pieces, 1)
        visited = visited and tuple(tuple(np.repeat(row, pieces).tolist()) for row in visited for _ in range(pieces))
    relation = Relation("l1", float(margin), t * pieces, n // pieces, visited)
    student, teacher = (x.reshape(len(x), relation.t, relation.n, -1) for x in (student, teacher))
    return _loss(relation, student, teacher, weights, None)


def tempered_kl(
    student: Float[Array, "b t n d"],
    teacher: Float[Array, "_ _ _ _"],
    *,
    temperature: float,
    queries: Int[Array, "..."] | None = None,
) -> Float[Array, " b"]:
    """Mean over query tokens i and frames f of KL(P_r ‖ P_s), P = softmax_{j∈f}(A_ij/τ), fp32: TSA eq. (8), (9).

    queries: int [b, t, k], positions inside each frame; only these tokens are rows i (M-TSA, eq. (13)), and a
    repeated one counts again. None: every token. Raises ValueError for grids or batches that differ, for
    temperature <= 0, for queries of a wrong shape or dtype and for queries outside 0 … n − 1. Under jit their
    values cannot be seen: there they are clamped.
    """
    tokens.check_pair(student, teacher, "tempered_kl")
    tokens.check_temperature(temperature)
    tokens.check_queries(queries, student)
    b, t, n, _ = student.shape
    rows = t * n if queries is None else t * queries.shape[2]
    weights = jnp.full((t, t), 1 / (rows * t), jnp.float32)
    if queries is not None:
        inside = jnp.clip(queries, 0, n - 1).astype(jnp.int32) + n * jnp.arange(t, dtype=jnp.int32)[:, None]
        queries = inside.reshape(b, rows)  # rows of the flat tokens
    return _loss(Relation("kl", float(temperature), t, n, None), student, teacher, weights, queries)


class Relation(NamedTuple):
    """What is static about a relation loss; equal ones share one compilation."""

    kind: str  # 'l1' or 'kl'
    strength: float  # the margin or the temperature
    t: int
    n: int
    visited: tuple[tuple[bool, ...], ...] | None  # pairs of frames that count; None for all

    def block(self, a_s, a_r, weights, *, both: bool, share: sweep.Share | None):
        """Value [b] and slope of one block of cosines [b, F, i, G, j]; see `sweep`."""
        function = {"l1": _l1_block, "kl": _kl_block}[self.kind]
        return function(self.strength, a_s, a_r, weights, both, share)


def _l1_block(margin, a_s, a_r, weights, both, share):
    """Σ w·relu(|A_s − A_r| − margin); the slope is w·sign(A_s − A_r) beyond the margin, 0 within it."""
    difference = a_s - a_r
    excess = jnp.abs(difference) - margin
    weights = 2 * weights if both else weights
    weights = weights if share is None else weights * share.real
    value = jnp.sum(weights * jnp.maximum(excess, 0), axis=(1, 2, 3, 4))
    return value, jnp.where(excess > 0, weights * jnp.sign(difference), 0)


def _kl_block(temperature, a_s, a_r, weights, both, share):
    """Σ w·KL(P_r ‖ P_s), P over j in each column frame (and, for `both`, over i in each row frame).

    The slope is w·(P_s − P_r)/τ, TSA's eq. (10). A softmax wants its maximum taken off before the
    exponential. Cosines never exceed 1, so as long as exp(−2/τ) is a normal fp32 number, 1 will do for all of
    them, and both directions share their exponentials.
    """
    bounded = 2 / temperature < 80
    mine = weights if share is None else weights * share.real
    value, slope = 0.0, 0.0
    for axis in (4, 2) if both else (4,):
        total, highest = (functools.partial(f, axis=axis, keepdims=True) for f in (jnp.sum, jnp.max))
        counted = mine
        if axis == 2 and share is not None:  # a column goes on over all devices, and each counts its part of it
            total, highest, counted = share.sum, share.max, weights / share.parts
        top_s, top_r = (1.0 if bounded else highest(a) for a in (a_s, a_r))
        e_s, e_r = jnp.exp((a_s - top_s) / temperature), jnp.exp((a_r - top_r) / temperature)
        z_s, z_r = total(e_s), total(e_r)
        gap = total(e_r * (a_r - a_s)) / z_r  # Σ P_r (A_r − A_s)
        kl = (gap + top_s - top_r) / temperature + jnp.log(z_s / z_r)
        value += jnp.sum(counted * kl, axis=(1, 2, 3, 4))
        slope += e_s * (1 / z_s) - e_r * (1 / z_r)
    return value, slope * (mine / temperature)


@functools.partial(jax.jit, static_argnums=0)  # so that calls outside of jit compile once
def _loss(relation: Relation, student, teacher, weights, queries):
    axes = spread.mesh_axes(student)
    fill = -(relation.t * relation.n) % axes.parts  # every device holds equally many rows

    def flat(x):
        return jnp.pad(x.reshape(x.shape[0], -1, x.shape[3]), ((0, 0), (0, fill), (0, 0)))

    return _value(relation, axes, flat(student), flat(jax.lax.stop_gradient(teacher)), weights, queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _value(relation, axes, student, teacher, weights, queries):
    return spread.sweep_on_mesh(relation, axes, False, student, teacher, weights, queries)[0]


def _value_forward(relation, axes, student, teacher, weights, queries):
    # One value a sample: its gradient is known now, up to the factor that the backward pass brings.
    return spread.sweep_on_mesh(relation, axes, True, student, teacher, weights, queries)


def _value_backward(relation, axes, gradient, cotangent):
    return (cotangent[:, None, None] * gradient).astype(gradient.dtype), None, None, None


_value.defvjp(_value_forward, _value_backward)
