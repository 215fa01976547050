"""What the relation losses share: token norms, weights of frame pairs, checks of their arguments."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FRAME_WEIGHTS = ("full", "spatial", "temporal", "moalign")


def inverse_norm(tokens: Float[Array, "*axes d"]) -> Float[Array, "*axes"]:
    """1/‖x‖ of tokens [..., d], in fp32; 0 for a zero token, and with a zero gradient there.

    The root never sees the zero: `where` on its argument and on its result keeps NaN out of the gradient.
    """
    square = jnp.sum(jnp.square(tokens.astype(jnp.float32)), axis=-1)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def normalize(tokens: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
    """Tokens [..., d] at unit length, in fp32; a zero token stays zero and has zero gradient."""
    return tokens.astype(jnp.float32) * inverse_norm(tokens)[..., None]


def frame_weights(kind: str, t: int, tau: float = 10.0) -> np.ndarray:
    """W [t, t] for `relation_l1`: how much the mean over the token pairs of frames (f, g) counts.

    'full'      all N² pairs, one mean: 1/t² everywhere                            (TRD, methods.md §2)
    'spatial'   pairs inside a frame, one mean over those: 1/t on the diagonal     (TRD, spatial only)
    'temporal'  pairs of different frames, one mean over those; zero if t is 1     (TRD, temporal only)
    'moalign'   1/t on the diagonal plus exp(−|f − g|/tau)/t² off it               (MoAlign, §4)
    Raises ValueError for another kind, for t < 1 and, under 'moalign', for tau <= 0.
    """
    if t < 1:
        raise ValueError(f"frame_weights: t = {t}; there must be at least one frame")
    inside = np.eye(t, dtype=np.float32)
    if kind == "full":
        return np.full((t, t), 1 / t**2, np.float32)
    if kind == "spatial":
        return inside / t
    if kind == "temporal":
        return (1 - inside) / max(t * (t - 1), 1)
    if kind == "moalign":
        if not tau > 0:
            raise ValueError(f"frame_weights: tau = {tau}; it must be positive (MoAlign uses 10)")
        distance = np.abs(np.subtract.outer(np.arange(t), np.arange(t)))
        return (inside / t + (1 - inside) * np.exp(-distance / tau) / t**2).astype(np.float32)
    raise ValueError(f"frame_weights: no kind {kind!r}; there are {', '.join(FRAME_WEIGHTS)}")


def check_pair(student: Array, teacher: Array, name: str, *, same_width: bool = False) -> None:
    """Raise ValueError unless student and teacher are tokens [b, t, n, d] on one grid, fp32 or bf16."""
    for who, tokens in (("student", student), ("teacher", teacher)):
        if tokens.ndim != 4:
            raise ValueError(f"{name}: {who} has shape {tokens.shape}; expected tokens [b, t, n, d]")
        if tokens.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name}: {who} is {tokens.dtype}; cast the tokens to float32 or bfloat16")
        if 0 in tokens.shape:
            raise ValueError(f"{name}: {who} has shape {tokens.shape}; there are no tokens in it")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{name}: a student batch of {student.shape[0]}, a teacher batch of {teacher.shape[0]}")
    if student.shape[1:3] != teacher.shape[1:3]:
        raise ValueError(
            f"{name}: student grid (t, n) = {student.shape[1:3]}, teacher grid {teacher.shape[1:3]}; "
            "bring the student to the teacher's grid with a Projector, or resize the teacher's tokens"
        )
    if same_width and student.shape[3] != teacher.shape[3]:
        raise ValueError(
            f"{name}: student width {student.shape[3]}, teacher width {teacher.shape[3]}; a cosine between "
            "the two needs one width: give the student a Projector"
        )


def check_weights(weights, t: int) -> None:
    """Raise ValueError unless the frame weights are None or [t, t]."""
    if weights is not None and np.shape(weights) != (t, t):
        raise ValueError(f"relation_l1: frame_weights {np.shape(weights)}; expected [t, t] = {(t, t)}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"tempered_kl: temperature = {temperature}; it must be positive (TSA uses 0.1)")


def check_queries(queries: Array | None, tokens: Array) -> None:
    """Raise ValueError unless queries are None or int [b, t, k] inside a frame (this last outside jit only)."""
    if queries is None:
        return
    b, t, n, _ = tokens.shape
    if queries.ndim != 3 or queries.shape[:2] != (b, t) or queries.shape[2] < 1:
        raise ValueError(f"tempered_kl: queries {queries.shape}; expected [b, t, k] = [{b}, {t}, k >= 1]")
    if not jnp.issubdtype(queries.dtype, jnp.integer):
        raise ValueError(f"tempered_kl: queries are {queries.dtype}; expected integer positions in a frame")
    if not isinstance(queries, jax.core.Tracer):
        positions = np.asarray(queries)  # by NumPy, so that it can be done while something else is traced
        low, high = positions.min(), positions.max()
        if low < 0 or high >= n:
            raise ValueError(
                f"tempered_kl: queries span {low}..{high}, but a frame has the positions 0..{n - 1}; "
                "they count inside each frame (as select_queries gives them), not through the whole clip"
            )
