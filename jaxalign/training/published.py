"""A published CogVideoX folder, as diffusers writes it, ready to be sampled from: no run, no config.

FOLDER/model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/scheduler_config.json
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign import codecs
from jaxalign.codecs import folder as parts
from jaxalign.diffusion import PROCESSES, VPrediction
from jaxalign.interop import mapping
from jaxalign.models import cogvideox, cogvideox_folder
from jaxalign.tasks.denoising import DenoisingTask

SAMPLERS = {"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm"}
# What our process is built as; a scheduler that says otherwise is another one (diffusers' defaults where it is silent).
_SAME = dict(
    beta_schedule=("scaled_linear", "scaled_linear"),
    prediction_type=("v_prediction", "epsilon"),
    timestep_spacing=("trailing", "leading"),
    set_alpha_to_one=(True, True),
    clip_sample=(False, True),
    thresholding=(False, False),
    trained_betas=(None, None),
)

VAE = ("AutoencoderKLCogVideoX",)
_HOW = ("tiling", "tile", "overlap", "remat")  # of a codec's config: how it computes, not which latents


class Process(NamedTuple):
    """What scheduler_config.json says."""

    process: VPrediction
    sampler: str


class Published(NamedTuple):
    """The static side of a folder; `load` brings its weights."""

    task: DenoisingTask
    sampler: str
    model_config: cogvideox.CogVideoXConfig
    codec: Any  # abstract
    video_shape: tuple[int, int, int]  # frames, height, width
    latent_shape: tuple[int, int, int, int]
    extra: int  # latent frames that 1.5 draws in front, to fill its last patch, and that are dropped
    folder: Path


def read_scheduler(path: str | Path) -> Process:
    """The process and sampler of FOLDER/scheduler/scheduler_config.json. Raises FileNotFoundError, or ValueError for a
    scheduler that is not CogVideoX's or settings that our process does not have."""
    path = Path(path) / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; it says how the model was trained to denoise")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a scheduler's config ({error})") from None
    if kind not in SAMPLERS:
        raise ValueError(f"{path}: this is a {kind}; {' or '.join(SAMPLERS)} is wanted")
    for name, (ours, default) in _SAME.items():
        if found.get(name, default) != ours:
            raise ValueError(f"{path}: {name} is {found.get(name, default)!r}; only {ours!r} is sampled from here")
    process = VPrediction(
        num_train_timesteps=found.get("num_train_timesteps", 1000),
        beta_start=found.get("beta_start", 0.00085),
        beta_end=found.get("beta_end", 0.012),
        snr_shift=found.get("snr_shift_scale", 3.0),
        zero_terminal_snr=found.get("rescale_betas_zero_snr", False),
    )
    return Process(process, SAMPLERS[kind])


def other_process(path: str | Path, process: Any) -> str:
    """How the process of a folder's scheduler/ and that of a run differ, in words with both; '' where they are one.

    Raises as `read_scheduler`.
    """
    theirs = read_scheduler(path).process
    if not isinstance(process, VPrediction):
        objective = next(name for name, kind in PROCESSES.items() if isinstance(process, kind))
        return f"objective = 'v' (the run's is {objective!r})"
    both = [(f.name, getattr(theirs, f.name), getattr(process, f.name)) for f in dataclasses.fields(VPrediction)]
    return ", ".join(f"{name} = {there!r} (the run's is {here!r})" for name, there, here in both if there != here)


def other_codec(path: str | Path, codec: Any) -> str:
    """How a folder's vae/ and the codec of a run, by what their configs say, differ, in words with both; '' where they
    do not. Raises as `codecs.abstract`."""
    theirs, ours = codecs.abstract("cogvideox_2b", path).config, getattr(codec, "config", None)
    if type(ours) is not type(theirs):
        return f"is {VAE[0]} (the run's codec is {type(codec).__name__})"
    names = [field.name for field in dataclasses.fields(theirs) if field.name not in _HOW]
    both = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    differ = ", ".join(f"{name} = {there!r} (the run's is {here!r})" for name, there, here in both if there != here)
    return differ and f"says {differ}"


def vae_weights(path: str | Path) -> Path:
    """The file of a folder's vae/ that is read, or the index of its shards. Raises as `folder.read`."""
    return Path(parts.read(path, "vae", VAE)[1].source)


def describe(
    path: str | Path,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: Any = jnp.float32,
    tiling: bool = True,
) -> Published:
    """What a folder holds, for clips of a size (default: that of its training); no weights are read.

    CogVideoX 1.5 names no size and is drawn at 768x1360, as by upstream's command (CogVideo, inference/cli_demo.py).
    Raises ValueError or FileNotFoundError, one line: another model's folder, parts that are not there, a size that does
    not divide (the nearest is said).
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give the published one, with transformer/ and vae/ in it")
    upstream, _ = parts.read(path, "transformer", (cogvideox_folder.CLASS,))
    settings = cogvideox_folder.settings_from(upstream)
    if settings["image_channels"]:
        raise ValueError(f"{path}: this transformer is told an image too; only text to video is sampled here")
    process, sampler = read_scheduler(path)
    codec = codecs.abstract("cogvideox_2b", path, tiling=tiling)
    side, patch = codec.config.side_factor, settings["patch_size"]
    usual = [length * side for length in cogvideox_folder.usual_size(upstream)]
    size = (height or usual[0], width or usual[1])
    if any(length % (side * patch) for length in size):
        near = "x".join(str(max(1, round(length / side / patch)) * side * patch) for length in size)
        raise ValueError(f"{size[0]}x{size[1]}: height and width must be multiples of {side * patch}; write {near}")
    video_shape = (num_frames or upstream.get("sample_frames", 49), *size)
    t, h, w, c = codec.latent_shape(video_shape)
    extra = -t % (settings["patch_size_t"] or 1)
    config = cogvideox.CogVideoXConfig(input_size=(h, w), num_frames=t + extra, **settings)
    if config.in_channels != c:
        raise ValueError(f"{path}: its transformer takes {config.in_channels} channels, but its vae/ gives {c}")
    task = DenoisingTask(process=process, text=True, dtype=dtype)
    return Published(task, sampler, config, codec, video_shape, (t + extra, h, w, c), extra, path)


def load(published: Published, *, sharding: Any = None) -> tuple[Any, Any]:
    """(student, codec) with their weights in the task's dtype, of each leaf what `sharding` says."""
    dtype, path = published.task.dtype, published.folder
    _, arrays = parts.read(path, "transformer", (cogvideox_folder.CLASS,))
    config = published.model_config
    abstract = jax.eval_shape(lambda: cogvideox.CogVideoX(config, rngs=nnx.Rngs(0)))
    rules = cogvideox.weight_rules(config)
    try:
        model = mapping.load_state_dict(abstract, arrays, rules, dtype=dtype, sharding=sharding)
    except ValueError as error:
        raise ValueError(f"{path}/transformer: {error}") from None
    tiling = published.codec.config.tiling
    return model, codecs.load("cogvideox_2b", path, dtype=dtype, sharding=sharding, tiling=tiling)


def read_sizes(path: str | Path) -> dict[str, Any]:
    """The sizes of a student, as a preset has them, out of a folder's transformer/config.json."""
    if not path or not Path(path).is_dir():
        raise FileNotFoundError(
            f"config.model.preset = 'folder' takes its sizes from --config.init_from.path=FOLDER; {str(path)!r} is none"
        )
    upstream, _ = parts.read(path, "transformer", (cogvideox_folder.CLASS,))
    return cogvideox_folder.settings_from(upstream)
