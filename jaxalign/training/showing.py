"""What a run shows of itself: sampled videos, and where its tokens find a point again."""

import contextlib
import hashlib
import math
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from jaxalign.figures import correspondence, video
from jaxalign.figures.flow import flow_figure
from jaxalign.training.evaluation import fixed_noise, on_device
from jaxalign.training.mesh import fetch
from jaxalign.training.setup import Run
from jaxalign.training.subspaces import panels

FIGURE_FRACTION = 0.25  # the share of noise under which the student is asked; the teacher sees the clean clip
QUERIES = 4
SAMPLING = ("sampler", "steps", "guidance_scale", "dynamic_guidance")  # static under jit
LEAST = 128  # pixels of the shorter side of what is looked at
SHEET, SHEET_SIDE = 64, 1024  # clips that a sheet shows at most, and the pixels that its rows are kept to


class Sampler:
    """Draws config.sample.count videos, the same ones each time, from fixed noise; compiles once, when first called."""

    def __init__(
        self,
        run: Run,
        config: ml_collections.ConfigDict,
        *,
        labels: list[int] | None = None,
        tokens: np.ndarray | None = None,
    ):
        """What the videos show, taken in turn: `labels` (none: all classes), or `tokens` [k, n] of prompts."""
        self.run, self.settings = run, config.sample
        told = np.asarray(labels or list(range(run.task.num_classes)), np.int32) if tokens is None else tokens
        if run.task.text and tokens is None:
            raise ValueError("the student is told by text: give the tokens of some prompts to sample from")
        self.told = told[np.arange(config.sample.count) % len(told)] if len(told) else None
        self.sample = jax.jit(run.task.sample, static_argnames=SAMPLING)

    def __call__(self, model, frozen, *, at_once: int = 4) -> np.ndarray:
        """uint8 [count, t, h, w, 3]. `at_once` bounds the memory; if the sampler draws noise it is part of the seed."""
        return np.concatenate([videos for _, videos in self.batches(model, frozen, at_once=at_once)])

    def batches(
        self, model, frozen, *, at_once: int = 4, wanted: Collection[int] | None = None
    ) -> Iterator[tuple[range, np.ndarray]]:
        """(numbers of its videos, uint8 [n, t, h, w, 3]) of each batch with one of the numbers `wanted` (None: all)."""
        s = self.settings
        options = {name: s[name] for name in SAMPLING}
        for first in range(0, s.count, at_once):
            numbers = range(first, min(first + at_once, s.count))
            if wanted is not None and not any(k in wanted for k in numbers):
                continue
            rows = np.arange(first, first + at_once) % s.count  # full batches only: one compilation
            noise = fixed_noise(self.run, first, at_once, s.seed)
            told = None if self.told is None else self.told[rows]
            key = jax.random.fold_in(jax.random.key(s.seed), first)
            yield numbers, to_uint8(self.sample(model, frozen, noise, told, key, **options))[: len(numbers)]


def to_uint8(videos) -> np.ndarray:
    """[-1, 1] -> 0..255."""
    return fetch(jnp.round((videos + 1.0) * 127.5).astype(jnp.uint8))


def write_clip(path: Path, clip: np.ndarray, fps: float | int) -> Path:
    """One clip as an MP4 large enough to look at."""
    return video.write_mp4(path, video.enlarge(clip, LEAST), fps)


def write_samples(folder: Path, name: str, videos: np.ndarray, fps: float | int) -> list[Path]:
    """The clips as an MP4 grid and a PNG of film strips, large enough to look at."""
    videos = video.enlarge(videos, LEAST)
    return [
        video.write_mp4(folder / f"{name}.mp4", video.grid(videos), fps),
        video.write_png(folder / f"{name}.png", video.film_strips(videos)),
    ]


def write_sheet(folder: Path, name: str, files: Sequence[Path], fps: float | int) -> list[Path]:
    """The first clips of some MP4 files of one size as an animated grid and film strips, small where they are many.

    A GIF, and no MP4: it lies beside the clips, and who reads the folder as videos shall not meet it among them.
    """
    files = files[:SHEET]
    columns = math.ceil(math.sqrt(len(files)))  # as `video.grid` places them
    clips = []
    for path in files:
        clip = video.read_mp4(path)
        nth = math.ceil(columns * clip.shape[2] / SHEET_SIDE)
        clips.append(clip[:, ::nth, ::nth])
    return [
        video.write_gif(folder / f"{name}.gif", video.grid(np.stack(clips)), fps),
        video.write_png(folder / f"{name}.png", video.film_strips(np.stack(clips))),
    ]


class Correspondence:
    """The correspondence figure of one held-out clip: teacher, student at step 0, student now.

    The student's tokens are those that the loss sees: behind the head, under a little noise. A run without alignment
    has neither teacher nor head and no such figure. initial: what is trained, as at step 0; `kept` is the file that its
    tokens are written to or, without it, read from. Without them, or if they are of another clip, there is no such
    panel, and `note` says so.
    """

    name = "correspondence"

    def __init__(self, run: Run, config: ml_collections.ConfigDict, clip: dict, initial, kept: Path | None = None):
        self.run, self.config = run, config
        (self.alignment,) = run.task.alignments[:1]
        self.batch = {name: value[:1] for name, value in clip.items()}
        self.tokens = jax.jit(self._tokens)
        self.initial, self.note = None, ""
        if initial is not None:
            self.initial, _ = fetch(self.tokens(initial, run.frozen, on_device(self.batch)))
            if kept is not None and jax.process_index() == 0:
                self._keep(kept)
        elif kept is not None:
            self._read(kept)

    def _clip(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.batch["video"])).hexdigest()

    def _keep(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, tokens=self.initial, clip=self._clip())
        except OSError as error:  # a full disk: a picture is not worth a run
            with contextlib.suppress(OSError):
                path.unlink()
            self.note = f"warning: {path} could not be written ({error.strerror}); figures will not show step 0"

    def _read(self, path: Path) -> None:
        older = path.with_suffix(".npy")  # which did not say of which clip it is
        try:
            if not path.is_file() and older.is_file():
                self.initial = np.load(older)
                return
            with np.load(path) as kept:
                if str(kept["clip"]) == self._clip():
                    self.initial = kept["tokens"]
                else:
                    self.note = f"figures will not show step 0: {path} is of another clip than the first held-out one"
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            self.note = f"figures will not show step 0: {path} cannot be read"

    def _tokens(self, trainable, frozen, batch):
        noise = fixed_noise(self.run, 0, 1)
        fractions = jnp.full((1,), FIGURE_FRACTION)
        student, target = self.run.task.compared_tokens(self.alignment, trainable, frozen, batch, noise, fractions)
        return student[0], target[0]

    def __call__(self, trainable, step: int, path: Path | None) -> Figure:
        """The figure of step `step`, written as PNG to `path` too (None: not)."""
        a = self.alignment
        student, target = fetch(self.tokens(trainable, self.run.frozen, on_device(self.batch)))
        shown = " + ".join(a.teachers) or f"the student's own block {a.teacher_depth}"
        panels = {f"teacher ({shown})": target, "student, step 0": self.initial, f"student, step {step}": student}
        panels = {title: tokens for title, tokens in panels.items() if tokens is not None}
        clip = video.enlarge(self.batch["video"][0], LEAST)
        queries = correspondence.moving_queries(clip, a.grid, QUERIES)
        return correspondence.correspondence_figure(clip, panels, queries, a.settings.temperature, path)


class PredictedFlow:
    """The figure of the task motion_subspace: true and predicted flow of one held-out clip."""

    name = "flow"

    def __init__(self, run: Run, clip: dict):
        self.batch = {name: value[:1] for name, value in clip.items()}
        self.ask = panels(run, run.frozen, on_device(self.batch), self.batch["video"].shape[2:4])

    def __call__(self, trainable, step: int | None, path: Path | None) -> Figure:
        """The figure of step `step`, which its title names, written as PNG to `path` too (None: not)."""
        rows = {name: fetch(flow) for name, flow in self.ask(trainable["model"]).items()}
        title = "" if step is None else f"step {step}"
        return flow_figure(video.enlarge(self.batch["video"][0], LEAST), rows, path, title=title)
