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
from jaxtyping import Array, Float, Int, UInt8

from jaxalign.diffusion import VPrediction, dynamic_guidance, guided, sample
from jaxalign.models import lora
from jaxalign.models.lora import LoRA
from jaxalign.models.placement import gathered
from jaxalign.tasks import aligning
from jaxalign.tasks.aligning import Alignment, cast

# {'codec': codec, 'teachers': {name: teacher}} and, for a student that is told by text, {'text': encoder,
# 'null_prompt': the empty prompt as token ids [n] or embeddings [n, d]}, with LoRA {'base': student}: jit arguments,
# never trained or saved
Frozen = dict[str, Any]
Trainable = dict[str, Any]  # {'model': student or adapters, 'heads': {alignment's name: Projector}}


@dataclasses.dataclass(frozen=True)
class DenoisingTask:
    """The static side of a run; `loss` and its kin are methods without state."""

    process: Any
    num_classes: int = 0
    class_dropout: float = 0.0
    text: bool = False  # told by text, else by label (or by nothing: num_classes 0)
    text_dropout: float | int = 0.0
    dtype: Any = jnp.float32  # compute dtype of the student and the heads; their masters are fp32
    alignments: tuple[Alignment, ...] = ()
    lora: LoRA | None = None  # then the student is frozen['base'] and adapters are trained in its place
    # Where clips [b, t, h, w, c] lie on a mesh: what student and teachers are fed, and the tapped tokens.
    place: Callable[[Array], Array] = lambda x: x

    @property
    def taps(self) -> tuple[int, ...]:
        """The depths that some alignment reads."""
        return tuple(sorted({depth for a in self.alignments for depth in a.taps}))

    def student(self, model, frozen: Frozen):
        """The network in the compute dtype, from what is trained of it: itself, or the adapters of its frozen base.

        Everything that asks the student goes through here.
        """
        model = cast(model, self.dtype)
        return model if self.lora is None else lora.combine(cast(frozen["base"], self.dtype), model, self.lora.scale)

    def loss(self, trainable: Trainable, frozen: Frozen, batch: dict, key, step, gates) -> tuple[Array, dict]:
        """(scalar, metrics) of one batch. Pure in its arguments.

        batch: video uint8 [b,t,h,w,3]; label int [b] or, told by text, tokens int [b,n]. What was computed before is
        taken if it is there: moments [b,s,i,j,2c] of the codec's posterior, prompt [b,n,d] (embeddings), tokens of
        teachers and motion saliency (`aligning.tokens_part`, `saliency_part`); with all of that there is no video.
        step: for the weights' schedules. gates: {name: state} of the alignments that have a cut-off by similarity.
        """
        denoising, tapped, video = self._denoise(trainable, frozen, batch, key)
        aligned, metrics = self._aligned(trainable, frozen, batch, tapped, video, step, gates)
        denoising = jnp.mean(denoising)
        return denoising + aligned, {"denoising": denoising, **metrics}

    def denoising_loss(self, trainable, frozen, batch, key, step, gates) -> tuple[Array, dict]:
        """The first term of `loss` alone, with the same draws."""
        return jnp.mean(self._denoise(trainable, frozen, batch, key)[0]), {}

    def aligning_loss(self, trainable, frozen, batch, key, step, gates) -> tuple[Array, dict]:
        """The weighted alignment terms of `loss` alone, with the same draws."""
        _, tapped, video = self._denoise(trainable, frozen, batch, key)
        return self._aligned(trainable, frozen, batch, tapped, video, step, gates)

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
        taught = self._taught(frozen, batch, video)
        condition = self._condition(frozen, batch, None)

        def at(fraction):
            timesteps = self.process.timesteps_at(jnp.full(latents.shape[:1], fraction))
            predict, tapped = self._tapped(trainable, frozen, condition, self.taps)
            _, aux = self.process.loss_at(latents, noise, timesteps, predict)
            aligned = {
                a.name: aligning.distance(a, trainable["heads"], tapped, taught, video, batch, self.dtype)
                for a in self.alignments
            }
            return {"denoising": aux["mse"], **aligned}

        return jax.lax.map(at, fractions)

    def sample(self, model, frozen: Frozen, noise: Float[Array, "b t h w c"], condition, key, **options):
        """Videos [b, s, i, j, 3] in [-1, 1] from standard normal noise; arguments as `latents`."""
        return self.decode(frozen, self.latents(model, frozen, noise, condition, key, **options))

    def latents(
        self,
        model,
        frozen: Frozen,
        noise: Float[Array, "b t h w c"],
        condition: Int[Array, " b"] | Int[Array, "b n"] | Float[Array, "b n d"] | None,
        key,
        *,
        sampler: str = "",
        steps: int = 50,
        guidance_scale: float | int = 1.0,
        dynamic_guidance: bool = False,
    ) -> Float[Array, "b t h w c"]:
        """Latents from standard normal noise, told as the student is: labels, token ids, or embeddings.

        dynamic_guidance: `diffusion.dynamic_guidance` of that scale. Raises ValueError for a sampler that does not fit
        the process, or guidance of an unconditional student.
        """
        model = self.student(model, frozen)

        def conditional(x_t, timesteps, condition):
            return model(self.place(x_t.astype(self.dtype)), timesteps, condition)[0]

        null = None
        if self.text:
            condition = self._embed(frozen, condition)
            if guidance_scale != 1.0 or dynamic_guidance:
                null = jnp.broadcast_to(self._null_prompt(frozen), condition.shape)
        elif self.num_classes:
            null = jnp.full(noise.shape[:1], self.num_classes)
        else:
            condition = None
        if dynamic_guidance:
            guidance_scale = self._guidance_table(guidance_scale, steps)
        predict = guided(conditional, condition, null, guidance_scale)
        return sample(self.process, predict, noise, sampler=sampler or None, steps=steps, key=key)

    def decode(self, frozen: Frozen, latents: Float[Array, "b t h w c"]) -> Float[Array, "b s i j 3"]:
        """The videos of latents, in [-1, 1]."""
        return jnp.clip(gathered(frozen["codec"]).decode(latents).astype(jnp.float32), -1.0, 1.0)

    def student_tokens(self, trainable, frozen, batch, noise, fractions, depths: tuple[int, ...]) -> dict[int, Array]:
        """The raw tokens [b, t, h, w, d] after the blocks `depths`, no head, at given noise and times."""
        _, latents = encode(frozen, batch, key=None)
        predict, tapped = self._tapped(trainable, frozen, self._condition(frozen, batch, None), depths)
        self.process.loss_at(latents, noise, self.process.timesteps_at(fractions), predict)
        return tapped

    def compared_tokens(
        self, a: Alignment, trainable, frozen, batch, noise, fractions
    ) -> tuple[Float[Array, "b t h w d"], Float[Array, "b t h w e"]]:
        """The student's tokens behind their head and the target's, fp32, as alignment `a` compares them."""
        tapped = self.student_tokens(trainable, frozen, batch, noise, fractions, a.taps)
        student = aligning.behind_head(a, trainable["heads"], tapped, self.dtype)
        video, _ = encode(frozen, batch, key=None)
        target = aligning.target(a, aligning.ask_teachers([a], frozen["teachers"], video, batch), tapped)
        return student.astype(jnp.float32), target.astype(jnp.float32)

    def align(self, a: Alignment, heads: dict, tapped: dict[int, Array], frozen, batch) -> Float[Array, " b"]:
        """The distance of one alignment for given raw student tokens."""
        video, _ = encode(frozen, batch, key=None)
        taught = aligning.ask_teachers([a], frozen["teachers"], video, batch)
        return aligning.distance(a, heads, tapped, taught, video, batch, self.dtype)

    def _denoise(self, trainable, frozen, batch, key):
        codec_key, label_key, process_key = jax.random.split(key, 3)
        video, latents = encode(frozen, batch, codec_key)
        predict, tapped = self._tapped(trainable, frozen, self._condition(frozen, batch, label_key), self.taps)
        losses, _ = self.process.training_loss(process_key, latents, predict)
        return losses, tapped, video

    def _condition(self, frozen, batch, key) -> Int[Array, " b"] | Float[Array, "b n d"] | None:
        """What the student is told; with a key some of it is the null condition (the dropout that guidance asks)."""
        if self.text:
            told, null, dropout = batch["prompt"] if "prompt" in batch else batch["tokens"], None, self.text_dropout
        elif self.num_classes:
            told, null, dropout = batch["label"], self.num_classes, self.class_dropout
        else:
            return None
        if key is not None and dropout:
            dropped = jax.random.bernoulli(key, dropout, told.shape[:1])
            if self.text:  # ids by ids, before anything is encoded, or embeddings by embeddings
                floating = jnp.issubdtype(told.dtype, jnp.floating)
                null = self._null_prompt(frozen) if floating else frozen["null_prompt"]
            told = jnp.where(dropped.reshape(-1, *[1] * (told.ndim - 1)), null, told)
        return self._embed(frozen, told) if self.text else told

    def _embed(self, frozen, prompt) -> Float[Array, "b n d"]:
        """Embeddings in the compute dtype: of token ids by the frozen encoder, or as they are."""
        if not jnp.issubdtype(prompt.dtype, jnp.floating):
            prompt = jax.lax.stop_gradient(frozen["text"](prompt))
        return prompt.astype(self.dtype)

    def _null_prompt(self, frozen) -> Float[Array, "n d"]:
        """The embeddings of the empty prompt."""
        return self._embed(frozen, jnp.asarray(frozen["null_prompt"])[None])[0]

    def _guidance_table(self, guidance_scale, steps: int):
        if not isinstance(self.process, VPrediction):
            raise ValueError("sample.dynamic_guidance belongs to objective 'v'; leave it out")
        return dynamic_guidance(guidance_scale, steps, self.process.num_train_timesteps)

    def _taught(self, frozen, batch, video) -> dict[str, Array]:
        """The teachers' tokens; no video is needed where nothing is aligned, or all were asked before."""
        if not any(a.teachers for a in self.alignments):
            return {}
        asked = {name: self.place(x) for name, x in batch.items() if name.startswith(aligning.tokens_part(""))}
        video = None if video is None else self.place(video)
        return aligning.ask_teachers(self.alignments, frozen["teachers"], video, asked)

    def _tapped(self, trainable, frozen, condition, taps):
        """A predict(x_t, timesteps) for the process, and the dict that its one call fills with the tapped tokens."""
        model = self.student(trainable["model"], frozen)
        tokens: dict[int, Array] = {}

        def predict(x_t, timesteps):
            prediction, tapped = model(self.place(x_t.astype(self.dtype)), timesteps, condition, taps=taps)
            tokens.update({depth: self.place(x) for depth, x in tapped.items()})
            return prediction

        return predict, tokens

    def _aligned(self, trainable, frozen, batch, tapped, video, step, gates):
        """The weighted sum of the alignments' distances, and each distance and weight by name."""
        taught = self._taught(frozen, batch, video)
        total, metrics = 0.0, {}
        for a in self.alignments:
            distance = jnp.mean(aligning.distance(a, trainable["heads"], tapped, taught, video, batch, self.dtype))
            weight = a.weight(step)
            if a.name in gates:
                weight = weight * gates[a.name]["open"]
            total = total + weight * distance
            metrics |= {f"align/{a.name}": distance, f"align/{a.name}_weight": weight}
        return total, metrics


def pixels(video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
    """0..255 -> [-1, 1], fp32: what codecs and teachers are fed."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def encode(frozen: Frozen, batch: dict, key) -> tuple[Float[Array, "b t h w 3"] | None, Float[Array, "b s i j c"]]:
    """The batch's video in [-1, 1], fp32 (None: it has none), and its latents; no key: the codec's mean, no draw."""
    codec, video = gathered(frozen["codec"]), None
    if "video" in batch:
        video = pixels(batch["video"])
    latents = codec.sample(batch["moments"], key) if "moments" in batch else codec.encode(video, key)
    return video, jax.lax.stop_gradient(latents)
