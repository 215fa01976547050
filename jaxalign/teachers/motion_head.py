"""The motion head as a file of its own, and a teacher with it: what MoAlign's stage 1 leaves to its stage 2.

    FOLDER/motion_head.safetensors  M_ψ's four arrays (models/motion.py), channels last
    FOLDER/motion_head.json         of which teacher, with which settings; widths, kernel, whether tokens are
                                    normalised, and the grid that it was trained on

A head means something on top of the teacher that it was trained with, and nothing on any other: loading compares.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.interop import mapping, safetensors_file
from jaxalign.interop.sealed import write_atomic
from jaxalign.models.motion import MotionProjection

WEIGHTS, NOTE = "motion_head.safetensors", "motion_head.json"
FORMAT = 1
_INDIFFERENT = ("frames_at_once", "pairs_at_once")  # these bound the memory and change no token


class MotionTeacher(nnx.Module):
    """video [b, t, h, w, 3] in [-1, 1] -> its motion subspace [b, *teacher.grid((t, h, w)), head's width]."""

    def __init__(self, teacher: nnx.Module, projection: MotionProjection):
        self.teacher, self.projection = teacher, projection

    @property
    def config(self) -> Any:
        """The teacher's."""
        return self.teacher.config

    @property
    def width(self) -> int:
        """Channels of the subspace."""
        return getattr(self.projection, "2").kernel.shape[-1]

    def grid(self, video: tuple[int, int, int]) -> tuple[int, int, int]:
        """The teacher's (frames, rows, columns)."""
        return self.teacher.grid(video)

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b s i j m"]:
        """M_ψ of the teacher's tokens."""
        tokens = self.teacher(video)
        return self.projection(tokens.astype(getattr(self.projection, "2").kernel.dtype))


def settings(teacher: nnx.Module) -> dict[str, Any]:
    """What of a teacher's settings decides its tokens, as JSON has them."""
    kept = {k: v for k, v in dataclasses.asdict(teacher.config).items() if k not in _INDIFFERENT}
    return json.loads(json.dumps(kept))


def save(
    folder: str | Path, projection: MotionProjection, *, name: str, teacher: nnx.Module, weights: str = "", **about: Any
) -> Path:
    """Writes a head trained on teacher `name`; `weights` is the name of its file, `about` (JSON) goes into the note.

    Raises OSError when writing fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {leaf: np.asarray(x, np.float32) for leaf, x in mapping.named_leaves(projection)[0]}
    first, second = (getattr(projection, name).kernel.shape for name in ("0", "2"))
    note = {
        "format": FORMAT,
        "teacher": {"name": name, "width": teacher.width, "settings": settings(teacher), "weights": weights},
        "hidden": first[-1],
        "width": second[-1],
        "kernel": first[1],
        "norm": projection.norm,
        **about,
    }
    safetensors_file.write(folder / WEIGHTS, arrays)
    write_atomic(folder / NOTE, json.dumps(note, indent=2) + "\n")
    return folder


def note(folder: str | Path) -> dict[str, Any]:
    """What `save` wrote of a head. Raises FileNotFoundError for a folder without one, ValueError for one unreadable."""
    path = Path(folder) / NOTE
    if not path.is_file():
        raise FileNotFoundError(
            f"config.teacher.motion_head = {str(folder)!r}: there is no {NOTE}; train one with "
            "configs/moalign_subspace.py, which leaves it in WORKDIR/motion_head"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        written = found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}); train the head again") from error
    if written != FORMAT:
        raise ValueError(f"{path}: its format is {written!r}, this version reads {FORMAT}; train the head again")
    return found


def load(folder: str | Path, *, name: str, teacher: nnx.Module, abstract: bool = False) -> MotionTeacher:
    """Teacher `name` followed by the head in `folder`; `abstract`: with shapes for the head's leaves.

    Raises ValueError, one line, for a head of another teacher (name, width or settings) and for damage;
    FileNotFoundError for none.
    """
    found = note(folder)
    there, here = found["teacher"], {"name": name, "width": teacher.width, "settings": settings(teacher)}
    differing = [f"{k} {there[k]!r} there, {here[k]!r} here" for k in ("name", "width") if there[k] != here[k]]
    if not differing:
        a, b = there["settings"], here["settings"]
        differing = [f"{k} {a.get(k)!r} there, {b.get(k)!r} here" for k in {**a, **b} if a.get(k) != b.get(k)]
    if differing:
        raise ValueError(
            f"config.teacher.motion_head = {str(folder)!r} was trained on another teacher than config.teacher names: "
            f"{'; '.join(differing[:4])}; set config.teacher as it was, or train a head for this one"
        )
    shape = {k: found[k] for k in ("kernel", "norm") if k in found}  # a head of before there was a choice names none
    shapes = fresh(teacher.width, found["hidden"], found["width"], **shape)
    if abstract:
        return MotionTeacher(teacher, shapes)
    leaves, treedef = mapping.named_leaves(shapes)
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, though its {NOTE} is; train the head again")
    arrays = safetensors_file.open_file(path)
    wrong = [leaf for leaf, spec in leaves if leaf not in arrays or tuple(arrays[leaf].shape) != tuple(spec.shape)]
    if wrong:
        raise ValueError(f"{path} lacks {wrong[0]} in the shape that its {NOTE} says; train the head again")
    filled = [jnp.asarray(np.array(arrays[leaf])) for leaf, _ in leaves]
    return MotionTeacher(teacher, jax.tree.unflatten(treedef, filled))


def fresh(teacher_width: int, hidden: int = 256, width: int = 64, **shape: Any) -> MotionProjection:
    """A head with shapes for leaves; `shape` as MotionProjection takes it."""
    return jax.eval_shape(lambda: MotionProjection(teacher_width, hidden, width, **shape, rngs=nnx.Rngs(0)))
