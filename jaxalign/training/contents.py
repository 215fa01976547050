"""What decides the content of precomputed parts, as config fields: written beside them, compared before they are used.

A part that was made with other fields is refused with each field that differs and both its values. Fields that change
nothing of a content (how many frames go through a teacher at once) are left out.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from jaxalign import teachers
from jaxalign.data import precomputed, precomputed_source
from jaxalign.data.clips import Source, fingerprint
from jaxalign.data.precomputed import Clips, Folder, Series, differences
from jaxalign.interop import safetensors_file
from jaxalign.tasks.aligning import saliency_part, tokens_part
from jaxalign.teachers import motion_head
from jaxalign.training import alignments, setup

Fields = dict[str, Any]

# Of the settings that change no token the classifier's is written, as folders of before have it in the names of their
# series, and not compared.
_CLASSIFIER = "num_classes"
VIDEOS = "videos"  # digest of their names, lengths, labels and captions
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 20


# ---- fields


def of_clips(config: ml_collections.ConfigDict, source: Source | None = None) -> Fields:
    """What a clip looks like and, with a source, of which videos it is."""
    names = ("num_frames", "height", "width", "stride", "short", "hflip")
    fields = {f"data.{name}": config.data[name] for name in names}
    if config.data.get("split", 1) != 1:  # unwritten in folders of before there was a choice
        fields["data.split"] = config.data.split
    return fields if source is None else fields | {VIDEOS: fingerprint(source)}


def of_latents(config: ml_collections.ConfigDict) -> Fields:
    """The codec, how it computes, and its weights."""
    c = config.codec
    fields = {"codec.name": c.name, "codec.precision": c.precision, "codec.tiling": c.tiling}
    return fields | {"codec.weights": weights_identity(c.weights or None, "vae")}


def of_prompts(config: ml_collections.ConfigDict) -> Fields:
    """The text encoder, how it computes, and its weights."""
    return {
        "text.encoder": config.text.encoder,
        "text.tokens": config.text.tokens,
        "text.weights": weights_identity(setup.text_weights(config), "text_encoder"),
        "precision": config.precision,
    }


def of_teacher(
    name: str, weights: str, module: Any, precision: str, section: str = "teacher", head: str | None = None
) -> Fields:
    """A teacher, all that it is set to, how it computes, its weights, and those of the motion head behind it."""
    try:
        identity = weights_identity(weights or teachers.find_file(name, None))
    except FileNotFoundError:  # it was given no weights, and no package has them
        identity = None
    settings = {
        k: v
        for k, v in dataclasses.asdict(module.config).items()
        if k == _CLASSIFIER or k not in motion_head.INDIFFERENT
    }
    fields = {f"{section}.name": name, "precision": precision, f"{section}.weights": identity}
    if head is not None:  # unwritten where there is none, as in folders of before; never None, which means none
        fields[f"{section}.motion_head"] = (head and weights_identity(Path(head) / motion_head.WEIGHTS)) or ""
    return json.loads(json.dumps(fields | {f"{section}.{k}": v for k, v in settings.items()}))


def of_teachers(config: ml_collections.ConfigDict, run: setup.Run) -> dict[str, Fields]:
    """{key: fields} of the teachers that a run asks."""
    asked = alignments.asked_teachers(config, run.student_grid)
    return {
        key: of_teacher(name, weights, module, config.precision, head=head)
        for key, (name, weights, head, module) in asked.items()
    }


def series_of_teacher(fields: Fields) -> str:
    """The name of a teacher's series: one folder may hold its tokens at several settings."""
    return f"teacher-{fields['teacher.name']}-{precomputed.digest(fields)[:8]}"


def saliency_grids(run: setup.Run) -> list[tuple[int, int, int]]:
    """The token grids on which a run wants to know where things move."""
    return list(dict.fromkeys(a.grid for a in run.task.alignments if a.method == "m_tsa"))


def series_of_saliency(grid: tuple[int, int, int]) -> str:
    """The name of the series of the motion saliency on a grid."""
    return saliency_part(grid).replace("/", "-")


def weights_identity(path: str | Path | None, part: str = "") -> str | None:
    """'N bytes, DIGEST' of a weights file (of an index: with the shards that it lists), or of all files in a folder
    (in its `part`, if it has that); None for none.

    The digest is over the sizes and 64 evenly spread MiB of each file: it tells networks apart in a moment, be they as
    large as T5-XXL. Damage is the loaders' business.
    """
    if path is None or not Path(path).exists():
        return None
    path = Path(path)
    if (path / part).is_dir():
        path = path / part
    if path.is_file():
        shards = sorted(set(safetensors_file.listed(path).values())) if path.suffix == ".json" else ()
        files = [path, *(path.parent / shard for shard in shards if (path.parent / shard).is_file())]
    else:
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.name[0] != ".")
    stamps = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return f"{sum(size for _, size, _ in stamps):,} bytes, {_digest(stamps)}"


@functools.lru_cache(maxsize=32)
def _digest(stamps: tuple[tuple[str, int, int], ...]) -> str:
    found = hashlib.sha256()
    for name, size, _ in stamps:
        found.update(str(size).encode())
        with open(name, "rb") as file:
            for k in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * k // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE_BYTES))
                if size <= _SAMPLE_BYTES:
                    break
    return found.hexdigest()[:16]


# ---- what a run takes


def bind(config: ml_collections.ConfigDict, path: str | Path) -> Source:
    """The clips of a precomputed folder with all that this run can take of it in place of computing it.

    A teacher whose tokens are not there is asked while training, if the folder holds the videos. Weights of what is
    not computed need not be here; where they are, they are compared. Raises ValueError, one line: for a content that
    was made otherwise (each field that differs, with both values), for a part that is missing (what to add), for
    prompts of config.sample that are not there.
    """
    folder = precomputed.open_folder(path)
    refuse_clips(folder, config)
    run = setup.build(config, num_classes=len(folder.clips.classes), abstract=True)
    video, parts, notes, needs_video = folder.series.get("video"), {}, [], False

    if not hasattr(run.frozen["codec"], "moments"):
        needs_video = True  # the latents are the pixels
    elif latents := folder.series.get("latents"):
        refuse(folder, latents.fields, of_latents(config), "latents")
        parts["moments"] = latents
    else:
        needs_video = True
    if needs_video and video is None:
        raise _missing(folder, "no latents", "latents")

    for key, fields in of_teachers(config, run).items():
        found, differ = _teacher(folder, fields, run.frozen["teachers"][key].width)
        if found is not None:
            parts[tokens_part(key)] = found
            if fields["teacher.weights"] is None:
                notes.append(f"{key} is not loaded; its tokens are of weights of {found.fields['teacher.weights']}")
        elif video is not None:
            needs_video = True
            notes.append(f"{key} is asked while training: the folder has no tokens of it" + (differ and f" ({differ})"))
        elif differ:
            raise ValueError(f"{folder.path}: its tokens of {key} are of other settings ({differ}); {_add('teachers')}")
        else:
            raise _missing(folder, f"no tokens of teacher {key}", "teachers")
    for grid in saliency_grids(run):
        if saliency := folder.series.get(series_of_saliency(grid)):
            parts[saliency_part(grid)] = saliency
        elif video is not None:
            needs_video = True
        else:
            raise _missing(folder, f"no saliency on the grid {grid}", "teachers")
    if needs_video:
        parts["video"] = video

    prompts = None
    if run.task.text:
        prompts = folder.series.get("prompts")
        if prompts is None:
            raise _missing(folder, "no prompts", "text")
        refuse(folder, prompts.fields, of_prompts(config), "prompts")
        if config.data.captions:
            notes.append(f"data.captions = {config.data.captions} is not read: prompts come from the folder")
    source = precomputed_source.taken(folder, parts, prompts, notes)
    for prompt in config.sample.prompts if prompts else ():
        try:
            source.embedded(prompt)
        except KeyError:
            raise ValueError(
                f"config.sample.prompts: {prompt[:60]!r} is not among the prompts in {folder.path}; {_add('text')} "
                "and the same config.sample.prompts"
            ) from None
    return source


def refuse_clips(folder: Folder, config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, one line, for a folder of other clips than a config asks."""
    refuse(folder, _asked_of(folder.clips, config), of_clips(config), "clips")


def _asked_of(clips: Clips, config) -> Fields:
    """The clips' fields that a run asks: which videos they are of is the folder's; mirror images need not be used."""
    asked = {name: value for name, value in clips.fields.items() if name != VIDEOS}
    return asked | {"data.hflip": asked["data.hflip"] and config.data.hflip}


def _teacher(folder: Folder, fields: Fields, width: int) -> tuple[Series | None, str]:
    """The series of a teacher's tokens, so many channels wide, or how the nearest one of that name differs ('' if
    there is none)."""
    nearest = ""
    for series in folder.series.values():
        if series.fields.get("teacher.name") == fields["teacher.name"]:
            # Channels too: a folder of before motion heads were written down does not say whether its tokens are of one
            there, here = series.fields | {"channels": series.shape[-1]}, _known(series.fields, fields)
            differ = differences(_compared(there), _compared(here | {"channels": width}))
            if not differ:
                return series, ""
            nearest = min(nearest or differ, differ, key=len)
    return None, nearest


def _compared(fields: Mapping) -> Fields:
    return {name: value for name, value in fields.items() if name != f"teacher.{_CLASSIFIER}"}


def _known(there: Mapping, here: Mapping) -> Fields:
    """The fields of here; weights that are not here are taken to be those there."""
    return {k: there.get(k) if k.endswith(".weights") and v is None else v for k, v in here.items()}


def refuse(folder: Folder, there: Mapping, here: Mapping, what: str) -> None:
    """Raises ValueError, one line, for contents (`what`) of other fields than a config asks, naming what differs."""
    if differ := differences(there, _known(there, here)):
        raise ValueError(
            f"data.source={str(folder.path)!r}: its {what} were made with other settings ({differ}); change the "
            "config, or precompute into another folder"
        )


def _missing(folder: Folder, what: str, part: str) -> ValueError:
    return ValueError(f"data.source={str(folder.path)!r} has {what}; {_add(part)}")


def _add(part: str) -> str:
    return f"add what is missing: the precompute command of this folder with this config and --what={part}"
