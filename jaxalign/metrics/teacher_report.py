"""What is measured of teachers before one is chosen: tokens of the same clips, their IICR, spectrum and speed.

Teachers are written NAME or NAME:setting=value:setting=value; several settings of one are several teachers.
"""

import ast
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jaxalign import teachers
from jaxalign.data import clips as clip_lib
from jaxalign.data import pipeline, sources, video
from jaxalign.metrics import iicr, spectrum


@dataclasses.dataclass(frozen=True)
class Asked:
    """A teacher as it was asked for."""

    name: str
    settings: Mapping[str, Any]
    weights: str | None = None

    @property
    def label(self) -> str:
        """Its name and settings, for tables and figures."""
        return " ".join([self.name, *(f"{k}={_written(v)}" for k, v in self.settings.items())])


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips uint8 [n, t, h, w, 3], the video that each is from, and what a person should know of them."""

    videos: UInt8[np.ndarray, "n t h w 3"]
    names: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one teacher gave: the outputs on the clips to show, and numbers a clip.

    Flow networks have `speed` (mean, in pixels) and neither `iicr` [clips, k], `gap` [clips] nor `spectrum` [h, w].
    """

    asked: Asked
    shape: tuple[int, ...]  # of its output on a clip: [t, h, w, d]
    parameters: int
    frames_per_second: float
    shown: Mapping[int, np.ndarray]
    iicr: np.ndarray | None = None
    gap: np.ndarray | None = None
    spectrum: np.ndarray | None = None
    speed: np.ndarray | None = None

    @property
    def is_flow(self) -> bool:
        """Whether it gives flow and no tokens."""
        return self.speed is not None


# ---- what is asked for ---------------------------------------------------------------------------------------------


def parse_teachers(text: str, weights: str = "") -> list[Asked]:
    """The teachers that --teachers and --weights (NAME=FILE,...) name.

    Values are Python's (None, True, 0.5, [3, 7]), sizes also 160x240, anything else is text; `weights=FILE` may
    stand among a teacher's settings too. Raises ValueError, one line, for what cannot be read.
    """
    files = {}
    for entry in _outside_brackets(weights, ","):
        name, equals, file = entry.partition("=")
        if not equals or not file:
            raise ValueError(f"--weights {entry!r}: write NAME=FILE, several with commas between")
        files[name] = file
    asked = []
    for entry in _outside_brackets(text, ","):
        name, *parts = _outside_brackets(entry, ":")
        settings = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise ValueError(f"--teachers {entry!r}: write settings as NAME:setting=value:setting=value")
            settings[key] = value if key == "weights" else _value(value)
        if "=" in name:
            raise ValueError(f"--teachers {entry!r}: a teacher's settings stand behind colons, NAME:setting=value")
        file = settings.pop("weights", files.get(name))
        asked.append(Asked(name, settings, file))
    if not asked:
        raise ValueError(f"--teachers is missing: name some of {', '.join(teachers.TEACHERS)}")
    labels = [one.label for one in asked]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"--teachers: {twice[0]} is there twice")
    if unused := files.keys() - {one.name for one in asked}:
        raise ValueError(f"--weights names {min(unused)!r}, which --teachers does not")
    return asked


def _outside_brackets(text: str, separator: str) -> list[str]:
    parts = re.split(re.escape(separator) + r"(?![^\[(]*[\])])", text)
    return [part.strip() for part in parts if part.strip()]


def _value(text: str) -> Any:
    if re.fullmatch(r"\d+x\d+", text):
        return parse_size(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _written(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) out of '256' or '160x240'. Raises ValueError."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip())
    if not found:
        raise ValueError(f"--size {text!r}: write pixels, 256 or HEIGHTxWIDTH as in 160x240")
    return int(found[1]), int(found[2] or found[1])


# ---- clips ---------------------------------------------------------------------------------------------------------


def open_clips(spec: str, count: int, *, frames: int, size: tuple[int, int], stride: int = 1) -> Clips:
    """`count` clips spread evenly over a file, a folder or a named source ('demo'), always the same ones.

    Nobody trains here, so all of each video is used, training and held-out parts alike. Fewer clips are given
    where there are not that many different ones. Raises ValueError and FileNotFoundError, each one line.
    """
    source = _open(spec)
    items = tuple(dataclasses.replace(item, split="held_out") for item in source.items)
    source, clip = dataclasses.replace(source, items=items), clip_lib.Clip(frames, *size, stride)
    found = clip_lib.windows(source, "held_out", clip)
    if not found:
        longest = max(item.frames or 0 for item in items)
        which = f"its longest video has {longest}" if len(items) > 1 else f"it has {longest}"
        raise ValueError(f"--videos {spec}: a clip needs {frames} frames, and {which}; lower --frames")
    notes = []
    if source.skipped:
        name, why = source.skipped[0]
        notes.append(f"skipped, unreadable: {len(source.skipped)} of its files (the first, {name}: {why})")
    if short := clip_lib.short_items(source, clip):
        notes.append(f"skipped, shorter than {frames} frames: {len(short)} (the first: {short[0]})")
    # As many as there are places to begin at: the same clip twice would only look like a second one.
    room = [w.stop - w.start - (frames - 1) * stride for w in found if w.stop is not None]
    count = min(count, len(found) * max(1, min(room, default=count)))
    batch = pipeline.held_out(source, count, num_frames=frames, height=size[0], width=size[1], stride=stride)
    names = tuple(source.items[found[int(k)].item].name for k in batch["index"])
    return Clips(batch["video"], names, tuple(notes))


def _open(spec: str) -> clip_lib.Source:
    path = Path(spec).expanduser()
    if path.is_file():
        info = video.probe(str(path))
        item = clip_lib.Item(path.name, info.frames, info.fps, 0, "both")
        return clip_lib.Source(str(path), (item,), read=functools.partial(_read, str(path)))
    try:
        return sources.open_source(spec)
    except (ValueError, OSError) as error:
        words = str(error).replace("data.source=", "--videos ").replace("no such folder", "no such file or folder")
        raise type(error)(words.replace("a folder of videos", "a file or a folder of videos")) from None


def _read(path: str, item: int, start: int, stop: int, step: int, cover: tuple[int, int]):
    return video.read_span(path, start, stop, step, cover)


def clips_to_show(names: Sequence[str], most: int) -> list[int]:
    """At most `most` clips, of different videos as far as there are any."""
    first = {name: k for k, name in reversed(list(enumerate(names)))}
    others = [k for k in range(len(names)) if k not in first.values()]
    return sorted((sorted(first.values()) + others)[:most])


# ---- measuring -----------------------------------------------------------------------------------------------------


def check(asked: Sequence[Asked], clip: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """The shape of each teacher's output on a clip of (frames, height, width), before any weights are read.

    Raises ValueError for unknown teachers and settings, and for clips that a teacher cannot take.
    """
    shapes = []
    pixels = jax.ShapeDtypeStruct((1, *clip, 3), jnp.float32)
    for one in asked:
        try:
            output = jax.eval_shape(_apply, teachers.abstract(one.name, **one.settings), pixels)
        except TypeError as error:  # a setting of another type than the teacher's, or a clip that breaks its shapes
            raise ValueError(f"teacher {one.label} on clips of {_written(clip)}: {error}") from error
        shapes.append(tuple(output.shape[1:]))
    return shapes


def _apply(teacher, pixels):
    return teacher(pixels)


def measure(
    asked: Asked,
    videos: UInt8[np.ndarray, "n t h w 3"],
    ks: Sequence[int],
    *,
    show: Sequence[int] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Run one teacher over the clips, one at a time; tokens are kept of the clips in `show` only.

    A network whose output has two channels gives flow. Raises as `teachers.load`.
    """
    teacher = teachers.load(asked.name, asked.weights, **asked.settings)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(teacher))
    pixels = jnp.zeros((1, *videos.shape[1:]), jnp.float32)
    run = jax.jit(_apply).lower(teacher, pixels).compile()
    seconds, kept, ratios, spectra, speeds = [], {}, [], [], []
    for k, clip in enumerate(videos):
        pixels = jnp.asarray(clip[None], jnp.float32) / 127.5 - 1
        began = time.perf_counter()
        output = np.asarray(jax.block_until_ready(run(teacher, pixels))[0].astype(jnp.float32))
        seconds.append(time.perf_counter() - began)
        if k in show:
            kept[k] = output
        if output.shape[-1] == 2:
            speeds.append(float(np.linalg.norm(output, axis=-1).mean()))
        else:
            ratios.append(iicr.iicr(output, ks))
            spectra.append(spectrum.log_spectrum(output))
        progress(k + 1)
    numbers = {"speed": np.asarray(speeds)} if speeds else _of_tokens(ratios, spectra)
    frames_per_second = videos.shape[1] / float(np.median(seconds))
    return Measured(asked, output.shape, parameters, frames_per_second, kept, **numbers)


def _of_tokens(ratios: list, spectra: list) -> dict[str, np.ndarray]:
    mean = np.mean(spectra, axis=0)
    gaps = np.asarray([spectrum.frequency_gap(one) for one in spectra]) if min(mean.shape) > 1 else None
    return {"iicr": np.stack(ratios), "gap": gaps, "spectrum": mean}


def row(measured: Measured, ks: Sequence[int]) -> dict[str, Any]:
    """One line of the table: means over the clips; `Δ ±` is the standard deviation between clips."""
    grid, width = "×".join(map(str, measured.shape[:3])), measured.shape[3]
    found = {"teacher": measured.asked.label, "grid": grid, "width": width, "parameters": measured.parameters}
    if measured.is_flow:
        found["mean speed px"] = float(measured.speed.mean())
    else:
        means = iicr.mean_iicr(measured.iicr)
        found |= {f"IICR k={k}": float(mean) for k, mean in zip(ks, means, strict=True)}
    if measured.gap is not None:
        found |= {"Δ": float(measured.gap.mean()), "Δ ±": float(measured.gap.std())}
    return found | {"frames/s": round(measured.frames_per_second, 1)}
