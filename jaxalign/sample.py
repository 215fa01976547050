"""Videos from a checkpoint: `python -m jaxalign.sample --workdir runs/... [--count 16] [--labels 3,7]`.

Writes an MP4 a clip, an MP4 grid of all and a PNG of film strips into WORKDIR/samples/seed_SEED (or --out). The newest
whole checkpoint is taken, its averaged weights unless --weights raw. The same seed gives the same videos.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxalign.data.sources import open_source
from jaxalign.training import config as config_lib
from jaxalign.training import showing
from jaxalign.training.trained import open_run


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
    """Sample `count` videos of a run and return the files written, the grid first.

    `labels` are classes by name or number, taken in turn (none: all classes in turn). `settings` override the run's
    own: sampler, steps, guidance_scale. Raises ValueError or FileNotFoundError, one line, for what does not fit.
    """
    workdir = Path(workdir)
    config, run, trainable = open_run(workdir, weights=weights)
    config.sample.update(count=count, seed=seed, **settings)
    numbers = class_numbers(labels, config, run) if labels else None
    out = Path(out) if out else workdir / "samples" / f"seed_{seed}"
    print(f"sampling {count} videos with the {'averaged (EMA)' if weights == 'ema' else 'raw'} weights into {out}")
    videos = showing.Sampler(run, config, labels=numbers)(trainable["model"], run.frozen, at_once=at_once)
    return showing.write_samples(out, "all", videos, config.sample.fps, single=True)


def class_numbers(labels: Sequence[str], config, run) -> list[int]:
    """Classes by name or number as numbers. Raises ValueError for a class that the run does not have."""
    if not run.task.num_classes:
        raise ValueError("--labels: this run is unconditional (model.num_classes = 0)")
    names = () if all(label.isdigit() for label in labels) else open_source(config.data.source).classes
    for label in labels:
        if label not in names and not (label.isdigit() and int(label) < run.task.num_classes):
            known = f"0..{run.task.num_classes - 1}" + (f" or {', '.join(names[:8])} ..." if names else "")
            raise ValueError(f"--labels: {label!r} is no class of this run; write {known}")
    return [names.index(label) if label in names else int(label) for label in labels]


def main(argv: list[str]) -> int:
    given = flags.FLAGS
    if given.workdir is None:
        raise ValueError("--workdir is missing: give the folder of a run, e.g. --workdir runs/tsa-demo-1a2b3c4d")
    settings = {k: given[k].value for k in ("sampler", "steps", "guidance_scale") if given[k].value is not None}
    paths = draw(
        given.workdir,
        out=given.out,
        weights=given.weights,
        count=given.count,
        at_once=given.at_once,
        seed=given.seed,
        labels=given.labels,
        **settings,
    )
    print("\n".join(map(str, paths[:2])))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run to sample from.")
    flags.DEFINE_string("out", None, "Folder for the videos; default: WORKDIR/samples/seed_SEED.")
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The averaged student or the last one.")
    flags.DEFINE_integer("count", 16, "How many videos.", lower_bound=1)
    flags.DEFINE_integer("at_once", 4, "How many at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_list("labels", [], "Classes, by name or number, taken in turn; default: all in turn.")
    flags.DEFINE_string("sampler", None, "ddim, ddpm or euler; default: the run's own.")
    flags.DEFINE_integer("steps", None, "Calls of the network a video; default: the run's sample.steps.")
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance; default: the run's.")
    config_lib.run_verb(main)
