"""From config.align and config.teacher to the alignments of a run and the teachers they need.

config.align is one alignment against config.teacher. Further ones stand under config.align.beside: each entry names
what differs from config.align and, under `teacher`, from config.teacher. Further teachers of the same alignment stand
under config.teacher.beside; config.align.fusion says whether their tokens are one target or get a head each.
"""

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxalign import teachers
from jaxalign.alignment.grids import Grid
from jaxalign.alignment.methods import RELATIONAL, AlignmentSettings, Cutoff, weight_schedule
from jaxalign.alignment.projector import ProjectorConfig, check_grids
from jaxalign.alignment.saliency import motion_saliency
from jaxalign.tasks.aligning import Alignment, tokens_part
from jaxalign.teachers import motion_head

Section = dict[str, Any]


def sections(config: ml_collections.ConfigDict) -> dict[str, Section]:
    """{name: align section with its own `teacher` inside} of every alignment of a resolved config, fully written out.

    The first bears its method's name. Raises ValueError for a field that no alignment has, naming the nearest.
    """
    tree = config.to_dict()
    main = {**tree["align"], "teacher": tree["teacher"]}
    beside = main.pop("beside")
    if main["method"] == "none":
        return {}
    found = {main["method"]: main}
    for name, changes in beside.items():
        if name in found:
            raise ValueError(f"config.align.beside.{name}: the name is taken by the first alignment; choose another")
        section = _overlay(main, changes, f"config.align.beside.{name}")
        if section["method"] != "none" and section["weight"] > 0:
            found[name] = section
    return found


def build(
    config: ml_collections.ConfigDict,
    student_grid: Grid,
    width: int,
    depth: int,
    *,
    abstract: bool = False,
    given: Collection[str] = (),
) -> tuple[tuple[Alignment, ...], dict[str, Any]]:
    """(alignments, {key: teacher}) for a student of this token grid, width and number of blocks.

    Teachers asked for twice are loaded once; `abstract`: with shapes for leaves, and no weights are looked for. Those
    whose tokens are `given`, by their names in a batch, are not loaded and not among the teachers. Raises
    ValueError or OSError, one line, for grids that do not meet (both are printed), blocks that are not there, and
    weights that cannot be found or read.
    """
    clip = config.data.num_frames, config.data.height, config.data.width
    loaded: dict[str, tuple[str, Any]] = {}  # what was asked for -> key and teacher
    alignments = []
    for name, section in sections(config).items():
        for field in ("depth", "teacher_depth"):
            if section[field] is not None and not 0 <= section[field] < depth:
                raise ValueError(
                    f"config.align.{field} = {section[field]}: the student has blocks 0..{depth - 1} (0-based)"
                )
        if section["method"] == "layersync":
            alignments.append(_self_alignment(name, section, config.steps, student_grid))
            continue
        asked = _load_teachers(section, student_grid, clip, loaded, abstract, given)
        groups = [asked] if section["fusion"] == "concat" else [{key: teacher} for key, teacher in asked.items()]
        for group in groups:
            named = name if len(groups) == 1 else f"{name}_{next(iter(group))}"
            share = dict(section, weight=section["weight"] / len(groups))
            alignments.append(_alignment(named, share, config.steps, student_grid, width, group, clip))
    return tuple(alignments), {key: teacher for key, teacher in loaded.values() if tokens_part(key) not in given}


def asked_teachers(
    config: ml_collections.ConfigDict, student_grid: Grid
) -> dict[str, tuple[str, str, str | None, Any]]:
    """{key: (name, weights and motion head as they are given, the teacher with shapes for leaves)} of a resolved
    config's teachers."""
    clip = config.data.num_frames, config.data.height, config.data.width
    loaded: dict[str, tuple[str, Any]] = {}
    for section in sections(config).values():
        if section["method"] != "layersync":
            _load_teachers(section, student_grid, clip, loaded, abstract=True, given=())
    found = {}
    for identity, (key, teacher) in loaded.items():
        name, weights, _, head = json.loads(identity)
        found[key] = name, weights, head, teacher
    return found


def _overlay(base: Section, changes: Mapping, where: str) -> Section:
    """`base` with `changes` laid over it, sections merged; a name that base lacks is an error."""
    result = dict(base)
    for name, value in changes.items():
        if name not in base:
            near = difflib.get_close_matches(name, base, 1)
            raise ValueError(f"{where}.{name}: no such field" + (f"; did you mean {near[0]!r}?" if near else ""))
        merge = isinstance(value, Mapping) and name != "beside"  # other teachers replace the first one's company
        result[name] = _overlay(base[name], value, f"{where}.{name}") if merge else value
    return result


def _self_alignment(name: str, section: Section, steps: int, grid: Grid) -> Alignment:
    """LayerSync: no teacher and no head, the student's own deeper block is the target."""
    if section["teacher_depth"] is None or section["teacher_depth"] <= section["depth"]:
        raise ValueError(
            f"config.align.method = 'layersync' needs the deeper block that is the target: write "
            f"--config.align.teacher_depth=N with N > align.depth = {section['depth']}"
        )
    return Alignment(
        name=name, grid=grid, teachers=(), head=None, teacher_depth=section["teacher_depth"], **_common(section, steps)
    )


def _alignment(name, section, steps, student_grid, width, group: Mapping[str, Any], clip) -> Alignment:
    """One alignment against a group of teachers whose tokens are one target."""
    head = ProjectorConfig(
        student_width=width, teacher_width=sum(teacher.width for teacher in group.values()), **section["projector"]
    )
    meeting = head.grid(student_grid)
    for key, teacher in group.items():
        check_grids(student_grid, _target_grid(key, teacher, section, clip, meeting), head)
    if section["method"] == "m_tsa":  # its rule for frames wants to be broken now, not when the step is compiled
        jax.eval_shape(lambda v: motion_saliency(v, meeting), jax.ShapeDtypeStruct((1, *clip, 3), jnp.float32))
    return Alignment(
        name=name,
        grid=meeting,
        teachers=tuple(group),
        head=head,
        pool_time=section["pool_time"],
        resize=section["resize"],
        **_common(section, steps),
    )


def _target_grid(key: str, teacher, section: Section, clip: Grid, meeting: Grid) -> Grid:
    """The grid of a teacher's tokens once they are pooled and resized as the section says."""
    t, h, w = teacher.grid(clip)
    if (t - 1) % section["pool_time"]:
        raise ValueError(
            f"config.align.pool_time = {section['pool_time']}: {key} gives {t} frames, not 1 + a multiple of it"
        )
    t = 1 + (t - 1) // section["pool_time"]
    if not section["resize"]:
        return t, h, w
    # Tokens of several frames each (VideoMAE's tubelets) are spread over these; never are frames left out.
    return (meeting[0] if meeting[0] % t == 0 else t, *meeting[1:])


def _common(section: Section, steps: int) -> dict[str, Any]:
    """The fields of an Alignment that every kind of it reads from its section alike."""
    fields = {f.name for f in dataclasses.fields(AlignmentSettings)}
    by_similarity = section["schedule"] == "similarity"
    if by_similarity and section["method"] in RELATIONAL:
        # 1 − distance of relations is high (TRD, MoAlign) or below zero (KL) where nothing has been learnt yet.
        raise ValueError(
            f"config.align.schedule = 'similarity' wants a method whose loss is a cosine; {section['method']} compares "
            "relations and has no similarity: write schedule=cutoff with --config.align.schedule_steps=N"
        )
    end = section["schedule_steps"] or steps
    return dict(
        method=section["method"],
        depth=section["depth"],
        settings=AlignmentSettings(**{k: v for k, v in section.items() if k in fields}),
        weight=weight_schedule(
            "constant" if by_similarity else section["schedule"],
            weight=section["weight"],
            steps=end,
            warmup=section["warmup_steps"],
            cutoff=end,
        ),
        cutoff=Cutoff(**section["cutoff"]) if by_similarity else None,
    )


def _load_teachers(
    section: Section, student_grid: Grid, clip: Grid, loaded: dict, abstract: bool, given: Collection[str]
) -> dict[str, Any]:
    """{key: teacher} of a section's teacher and those beside it; `loaded` remembers what was loaded before."""
    first = dict(section["teacher"])
    beside = first.pop("beside")
    bare = {field: None for field in first} | {"weights": ""}  # another network inherits no settings of the first
    asked = {"config.teacher": first}
    for where, more in ((f"config.teacher.beside.{label}", more) for label, more in beside.items()):
        asked[where] = _overlay(bare, more, where)
    found = {}
    for where, wanted in asked.items():
        # JSON, as a config read back from a workdir has it, makes lists of tuples.
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in wanted.items() if v is not None}
        name, weights, head = settings.pop("name"), settings.pop("weights"), settings.pop("motion_head", None)
        if section["grid"] == "student":
            settings["size"] = _meeting_size(where, name, weights, settings, section, student_grid, clip)
        # Tokens behind a motion head are other tokens: they have another name in a batch.
        label = name if head is None else f"{name}_motion"
        identity = json.dumps([name, weights, settings, head], sort_keys=True)
        if identity not in loaded:
            keys = [key for key, _ in loaded.values()]
            key = label if label not in keys else f"{label}_{1 + sum(k.startswith(label) for k in keys)}"
            if abstract or tokens_part(key) in given:
                loaded[identity] = key, teachers.abstract(name, weights, **settings)
            else:
                try:
                    loaded[identity] = key, teachers.load(name, weights or None, **settings)
                except FileNotFoundError as error:
                    raise FileNotFoundError(
                        str(error).replace("--config.teacher.weights", f"--{where}.weights")
                    ) from None
            if head is not None:
                loaded[identity] = key, _behind_motion_head(loaded[identity][1], name, head, abstract)
        key, teacher = loaded[identity]
        found[key] = teacher
    return found


def _behind_motion_head(teacher, name: str, folder: str, abstract: bool) -> motion_head.MotionTeacher:
    """The teacher with its motion head; one with shapes alone for a folder that is not named yet."""
    shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(teacher))
    if folder:
        return motion_head.load(folder, name=name, teacher=teacher, abstract=shapes)
    if not abstract:
        raise ValueError(
            "config.teacher.motion_head is empty: train a head with configs/moalign_subspace.py and give "
            "--config.teacher.motion_head=WORKDIR/motion_head (None: the teacher's own tokens are the target)"
        )
    return motion_head.MotionTeacher(teacher, motion_head.fresh(teacher.width))


def _meeting_size(
    where: str, name: str, weights: str, settings: dict, section: Section, student_grid: Grid, clip: Grid
) -> tuple[int, int]:
    """The frame size (h, w) at which a teacher's tokens fall on the grid that the head makes: full resolution."""
    if "size" in settings:
        raise ValueError(
            "config.align.grid = 'student' chooses the size at which the teacher sees the frames: write "
            f"--{where}.size=None (and --config.align.projector.conv=same where a strided one leaves fewer "
            "tokens), or --config.align.grid=teacher"
        )
    _, h, w = ProjectorConfig(student_width=1, teacher_width=1, **section["projector"]).grid(student_grid)
    teacher = teachers.abstract(name, weights, **settings)
    size = teacher.config.size
    rows = size if isinstance(size, int) else size[0]
    pixels = rows // teacher.grid(clip)[1]  # a side of the square that one token covers
    return h * pixels, w * pixels
