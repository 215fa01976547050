"""Opening a workdir to look at what it learnt: config, run and the trained trees, without the optimizer."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections

from jaxalign.models import lora
from jaxalign.training import config as config_lib
from jaxalign.training import init_from, setup
from jaxalign.training.data_settings import classes_of
from jaxalign.training.restore import find_checkpoint, load_params, read_metadata


class Trained(NamedTuple):
    """A run as it stands on disk; `trainable` is {'model': student, 'heads': ...} as in training."""

    config: ml_collections.ConfigDict
    run: setup.Run
    trainable: dict


def workdir_of(path: str | Path) -> Path:
    """The run's folder for a workdir (as it is given) or for one of its checkpoints, RUN/checkpoints/STEP.

    FileNotFoundError for a folder that is neither.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    step = path.absolute()
    for checkpoints in (step, step.parent):
        if checkpoints.name == "checkpoints" and (checkpoints.parent / "config.json").is_file():
            return checkpoints.parent
    raise FileNotFoundError(
        f"{path} is no workdir: it has no config.json; give the folder of a run, or of one of its checkpoints "
        "(RUN/checkpoints/STEP)"
    )


def read_config(workdir: str | Path) -> ml_collections.ConfigDict:
    """The config that a workdir, or that of a checkpoint, was made with; raises as `workdir_of`."""
    path = workdir_of(workdir) / "config.json"
    return ml_collections.ConfigDict(json.loads(path.read_text(encoding="utf-8")))


def open_run(
    workdir: str | Path,
    *,
    weights: str = "ema",
    checkpoint: str | Path | None = None,
    overrides: dict | None = None,
    with_text: bool = True,
    task: str = "denoising",
) -> Trained:
    """A `checkpoint` of a run (its folder; None: `workdir` itself if it is one, or the newest whole one of a workdir);
    `weights` is 'ema' (the average of the student) or 'raw' (the last).

    `overrides` are sections of the config, e.g. the alignment and teacher of another run: the student is then looked
    at through that alignment and has no head of its own. Their fields take the place of the run's, each as a whole.
    `with_text` as in `setup.build`. Raises FileNotFoundError without a whole checkpoint, ValueError for a run of
    another `task`.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights = {weights!r}: write ema (the averaged student) or raw (the last one)")
    config = read_config(workdir)
    if (found := config.get("task", "denoising")) != task:
        verb = "evaluate motion" if found == "motion_subspace" else "evaluate loss"
        raise ValueError(f"{workdir} is a run of task {found}, not {task}: look at it with python -m jaxalign.{verb}")
    config = config_lib.resolve(with_sections(config, overrides or {}))
    # Only the number of classes is the data's; a fixed one spares opening the source.
    classes = len(classes_of(config)) if config.model.num_classes == -1 else 0
    run = setup.build(config, num_classes=classes, with_text=with_text)
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"checkpoint {checkpoint} is gone: the run goes on training and keeps its newest ones; call again, and the "
            "newest is taken"
        )
    # It is looked for once, and all is read at once: a run that goes on training may have a newer one any time.
    place = checkpoint or workdir
    if run.task.lora is not None:
        place = find_checkpoint(place)
        extra = read_metadata(place)["extra"]
        init_from.check_base(extra.get("base"), init_from.fingerprint(config, run), str(workdir))
    wanted = jax.eval_shape(run.init, jax.random.key(0))
    has_heads = run.task.alignments and not overrides
    trainable = {"model": wanted["model"], "heads": wanted["heads"] if has_heads else {}}
    saved = {"trainable": trainable} | ({"ema": trainable.pop("model")} if weights == "ema" else {})
    found, _ = load_params(place, saved, source="")
    student = found["ema"] if weights == "ema" else found["trainable"]["model"]
    return Trained(config, run, {"model": student, "heads": found["trainable"]["heads"]})


def with_sections(config: ml_collections.ConfigDict, sections: dict[str, dict]) -> ml_collections.ConfigDict:
    """The config with the fields of some sections replaced, each as a whole: an empty `beside` is empty then."""
    tree = config.to_dict()
    return ml_collections.ConfigDict(tree | {name: tree.get(name, {}) | fields for name, fields in sections.items()})


def whole(opened: Trained) -> Trained:
    """The same run with its student in one piece: adapters merged into their base, all else as it is."""
    task, frozen = opened.run.task, dict(opened.run.frozen)
    if task.lora is None:
        return opened
    student = lora.merge(frozen.pop("base"), opened.trainable["model"], task.lora.scale)
    run = dataclasses.replace(opened.run, task=dataclasses.replace(task, lora=None), frozen=frozen)
    return Trained(opened.config, run, {**opened.trainable, "model": student})
