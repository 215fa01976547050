"""Training a video denoiser, alone or with its tokens aligned to frozen teachers: what such a run minimises.

    loss = L_denoising + Σ_k w_k(step) · gate_k · L_k(head_k(tokens after block d_k), target_k(video))

The only place where student and teacher meet. With no alignment in `DenoisingTask.alignments` nothing of it is
traced: the compiled program, the draws of every key and the parameters are those of the plain run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.diffusion import guided, sample
from jaxalign.tasks import aligning
from jaxalign.tasks.aligning import Alignment, cast

Frozen = dict[str, Any]  # {'codec': codec, 'teachers': {name: teacher}}: jit arguments, never trained or saved
Trainable = dict[str, Any]  # {'model': student, 'heads': {alignment's name: Projector}}


@dataclasses.dataclass(frozen=True)
class DenoisingTask:
    """The static side of a run; `loss` and its kin are methods without state."""

    process: Any
    num_classes: int = 0
    class_dropout: float = 0.0
    dtype: Any = jnp.float32  # compute dtype of the student and the heads; their masters are fp32
    alignments: tuple[Alignment, ...] = ()
    # Where clips [b, t, h, w, c] lie on a mesh: what student and teachers are fed, and the tapped tokens.
    place: Callable[[Array], Array] = lambda x: x

    @property
    def taps(self) -> tuple[int, ...]:
        """The depths that some alignment reads."""
        return tuple(sorted({depth for a in self.alignments for depth in a.taps}))

    def loss(self, trainable: Trainable, frozen: Frozen, batch: dict, key, step, gates) -> tuple[Array, dict]:
        """(scalar, metrics) of one batch: video uint8 [b,t,h,w,3], label int [b]. Pure in its arguments.

        step: for the weights' schedules. gates: {name: state} of the alignments that have a cut-off by similarity.
        """
        denoising, tapped, video = self._denoise(trainable, frozen, batch, key)
        aligned, metrics = self._aligned(trainable, frozen, tapped, video, step, gates)
        denoising = jnp.mean(denoising)
        return denoising + aligned, {"denoising": denoising, **metrics}

    def denoising_loss(self, trainable, frozen, batch, key, step, gates) -> tuple[Array, dict]:
        """The first term of `loss` alone, with the same draws."""
        return jnp.mean(self._denoise(trainable, frozen, batch, key)[0]), {}

    def aligning_loss(self, trainable, frozen, batch, key, step, gates) -> tuple[Array, dict]:
        """The weighted alignment terms of `loss` alone, with the same draws."""
        _, tapped, video = self._denoise(trainable, frozen, batch, key)
        return self._aligned(trainable, frozen, tapped, video, step, gates)

    def held_out(
        self,
        trainable: Trainable,
        frozen: Frozen,
        batch: dict,
        noise: Float[Array, "b t h w c"],
        fractions: Float[Array, " k"],
    ) -> dict[str, Float[Array, "k b"]]:
        """Losses of each sample at each of k times (fractions of the process in [0, 1]) under one given noise.

        No randomness. 'denoising' is the mean squared error (without the variance term of a learned range, so that
        objectives with and without it compare); an alignment is reported by its name.
        """
        video, latents = encode(frozen, batch, key=None)
        taught = aligning.ask_teachers(self.alignments, frozen["teachers"], self.place(video))

        def at(fraction):
            timesteps = self.process.timesteps_at(jnp.full(latents.shape[:1], fraction))
            predict, tapped = self._tapped(trainable, self._condition(batch, None), self.taps)
            _, aux = self.process.loss_at(latents, noise, timesteps, predict)
            aligned = {
                a.name: aligning.distance(a, trainable["heads"], tapped, taught, video, self.dtype)
                for a in self.alignments
            }
            return {"denoising": aux["mse"], **aligned}

        return jax.lax.map(at, fractions)

    def sample(
        self,
        model,
        frozen: Frozen,
        noise: Float[Array, "b t h w c"],
        labels: Int[Array, " b"] | None,
        key,
        *,
        sampler: str = "",
        steps: int = 50,
        guidance_scale: float = 1.0,
    ) -> Float[Array, "b s i j 3"]:
        """Videos in [-1, 1] from standard normal latents; labels where the student is class-conditional.

        Raises ValueError for a sampler that does not fit the process, or guidance of an unconditional student.
        """
        model = cast(model, self.dtype)

        def conditional(x_t, timesteps, condition):
            return model(x_t.astype(self.dtype), timesteps, condition)[0]

        null = jnp.full(noise.shape[:1], self.num_classes) if self.num_classes else None
        predict = guided(conditional, labels if self.num_classes else None, null, guidance_scale)
        latents = sample(self.process, predict, noise, sampler=sampler or None, steps=steps, key=key)
        return jnp.clip(frozen["codec"].decode(latents).astype(jnp.float32), -1.0, 1.0)

    def student_tokens(self, trainable, frozen, batch, noise, fractions, depths: tuple[int, ...]) -> dict[int, Array]:
        """The raw tokens [b, t, h, w, d] after the blocks `depths`, no head, at given noise and times."""
        _, latents = encode(frozen, batch, key=None)
        predict, tapped = self._tapped(trainable, self._condition(batch, None), depths)
        self.process.loss_at(latents, noise, self.process.timesteps_at(fractions), predict)
        return tapped

    def compared_tokens(
        self, a: Alignment, trainable, frozen, batch, noise, fractions
    ) -> tuple[Float[Array, "b t h w d"], Float[Array, "b t h w e"]]:
        """The student's tokens behind their head and the target's, fp32, as alignment `a` compares them."""
        tapped = self.student_tokens(trainable, frozen, batch, noise, fractions, a.taps)
        student = aligning.behind_head(a, trainable["heads"], tapped, self.dtype)
        video, _ = encode(frozen, batch, key=None)
        target = aligning.target(a, aligning.ask_teachers([a], frozen["teachers"], video), tapped)
        return student.astype(jnp.float32), target.astype(jnp.float32)

    def align(self, a: Alignment, heads: dict, tapped: dict[int, Array], frozen, batch) -> Float[Array, " b"]:
        """The distance of one alignment for given raw student tokens."""
        video, _ = encode(frozen, batch, key=None)
        taught = aligning.ask_teachers([a], frozen["teachers"], video)
        return aligning.distance(a, heads, tapped, taught, video, self.dtype)

    def _denoise(self, trainable, frozen, batch, key):
        codec_key, label_key, process_key = jax.random.split(key, 3)
        video, latents = encode(frozen, batch, codec_key)
        predict, tapped = self._tapped(trainable, self._condition(batch, label_key), self.taps)
        losses, _ = self.process.training_loss(process_key, latents, predict)
        return losses, tapped, video

    def _condition(self, batch, key) -> Int[Array, " b"] | None:
        """Labels, some replaced by the null label if there is a key (classifier-free guidance's dropout)."""
        if not self.num_classes:
            return None
        labels = batch["label"]
        if key is None or not self.class_dropout:
            return labels
        dropped = jax.random.bernoulli(key, self.class_dropout, labels.shape)
        return jnp.where(dropped, self.num_classes, labels)

    def _tapped(self, trainable, condition, taps):
        """A predict(x_t, timesteps) for the process, and the dict that its one call fills with the tapped tokens."""
        model = cast(trainable["model"], self.dtype)
        tokens: dict[int, Array] = {}

        def predict(x_t, timesteps):
            prediction, tapped = model(self.place(x_t.astype(self.dtype)), timesteps, condition, taps=taps)
            tokens.update({depth: self.place(x) for depth, x in tapped.items()})
            return prediction

        return predict, tokens

    def _aligned(self, trainable, frozen, tapped, video, step, gates):
        """The weighted sum of the alignments' distances, and each distance and weight by name."""
        taught = aligning.ask_teachers(self.alignments, frozen["teachers"], self.place(video))
        total, metrics = 0.0, {}
        for a in self.alignments:
            distance = jnp.mean(aligning.distance(a, trainable["heads"], tapped, taught, video, self.dtype))
            weight = a.weight(step)
            if a.name in gates:
                weight = weight * gates[a.name]["open"]
            total = total + weight * distance
            metrics |= {f"align/{a.name}": distance, f"align/{a.name}_weight": weight}
        return total, metrics


def encode(frozen: Frozen, batch: dict, key) -> tuple[Float[Array, "b t h w 3"], Float[Array, "b s i j c"]]:
    """The batch's video in [-1, 1], fp32, and its latents; no key: the codec's mean, no draw."""
    video = batch["video"].astype(jnp.float32) / 127.5 - 1.0
    return video, jax.lax.stop_gradient(frozen["codec"].encode(video, key))
