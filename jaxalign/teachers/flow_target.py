"""MoAlign's flow target: what its motion subspace is trained to predict from a teacher's tokens (methods.md §4).

The paper does not say at which resolution and scale the flow is compared; that is chosen here: one flow for every token
frame, in fractions of the frame's sides, pooled as far as the grid keeps at least 40x60 cells (480x720 gives that).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.teachers.flow_layers import area_pool

LEAST = (40, 60)


def flow_target(
    flow: Float[Array, "b t h w 2"], token_frames: int, *, least: tuple[int, int] = LEAST
) -> Float[Array, "b n i j 2"]:
    """Flow of all consecutive frames, in pixels -> one flow for each of n token frames, (u/w, v/h); fp32.

    A token frame of a video teacher is a tubelet of two frames and its target the mean of two pair flows. Which ones
    depends on the clip:
      2n flows (2n + 1 frames)   the teacher drops frame 0 (VideoMAEv2 at 49 frames sees 48, methods.md §2); the flow
                                 into the tubelet's first frame and the one inside it
      2n − 1 flows (2n frames)   the flow inside the tubelet and the one to the next; the last tubelet has no next
      n − 1 flows (n frames)     an image teacher's frame: the flow to the next; the last one has the flow into it
    Space is averaged over the area of the cells of `target_grid`. Raises ValueError for other numbers of flows.
    """
    b, t, h, w, _ = flow.shape
    if t == 0 or t not in (2 * token_frames, 2 * token_frames - 1, token_frames - 1):
        raise ValueError(
            f"flow_target: {token_frames} token frames of two frames each have {2 * token_frames - 1} flows between "
            f"frames, or {2 * token_frames} with the frame before them; got {t}"
        )
    flow = flow.astype(jnp.float32) / jnp.array([w, h], jnp.float32)
    frames = 1 if t == token_frames - 1 else 2
    if t < frames * token_frames:
        flow = jnp.concatenate([flow, flow[:, -1:]], axis=1)  # the mean of one flow is the flow
    flow = flow.reshape(b, token_frames, frames, h, w, 2).mean(axis=2)
    return area_pool(flow, target_grid((h, w), least=least))


def target_grid(frame: tuple[int, int], *, least: tuple[int, int] = LEAST) -> tuple[int, int]:
    """(rows, columns) of the target of frames (h, w): pooled by the largest whole number that leaves at least `least`.

    Frames that have less already are not pooled.
    """
    factor = max(1, min(side // cells for side, cells in zip(frame, least, strict=True)))
    return frame[0] // factor, frame[1] // factor
