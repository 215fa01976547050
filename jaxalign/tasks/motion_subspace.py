"""MoAlign's stage 1 (methods.md §4): a low-dimensional subspace of a teacher's tokens from which flow can be read.

    S = teacher(video), frozen; M = M_ψ(S); loss = mean |F_ω(M) − O|, O the flow of each token frame (flow_target)

The subspace is what is kept (teachers/motion_head.py): stage 2 aligns a denoiser with it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.models.placement import gathered
from jaxalign.tasks.aligning import cast, tokens_part
from jaxalign.tasks.denoising import pixels
from jaxalign.teachers.flow_target import flow_target

FLOW_PART = "motion/flow"  # of a batch: flow between its frames [b, t-1, h, w, 2] in pixels
TARGET_PART = "motion/target"  # or the target itself, computed before [b, n, i, j, 2]


@dataclasses.dataclass(frozen=True)
class MotionSubspaceTask:
    """The static side of a run, with what the training loop asks of every task.

    trainable {'model': MotionSubspace, 'heads': {}}; frozen {'teachers': {teacher: network}} and, where flow is
    computed while training, {'flow': flow network}: jit arguments.
    """

    teacher: str  # key into frozen['teachers']
    token_frames: int
    smooth: float | int = 0.0  # errors below it, in fractions of the frame, count by their square (0: the paper's L1)
    dtype: Any = jnp.float32  # compute dtype; masters are fp32
    place: Callable[[Array], Array] = lambda x: x  # where clips lie on a mesh
    # What a denoiser may have beside its own loss, and this has not.
    alignments: tuple = ()
    lora: None = None
    text: bool = False
    num_classes: int = 0

    def tokens(self, frozen: dict, batch: dict) -> Float[Array, "b t h w d"]:
        """The teacher's tokens, out of the batch if it has them; no gradient."""
        part = tokens_part(self.teacher)
        if part in batch:
            return self.place(batch[part])
        teacher = gathered(frozen["teachers"][self.teacher])
        return jax.lax.stop_gradient(teacher(self.place(pixels(batch["video"]))))

    def target(self, frozen: dict, batch: dict) -> Float[Array, "b t i j 2"]:
        """The flow of every token frame in fractions of the frame's sides, fp32; no gradient."""
        if TARGET_PART in batch:
            return batch[TARGET_PART].astype(jnp.float32)
        flow = batch[FLOW_PART] if FLOW_PART in batch else self._computed_flow(frozen, batch)
        return jax.lax.stop_gradient(flow_target(flow, self.token_frames))

    def _computed_flow(self, frozen: dict, batch: dict) -> Float[Array, "b s h w 2"]:
        return gathered(frozen["flow"])(self.place(pixels(batch["video"])))

    def predict(
        self, model, frozen: dict, batch: dict
    ) -> tuple[Float[Array, "b t h w m"], Float[Array, "b t i j 2"], Float[Array, "b t i j 2"]]:
        """(motion subspace, predicted flow, true flow), the flows as in `target`."""
        motion, flow = cast(model, self.dtype)(self.tokens(frozen, batch).astype(self.dtype))
        return motion, flow, self.target(frozen, batch)

    def loss(self, trainable: dict, frozen: dict, batch: dict, key, step, gates) -> tuple[Array, dict]:
        """(mean |Ô − O|, rounded off below `smooth`, and metrics) of one batch; nothing is random."""
        _, predicted, true = self.predict(trainable["model"], frozen, batch)
        error = jnp.abs(predicted - true)
        l1 = jnp.mean(error)
        loss = l1 if not self.smooth else jnp.mean(smooth_l1(error, self.smooth))
        return loss, {"flow": l1, "end_point_error": jnp.mean(jnp.linalg.norm(predicted - true, axis=-1))}

    def held_out(self, trainable: dict, frozen: dict, batch: dict, noise, fractions) -> dict[str, Float[Array, "1 b"]]:
        """The loss of each sample and, to compare, that of predicting no motion; there is no noise and no time."""
        _, predicted, true = self.predict(trainable["model"], frozen, batch)
        mean = lambda x: jnp.mean(jnp.abs(x), axis=(1, 2, 3, 4))[None]  # noqa: E731
        return {"flow": mean(predicted - true), "flow_of_no_motion": mean(true)}


def smooth_l1(error: Float[Array, "*shape"], width: float | int) -> Float[Array, "*shape"]:
    """Errors with a rounded corner: error² / (2 width) below `width`, error − width / 2 above (Huber over width)."""
    return jnp.where(error < width, jnp.square(error) / (2 * width), error - width / 2)
