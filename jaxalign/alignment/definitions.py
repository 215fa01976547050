"""The relation losses as the papers write them, with the N×N matrices in memory.

They are what `relations` is tested and timed against, and the place to read what a loss means. For training
use `relations`: same values, same gradients, no N×N array.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.alignment.tokens import normalize


def similarity(tokens: Float[Array, "b t n d"]) -> Float[Array, "b t n t n"]:
    """All pairwise cosines A[i, j] = ⟨x_i, x_j⟩ of a clip: R in TSA's eq. (6)."""
    unit = normalize(tokens)
    return jnp.einsum("bfid,bgjd->bfigj", unit, unit, precision="highest")


def cosine_distance(student: Float[Array, "b t n d"], teacher: Float[Array, "b t n d"]) -> Float[Array, " b"]:
    """1 − mean over tokens of cos(teacher, student) (methods.md §1)."""
    teacher = jax.lax.stop_gradient(teacher)
    return 1 - jnp.mean(jnp.sum(normalize(student) * normalize(teacher), axis=-1), axis=(1, 2))


def relation_l1(
    student: Float[Array, "b t n d"],
    teacher: Float[Array, "b t n c"],
    *,
    frame_weights=None,
    margin: float = 0.0,
) -> Float[Array, " b"]:
    """Σ_{f,g} W[f,g] · mean_{i∈f, j∈g} relu(|A_s − A_r| − margin), W = 1/t² if None (methods.md §2, §4)."""
    t = student.shape[1]
    weights = jnp.full((t, t), 1 / t**2) if frame_weights is None else jnp.asarray(frame_weights)
    difference = similarity(student) - similarity(jax.lax.stop_gradient(teacher))
    excess = jax.nn.relu(jnp.abs(difference) - margin)
    return jnp.einsum("fg,bfg->b", weights, excess.mean(axis=(2, 4)), precision="highest")


def tempered_kl(
    student: Float[Array, "b t n d"],
    teacher: Float[Array, "b t n c"],
    *,
    temperature: float,
    queries: Int[Array, "b t k"] | None = None,
) -> Float[Array, " b"]:
    """Mean over query tokens i and frames f of KL(P_if teacher ‖ P_if student): TSA eq. (8), (9), (13)."""
    log_s = jax.nn.log_softmax(similarity(student) / temperature, axis=-1)
    log_r = jax.nn.log_softmax(similarity(jax.lax.stop_gradient(teacher)) / temperature, axis=-1)
    kl = jnp.sum(jnp.exp(log_r) * (log_r - log_s), axis=-1)  # [b, t, n, t]: each token against each frame
    if queries is not None:
        kl = jnp.take_along_axis(kl, queries[..., None], axis=2)
    return kl.mean(axis=(1, 2, 3))
