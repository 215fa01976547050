"""From a resolved config to a run of the task motion_subspace (MoAlign's stage 1), its data, and what it leaves behind.

config.teacher is the video teacher and config.motion says how wide things are and where flow comes from. Sections of
a denoiser (model, codec, text, align, sample, ...) are not read.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxalign import teachers
from jaxalign.data import host_flow
from jaxalign.models import Student
from jaxalign.models import motion as motion_models
from jaxalign.models.motion import MotionConfig, MotionSubspace
from jaxalign.tasks.aligning import tokens_part
from jaxalign.tasks.motion_subspace import FLOW_PART, TARGET_PART, MotionSubspaceTask
from jaxalign.teachers import motion_head, raft, sea_raft
from jaxalign.teachers.flow_target import target_grid

TASK = "motion_subspace"  # config.task
ON_HOST = {"exact": host_flow.exact, "dis": host_flow.dis}
FLOW_NETWORKS = (*raft.PRESETS, *sea_raft.PRESETS)

# The trained module as an entry of MODELS, which a denoiser's students are.
ENTRY = Student(MotionConfig, MotionSubspace, motion_models.SHARDING_RULES, lambda config: (), {})


def is_subspace(config: ml_collections.ConfigDict) -> bool:
    """Whether a config, also one of before there were tasks, is of this task."""
    return config.get("task", "denoising") == TASK


def parts(
    config: ml_collections.ConfigDict, *, abstract: bool = False, given: Collection[str] = ()
) -> tuple[MotionSubspaceTask, MotionConfig, dict[str, Any]]:
    """(task, settings of what is trained, frozen networks); `abstract` and `given` as in `setup.build`.

    Raises ValueError or OSError, one line, for a teacher or a flow that is not there or does not fit the clips.
    """
    m, clip = config.motion, (config.data.num_frames, config.data.height, config.data.width)
    if config.align.method != "none":
        raise ValueError(f"config.task = {TASK!r} aligns nothing: write --config.align.method=none")
    if m.flow.name not in (*ON_HOST, *FLOW_NETWORKS):
        raise ValueError(
            f"config.motion.flow.name = {m.flow.name!r}: write one of {', '.join((*ON_HOST, *FLOW_NETWORKS))}"
        )
    name, weights, settings = _asked(config)
    teacher = teachers.abstract(name, weights, **settings)
    if name in FLOW_NETWORKS:
        raise ValueError(f"config.teacher.name = {name!r} gives flow, not tokens; name a teacher of tokens")
    grid = teacher.grid(clip)
    flow_grid = target_grid(clip[1:])
    _check_frames(clip[0], grid[0])
    frozen: dict[str, Any] = {"teachers": {}}
    load = teachers.abstract if abstract else teachers.load
    if tokens_part(name) not in given:
        frozen["teachers"][name] = load(name, weights or None, **settings)
    if m.flow.name in FLOW_NETWORKS and TARGET_PART not in given:
        flow, flow_weights, own = asked_flow(config)
        frozen["flow"] = load(flow, flow_weights or None, **own)
    sizes = {name: m[name] for name in ("hidden", "width", "kernel", "norm", "decoder", "unit") if name in m}
    return MotionSubspaceTask(name, grid[0], m.smooth), MotionConfig(teacher.width, grid, flow_grid, **sizes), frozen


def token_frames(config: ml_collections.ConfigDict) -> int:
    """How many token frames config.teacher makes of a clip."""
    name, weights, settings = _asked(config)
    clip = config.data.num_frames, config.data.height, config.data.width
    return teachers.abstract(name, weights, **settings).grid(clip)[0]


def asked_flow(config: ml_collections.ConfigDict) -> tuple[str, str, dict[str, Any]]:
    """(name, weights, settings that are given) of config.motion.flow."""
    section = config.motion.flow.to_dict()
    name, weights = section.pop("name"), section.pop("weights")
    return name, weights, _tuples({k: v for k, v in section.items() if v is not None})


def _asked(config) -> tuple[str, str, dict[str, Any]]:
    """(name, weights, settings) of config.teacher."""
    section = config.teacher.to_dict()
    if section.pop("beside"):
        raise ValueError(f"config.task = {TASK!r} has one teacher: leave config.teacher.beside empty")
    if section.pop("motion_head", None) is not None:
        raise ValueError(f"config.task = {TASK!r} trains the head: leave config.teacher.motion_head out")
    name, weights = section.pop("name"), section.pop("weights")
    return name, weights, _tuples({k: v for k, v in section.items() if v is not None})


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    # JSON, as a config read back from a workdir has it, makes lists of tuples.
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def _check_frames(frames: int, token_frames: int) -> None:
    flows = frames - 1
    if flows < 1 or flows not in (2 * token_frames, 2 * token_frames - 1, token_frames - 1):
        raise ValueError(
            f"config.data.num_frames = {frames}, of which the teacher makes {token_frames} token frames: a flow can be "
            "given to each where a token is of one frame or of two"
        )


def beside(config: ml_collections.ConfigDict) -> dict[str, tuple[tuple[int, ...], str]]:
    """{part: (shape of a row, dtype)} of what batches have beside the clips; nothing for another task."""
    if not is_subspace(config) or config.motion.flow.name not in ON_HOST:
        return {}
    d = config.data
    return {FLOW_PART: ((d.num_frames - 1, d.height, d.width, 2), "float32")}


def describe(config: ml_collections.ConfigDict, run: Any) -> dict[str, str]:
    """Lines of the first screen."""
    c = run.model_config
    return {
        "objective": f"L1 of flow ({config.motion.flow.name}), {config.precision}, batch {config.batch_size}",
        "tokens": f"{run.student_grid} (t, h, w) of {run.task.teacher}",
        "widths": f"{c.teacher_width} -> {c.hidden} -> {c.width}",
        "flow": f"{c.flow_grid[0]}x{c.flow_grid[1]} a token frame",
    }


def save_head(config: ml_collections.ConfigDict, run: Any, model: MotionSubspace, folder: Path) -> Path:
    """Writes the trained projection as the artefact that config.teacher.motion_head names in stage 2."""
    name, weights, settings = _asked(config)
    file = Path(weights).name if weights else ""
    about = dict(grid=list(run.student_grid), flow=config.motion.flow.name, data=config.data.source, steps=config.steps)
    # Tokens that were given leave no teacher loaded: its settings are known, its numbers are not.
    teacher = run.frozen["teachers"].get(name) or teachers.abstract(name, weights, **settings)
    return motion_head.save(folder, model.projection, name=name, teacher=teacher, weights=file, **about)


def panels(run: Any, frozen: dict[str, Any], batch: dict, size: tuple[int, int]) -> Callable:
    """`f(model)` -> {row: flow [t, h, w, 2] in pixels of frames `size`} of the first clip of a batch, compiled once."""
    pixel = jnp.array([size[1], size[0]], jnp.float32)

    @jax.jit
    def compute(model, frozen, batch):
        _, predicted, true = run.task.predict(model, frozen, batch)
        return predicted[0] * pixel, true[0] * pixel

    def ask(model):
        predicted, true = compute(model, frozen, batch)
        return {"true": true, "predicted": predicted}

    return ask
