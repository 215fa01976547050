"""Training a video denoiser, alone or with its tokens aligned to frozen teachers: what such a run minimises.

    loss = L_denoising + Σ_k w_k(step) · L_k(head_k(tokens after block d_k), teacher_k(video))

The only place where student and teacher meet. With no alignment in `DenoisingTask.alignments` nothing of it is
traced: the compiled program, the draws of every key and the parameters are those of the plain run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxalign.alignment.methods import AlignmentSettings, alignment_loss
from jaxalign.alignment.projector import Projector, ProjectorConfig
from jaxalign.diffusion import guided, sample

Frozen = dict[str, Any]  # {'codec': codec, 'teachers': {name: teacher}}: jit arguments, never trained or saved
Trainable = dict[str, Any]  # {'model': student, 'heads': {alignment's name: Projector}}


@dataclasses.dataclass(frozen=True)
class Alignment:
    """One alignment: where the student is tapped, what head and teacher meet, by which method, how much it counts."""

    name: str
    method: str
    depth: int  # 0-based index of the tapped block
    teacher: str  # key into frozen['teachers']
    head: ProjectorConfig | None  # None: the tapped tokens as they are
    settings: AlignmentSettings
    weight: Callable[[Array], Array]  # step -> weight


@dataclasses.dataclass(frozen=True)
class DenoisingTask:
    """The static side of a run; `loss` and its kin are methods without state."""

    process: Any
    num_classes: int = 0
    class_dropout: float = 0.0
    dtype: Any = jnp.float32  # compute dtype of the student and the heads; their masters are fp32
    alignments: tuple[Alignment, ...] = ()

    @property
    def taps(self) -> tuple[int, ...]:
        """The depths that some alignment reads."""
        return tuple(sorted({a.depth for a in self.alignments}))

    def init_heads(self, key) -> dict[str, Projector]:
        """One fresh projector for each alignment, each from a key of its own name's position."""
        headed = [a for a in self.alignments if a.head is not None]
        keys = jax.random.split(key, max(len(headed), 1))
        return {a.name: Projector(a.head, rngs=nnx.Rngs(k)) for a, k in zip(headed, keys, strict=False)}

    def loss(self, trainable: Trainable, frozen: Frozen, batch: dict, key, step) -> tuple[Array, dict]:
        """(scalar, metrics) of one batch: video uint8 [b,t,h,w,3], label int [b]. Pure in its arguments."""
        denoising, tokens, video = self._denoise(trainable, frozen, batch, key)
        total, heads = jnp.mean(denoising), trainable["heads"]
        metrics = {"denoising": total}
        for a in self.alignments:
            distance = jnp.mean(self._align(a, heads, tokens[a.depth], self._target(a, frozen, video), video))
            weight = a.weight(step)
            total = total + weight * distance
            metrics |= {f"align/{a.name}": distance, f"align/{a.name}_weight": weight}
        return total, metrics

    def denoising_loss(self, trainable, frozen, batch, key, step) -> tuple[Array, dict]:
        """The first term of `loss` alone, with the same draws."""
        return jnp.mean(self._denoise(trainable, frozen, batch, key)[0]), {}

    def aligning_loss(self, trainable, frozen, batch, key, step) -> tuple[Array, dict]:
        """The weighted alignment terms of `loss` alone, with the same draws."""
        _, tokens, video = self._denoise(trainable, frozen, batch, key)
        total = 0.0
        for a in self.alignments:
            distance = self._align(a, trainable["heads"], tokens[a.depth], self._target(a, frozen, video), video)
            total = total + a.weight(step) * jnp.mean(distance)
        return total, {}

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
        targets = {a.name: self._target(a, frozen, video) for a in self.alignments}

        def at(fraction):
            timesteps = self.process.timesteps_at(jnp.full(latents.shape[:1], fraction))
            predict, tokens = self._tapped(trainable, self._condition(batch, None), self.taps)
            _, aux = self.process.loss_at(latents, noise, timesteps, predict)
            aligned = {
                a.name: self._align(a, trainable["heads"], tokens[a.depth], targets[a.name], video)
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
    ) -> Float[Array, "b t i j 3"]:
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

    def student_tokens(self, trainable, frozen, batch, noise, fractions, depth: int) -> Float[Array, "b t h w d"]:
        """The raw tokens after block `depth`, no head, at given noise and times."""
        _, latents = encode(frozen, batch, key=None)
        predict, tokens = self._tapped(trainable, self._condition(batch, None), (depth,))
        self.process.loss_at(latents, noise, self.process.timesteps_at(fractions), predict)
        return tokens[depth]

    def aligned_tokens(self, a: Alignment, trainable, frozen, batch, noise, fractions) -> Float[Array, "b t h w d"]:
        """The student's tokens as alignment `a` compares them: behind its head, fp32."""
        tokens = self.student_tokens(trainable, frozen, batch, noise, fractions, a.depth)
        return self._behind_head(a, trainable["heads"], tokens).astype(jnp.float32)

    def teacher_tokens(self, a: Alignment, frozen, batch) -> Float[Array, "b t h w d"]:
        """The teacher's tokens that alignment `a` compares with, fp32."""
        video, _ = encode(frozen, batch, key=None)
        return self._target(a, frozen, video).astype(jnp.float32)

    def align(self, a: Alignment, heads: dict, tokens: Float[Array, "b t h w d"], frozen, batch) -> Float[Array, " b"]:
        """The distance of one alignment for given raw student tokens."""
        video, _ = encode(frozen, batch, key=None)
        return self._align(a, heads, tokens, self._target(a, frozen, video), video)

    def _denoise(self, trainable, frozen, batch, key):
        codec_key, label_key, process_key = jax.random.split(key, 3)
        video, latents = encode(frozen, batch, codec_key)
        predict, tokens = self._tapped(trainable, self._condition(batch, label_key), self.taps)
        losses, _ = self.process.training_loss(process_key, latents, predict)
        return losses, tokens, video

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
            prediction, tapped = model(x_t.astype(self.dtype), timesteps, condition, taps=taps)
            tokens.update(tapped)
            return prediction

        return predict, tokens

    def _target(self, a: Alignment, frozen, video) -> Float[Array, "b t h w d"]:
        return jax.lax.stop_gradient(frozen["teachers"][a.teacher](video))

    def _align(self, a: Alignment, heads, tokens, target, video) -> Float[Array, " b"]:
        student = self._behind_head(a, heads, tokens)
        return alignment_loss(a.method, student, target, video=video, settings=a.settings)

    def _behind_head(self, a: Alignment, heads, tokens):
        return tokens if a.head is None else cast(heads[a.name], self.dtype)(tokens)


def encode(frozen: Frozen, batch: dict, key) -> tuple[Float[Array, "b t h w 3"], Float[Array, "b t h w c"]]:
    """The batch's video in [-1, 1], fp32, and its latents; no key: the codec's mean, no draw."""
    video = batch["video"].astype(jnp.float32) / 127.5 - 1.0
    return video, jax.lax.stop_gradient(frozen["codec"].encode(video, key))


def cast(tree, dtype):
    """The floating leaves of a pytree in `dtype`; a no-op where they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
