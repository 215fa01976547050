"""Videos from a run or from a published folder.

python -m jaxalign.sample --workdir runs/... [--count 16] [--labels 3,7]
python -m jaxalign.sample --workdir runs/... --prompts FILE [--count 4] [--seed 0]
python -m jaxalign.sample --folder CogVideoX-2b --prompt "a panda plays the guitar" --out videos

The newest whole checkpoint of a run is taken, or that of --workdir RUN/checkpoints/STEP; its averaged weights unless
--weights raw. The same seed gives the same videos. Without prompts: an MP4 a clip, and of the first 64 a GIF grid and a
PNG of film strips, in WORKDIR/samples/step_STEP_WEIGHTS_seed_SEED (or --out). Prompts (--prompts FILE, one a line;
--prompt TEXT, as often as you like): an MP4 for each of --count seeds of each prompt, in WORKDIR/samples/prompts (or
--out); several processes share the list: --num_processes=N --process_id=K on each, or a launcher, as precompute. Every
video has its name, and a line in index.jsonl, as soon as it is drawn; the same command goes on where it was stopped.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from jaxalign import precompute
from jaxalign.training import config as config_lib
from jaxalign.training import drawn, processes, prompted, prompts, setup, showing
from jaxalign.training.data_settings import classes_of
from jaxalign.training.restore import find_checkpoint
from jaxalign.training.trained import open_run, read_config, workdir_of


def draw(
    workdir: str | Path,
    *,
    out: str | Path | None = None,
    weights: str = "ema",
    count: int = 16,
    at_once: int = 4,
    seed: int = 0,
    labels: Sequence[str] = (),
    **settings,
) -> list[Path]:
    """Sample `count` videos of a run, or of one of its checkpoints, and return the files, the sheet's first.

    `labels` are classes by name or number, taken in turn (none: all classes in turn). `settings` override the run's
    own: sampler, steps, guidance_scale, fps. What `out` has of them is not drawn again; of more than `count` none
    stays. Raises ValueError or FileNotFoundError, one line, for what does not fit.
    """
    home = workdir_of(workdir)
    checkpoint = find_checkpoint(workdir)
    # No teacher is loaded: sampling asks none.
    unaligned = {"align": {"method": "none"}}
    config, run, trainable = open_run(home, weights=weights, checkpoint=checkpoint, overrides=unaligned)
    fps = settings.pop("fps", config.sample.fps)  # may be a fraction, which the config's field cannot
    config.sample.update(count=count, seed=seed, **settings)
    classes = class_numbers(labels, config, run) if labels else None
    sampler = showing.Sampler(run, config, labels=classes)
    out = Path(out) if out else home / "samples" / f"step_{int(checkpoint.name):06d}_{weights}_seed_{seed}"
    settings = {name: config.sample[name] for name in showing.SAMPLING} | {"fps": fps}
    same = dict(seed=seed, at_once=at_once, **drawn.of_checkpoint(checkpoint, weights), **settings)
    told = [None] * count if sampler.told is None else sampler.told.tolist()
    files = [out / f"{k:04d}.mp4" for k in range(count)]
    rows = {path.name: dict(file=path.name, label=label, **same) for path, label in zip(files, told, strict=True)}
    missing = drawn.missing(out, rows)
    print(f"sampling {count} videos with the {'averaged (EMA)' if weights == 'ema' else 'raw'} weights into {out}")
    if len(missing) < count:
        print(f"{count - len(missing)} of {count} videos are there already")
    _remove_others(out, files)
    wanted = {k for k, path in enumerate(files) if path.name in missing}
    for numbers, clips in sampler.batches(trainable["model"], run.frozen, at_once=at_once, wanted=wanted):
        for k, clip in zip(numbers, clips, strict=True):
            if k in wanted:
                showing.write_clip(files[k], clip, fps)
                drawn.append(drawn.index(out), rows[files[k].name])
    return [*showing.write_sheet(out, "all", files, fps), *files]


def _remove_others(out: Path, files: Sequence[Path]) -> None:
    """Of an earlier call's videos those that are not among `files`; whatever else the folder holds stays."""
    known, sheet = drawn.known(out), out / "all.mp4"
    before = sheet.is_file() and sheet.with_suffix(".png").is_file()  # written when there was no index yet
    for path in set(out.glob("*.mp4")) - set(files):
        numbered = path.stem.isdecimal() and f"{int(path.stem):04d}" == path.stem
        if numbered and (before or path.name in known):
            path.unlink()
    if before:
        sheet.unlink()


def class_numbers(labels: Sequence[str], config, run) -> list[int]:
    """Classes by name or number as numbers. Raises ValueError for a class that the run does not have."""
    if not run.task.num_classes:
        raise ValueError("--labels: this run is unconditional (model.num_classes = 0)")
    names = () if all(label.isdigit() for label in labels) else classes_of(config)
    for label in labels:
        if label not in names and not (label.isdigit() and int(label) < run.task.num_classes):
            known = f"0..{run.task.num_classes - 1}" + (f" or {', '.join(names[:8])} ..." if names else "")
            raise ValueError(f"--labels: {label!r} is no class of this run; write {known}")
    return [names.index(label) if label in names else int(label) for label in labels]


def draw_prompts(
    subject: prompted.Subject,
    asked_prompts: Sequence[str],
    out: str | Path,
    *,
    count: int = 1,
    seed: int = 0,
    at_once: int = 0,
    share: tuple[int, int] = (0, 1),
    **changes,
) -> list[Path]:
    """`count` videos of each prompt from a run or a folder (`prompted.of_run`, `of_folder`); all their files.

    `share` as in `prompted.draw`. `changes` override its own settings: sampler, steps, guidance_scale,
    dynamic_guidance, fps.
    """
    asked = prompted.ask(asked_prompts, count=count, seed=seed)
    print(f"sampling {len(asked)} videos of {len(asked_prompts)} prompts from {subject.name} into {out}")
    return prompted.draw(subject, asked, out, at_once=at_once, share=share, **changes)


def main(argv: list[str]) -> int:
    given = flags.FLAGS
    if len(argv) > 1:
        raise ValueError(f"{argv[1]!r}: not understood; options start with --, e.g. --prompt 'a panda'")
    if (given.workdir is None) == (given.folder is None):
        raise ValueError(
            "give --workdir, the folder of a run (runs/tsa-demo-1a2b3c4d), or --folder, a published one (CogVideoX-2b)"
        )
    share = precompute.share(given)
    with processes.leaving_at_once():
        return sample(given, share)


def sample(given: flags.FlagValues, share: tuple[int, int]) -> int:
    """What the command line asks, as one of several processes; the exit status."""
    names = ("sampler", "steps", "guidance_scale", "dynamic_guidance", "fps")
    changes = {k: given[k].value for k in names if given[k].value is not None}
    words = [*(prompted.read_prompts(given.prompts) if given.prompts else ()), *given.prompt]
    if given.folder is None and not setup.is_told_by_text(read_config(given.workdir)):
        if words:
            raise ValueError("--prompts: the student of this run is not told by text; --labels says classes")
        if share[1] > 1:
            raise ValueError("several processes share prompts only: sample from this run, which has none, with one")
        options = dict(weights=given.weights, seed=given.seed, labels=given.labels, out=given.out)
        paths = draw(given.workdir, count=given.count or 16, at_once=given.at_once or 4, **options, **changes)
        print("\n".join(map(str, paths[:2])))
        return 0
    if given.labels:
        raise ValueError("--labels: the student is told by text; give --prompts FILE or --prompt TEXT")
    if given.folder is None:
        words = words or prompts.of_run(read_config(given.workdir))
        subject = prompted.of_run(given.workdir, weights=given.weights)
    else:
        precision = given.precision or ("fp32" if jax.default_backend() == "cpu" else "bf16")
        size = {name: given[name].value for name in ("num_frames", "height", "width")}
        subject = prompted.of_folder(given.folder, dtype=setup.DTYPES[precision], tiling=given.tiling, **size)
    home = "runs/prompts" if given.workdir is None else workdir_of(given.workdir)
    out = Path(given.out) if given.out else Path(home) / "samples" / "prompts"
    options = dict(count=given.count or 1, seed=given.seed, at_once=given.at_once, share=share)
    paths = draw_prompts(subject, words, out, **options, **changes)
    print("\n".join([str(path) for path in paths if path.is_file()][:8]))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run to sample from, or one checkpoint of it: RUN/checkpoints/STEP.")
    flags.DEFINE_string(
        "folder", None, "Or the published folder (model_index.json, transformer/, vae/, text_encoder/ …)."
    )
    flags.DEFINE_string("prompts", None, "A file with a prompt a line.")
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
    flags.DEFINE_string(
        "out",
        None,
        "Folder for the videos; default: WORKDIR/samples/step_STEP_WEIGHTS_seed_SEED or WORKDIR/samples/prompts.",
    )
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The averaged student or the last one.")
    flags.DEFINE_integer("count", 0, "How many videos, or how many of each prompt; 0: 16, or 1.", lower_bound=0)
    flags.DEFINE_integer("at_once", 0, "How many at a time; 0: 4, or with prompts one a device.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the noise; with prompts the first of --count seeds.")
    flags.DEFINE_list("labels", [], "Classes, by name or number, taken in turn; default: all in turn.")
    flags.DEFINE_string("sampler", None, "ddim, ddpm, dpm or euler; default: the run's or the folder's own.")
    flags.DEFINE_integer("steps", None, "Calls of the network a video; default: the run's sample.steps, a folder's 50.")
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance; default: the run's, a folder's 6.")
    flags.DEFINE_bool("dynamic_guidance", None, "Upstream's use_dynamic_cfg.")
    flags.DEFINE_float("fps", None, "Frames a second of the MP4; default: the run's, a folder's 8.")
    flags.DEFINE_integer("num_frames", None, "With --folder: frames of a video; default: as it was trained.")
    flags.DEFINE_integer("height", None, "With --folder: likewise.")
    flags.DEFINE_integer("width", None, "With --folder: likewise.")
    flags.DEFINE_enum("precision", None, ["fp32", "bf16"], "With --folder; default: bf16, on a CPU fp32.")
    flags.DEFINE_bool("tiling", True, "With --folder: decode in tiles, which bounds the memory.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; only where processes have to know of each other.")
    flags.DEFINE_integer("num_processes", None, "How many processes share the prompts.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    flags.DEFINE_bool("detect_cluster", False, "Ask JAX who the other processes are (TPU VMs outside of GKE).")
    config_lib.run_verb(main)
