"""From a resolved config to the objects of a run: student, task, frozen networks. Nothing is trained here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from jaxalign import codecs
from jaxalign.alignment.grids import Grid
from jaxalign.alignment.projector import SHARDING_RULES as HEAD_RULES
from jaxalign.diffusion import PROCESSES
from jaxalign.models import MODELS, Student
from jaxalign.tasks import aligning
from jaxalign.tasks.denoising import DenoisingTask
from jaxalign.training import alignments as alignments_lib

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config describes; `student_grid` is (t, h, w) in tokens."""

    task: DenoisingTask
    student: Student
    model_config: Any
    frozen: dict[str, Any]
    latent_shape: tuple[int, int, int, int]
    student_grid: Grid

    @property
    def sharding_rules(self) -> list:
        """Of the whole trainable tree: the heads' first, since a student's list may end with a rule for everything."""
        return [*HEAD_RULES, *self.student.sharding_rules]

    def init(self, key) -> dict[str, Any]:
        """Fresh trainable parameters. The student's keys do not depend on whether there is a head."""
        student_key, head_key = jax.random.split(key)
        model = self.student.model(self.model_config, rngs=nnx.Rngs(student_key))
        return {"model": model, "heads": aligning.init_heads(self.task.alignments, head_key)}


def build(config: ml_collections.ConfigDict, *, num_classes: int = 0) -> Run:
    """The run that a resolved config describes; `num_classes` is what the data source has.

    The teacher is loaded only if something is aligned. Raises ValueError or OSError, one line, for sizes that do not
    divide, grids that do not meet and weights that are not there.
    """
    student, sizes = _student(config)
    codec = codecs.load(config.codec.name, config.codec.weights or None)
    latent_shape = codec.latent_shape((config.data.num_frames, config.data.height, config.data.width))
    process = _process(config)
    classes = num_classes if config.model.num_classes == -1 else config.model.num_classes
    if classes and num_classes > classes:
        raise ValueError(
            f"config.model.num_classes = {classes}, but the source has {num_classes} classes; write -1 to take them all"
        )
    model_config = student.config(
        input_size=latent_shape[1:3],
        num_frames=latent_shape[0],
        patch_size=config.model.patch_size,
        in_channels=latent_shape[3],
        num_classes=classes,
        learn_sigma=process.learn_sigma,
        remat=config.remat,
        attention=config.attention,
        **sizes,
    )
    task = DenoisingTask(
        process=process, num_classes=classes, class_dropout=config.model.class_dropout, dtype=DTYPES[config.precision]
    )
    alignments, teachers = alignments_lib.build(config, model_config.grid, model_config.width, model_config.depth)
    task = dataclasses.replace(task, alignments=alignments)
    frozen = {
        "codec": codec,
        "teachers": {key: aligning.cast(teacher, task.dtype) for key, teacher in teachers.items()},
    }
    return Run(task, student, model_config, frozen, latent_shape, model_config.grid)


def _student(config):
    """The entry in MODELS and the sizes of the preset."""
    if config.model.name not in MODELS:
        raise ValueError(f"config.model.name = {config.model.name!r}: write one of {', '.join(MODELS)}")
    entry = MODELS[config.model.name]
    if not any(field.name == "num_classes" for field in dataclasses.fields(entry.config)):  # it is told by text
        raise ValueError(
            f"config.model.name = {config.model.name!r}: the network is there (jaxalign.models), but no data source "
            "gives the prompts that it is trained with; write vdit"
        )
    if config.model.preset not in entry.presets:
        raise ValueError(f"config.model.preset = {config.model.preset!r}: write one of {', '.join(entry.presets)}")
    return entry, entry.presets[config.model.preset]


def _process(config):
    options = {"ddpm": {"learn_sigma": config.learn_sigma}, "v": {"snr_shift": config.snr_shift}}
    return PROCESSES[config.objective](**options.get(config.objective, {}))
