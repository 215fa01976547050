"""The motion head as a file of its own, and a teacher with it: what MoAlign's stage 1 leaves to its stage 2.

    FOLDER/motion_head.safetensors  M_ψ's four arrays (models/motion.py), channels last
    FOLDER/motion_head.json         of which teacher, with which settings, and some of its numbers; widths, kernel,
                                    whether tokens are normalised, and the grid that it was trained on

A head means something on top of the teacher that it was trained with, and nothing on any other: loading compares. The
teacher's numbers are compared where it is loaded, in whatever form and dtype; heads of before keep none of them.
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
Sample = dict[str, list[list[float | int]]]
# Bounds of memory, ways to compute the same thing, and a file's classifier, which makes no token.
INDIFFERENT = ("frames_at_once", "pairs_at_once", "attention", "remat", "num_classes")
_LEAVES, _NUMBERS = 16, 4  # so many numbers of each of so many leaves tell a teacher's weights from others
_ROUNDED = 2**-6  # of a number: what bf16 makes of it, on either side and twice (stored, computed with)


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
    return json.loads(json.dumps(_decisive(dataclasses.asdict(teacher.config))))


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in INDIFFERENT}


def sample(teacher: nnx.Module) -> Sample:
    """{leaf: [[place in the flat leaf, number], ...]} of a few leaves; nothing of one that has shapes alone.

    Of a leaf that is cut over devices in the part that lies here: no other process is asked.
    """
    leaves = [(name, leaf) for name, leaf in mapping.named_leaves(teacher)[0] if leaf.ndim]
    if _is_abstract(teacher) or not leaves:
        return {}
    found = {}
    for name, leaf in (leaves[k] for k in _spread(len(leaves), _LEAVES)):
        part = jnp.asarray(leaf).addressable_shards[0]
        numbers, corner = np.asarray(part.data), [along.start or 0 for along in part.index]
        at = np.unravel_index(_spread(numbers.size, _NUMBERS), numbers.shape)
        places = np.ravel_multi_index([k + first for k, first in zip(at, corner, strict=True)], leaf.shape)
        found[name] = [[int(k), float(f"{x:.6g}")] for k, x in zip(places, numbers[at].astype(np.float64), strict=True)]
    return found


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spread."""
    return sorted({(2 * k + 1) * count // (2 * most) for k in range(most)})


def _is_abstract(teacher: nnx.Module) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(teacher))


def _differing(kept: Sample, teacher: nnx.Module) -> str:
    """The first number of a teacher that is not the one that `sample` kept, or ''.

    Leaves that it has not, or not so large, are of a classifier: the settings are the same.
    """
    leaves = dict(mapping.named_leaves(teacher)[0])
    for name in (name for name in kept if name in leaves):
        numbers = np.asarray(leaves[name]).reshape(-1)
        for place, there in kept[name]:
            here = float(numbers[place]) if place < numbers.size else there
            if abs(here - there) > _ROUNDED * max(abs(here), abs(there)) + 1e-6:
                return f"{name}[{place}] is {there:.4g} there, {here:.4g} here"
    return ""


def save(
    folder: str | Path, projection: MotionProjection, *, name: str, teacher: nnx.Module, weights: str = "", **about: Any
) -> Path:
    """Writes a head trained on teacher `name`; `weights` is the name of its file, `about` (JSON) goes into the note.

    Some numbers of the `teacher` are noted too, unless it has shapes alone. Raises OSError when writing fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {leaf: np.asarray(x, np.float32) for leaf, x in mapping.named_leaves(projection)[0]}
    first, second = (getattr(projection, name).kernel.shape for name in ("0", "2"))
    note = {
        "format": FORMAT,
        "teacher": {
            "name": name,
            "width": teacher.width,
            "settings": settings(teacher),
            "weights": weights,
            "sample": sample(teacher),
        },
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

    Raises ValueError, one line, for a head of another teacher (name, width, settings or, where it has them, numbers)
    and for damage; FileNotFoundError for none.
    """
    found = note(folder)
    there, here = found["teacher"], {"name": name, "width": teacher.width, "settings": settings(teacher)}
    differing = [f"{k} {there[k]!r} there, {here[k]!r} here" for k in ("name", "width") if there[k] != here[k]]
    if not differing:
        a, b = _decisive(there["settings"]), here["settings"]
        differing = [f"{k} {a.get(k)!r} there, {b.get(k)!r} here" for k in {**a, **b} if a.get(k) != b.get(k)]
    if differing:
        raise ValueError(
            f"config.teacher.motion_head = {str(folder)!r} was trained on another teacher than config.teacher names: "
            f"{'; '.join(differing[:4])}; set config.teacher as it was, or train a head for this one"
        )
    if not _is_abstract(teacher) and (differing := _differing(there.get("sample", {}), teacher)):
        file = f" ({there['weights']})" if there.get("weights") else ""
        raise ValueError(
            f"config.teacher.motion_head = {str(folder)!r} was trained on other weights of {name}{file}: {differing}; "
            "set config.teacher.weights as it was, or train a head for these"
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
