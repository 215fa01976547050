"""Videos from a checkpoint: `python -m jaxalign.sample --workdir runs/... [--count 16] [--labels 3,7]`.

Writes one MP4 a clip, an MP4 grid of all and a PNG of film strips into WORKDIR/samples/STEP-SEED (or --out). The newest
whole checkpoint is taken, its averaged weights unless --weights raw. The same seed gives the same videos.
"""

from pathlib import Path

import jax
from absl import flags

from jaxalign.training import config as config_lib

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The run to sample from.")
    flags.DEFINE_string("out", None, "Folder for the videos; default: WORKDIR/samples/seed_SEED.")
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The averaged student or the last one.")
    flags.DEFINE_integer("count", 16, "How many videos.", lower_bound=1)
    flags.DEFINE_integer("batch", 4, "How many at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_list("labels", [], "Classes, by name or number, taken in turn; default: all in turn.")
    flags.DEFINE_string("sampler", "", "ddim, ddpm or euler; default: the objective's own.")
    flags.DEFINE_integer("steps", None, "Calls of the network a video; default: the config's sample.steps.")
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance; default: the config's.")


def main(argv: list[str]) -> int:
    if FLAGS.workdir is None:
        raise ValueError("--workdir is missing: give the folder of a run, e.g. --workdir runs/tsa-demo-1a2b3c4d")
    from jaxalign.training import showing
    from jaxalign.training.trained import open_run

    workdir = Path(FLAGS.workdir)
    config, run, trainable = open_run(workdir, weights=FLAGS.weights)
    settings = dict(sampler=FLAGS.sampler or config.sample.sampler, count=FLAGS.count, seed=FLAGS.seed)
    settings |= {k: v for k in ("steps", "guidance_scale") if (v := FLAGS[k].value) is not None}
    config.sample.update(settings)
    out = Path(FLAGS.out) if FLAGS.out else workdir / "samples" / f"seed_{FLAGS.seed}"
    print(f"sampling {FLAGS.count} videos with the {'averaged (EMA)' if FLAGS.weights == 'ema' else 'raw'} weights")
    videos = showing.Sampler(run, config, labels=_labels(config, run))(
        trainable["model"], jax.device_put(run.frozen), at_once=FLAGS.batch
    )
    for path in showing.write_samples(out, "all", videos, config.sample.fps, single=True):
        print(path)
    return 0


def _labels(config, run) -> list[int] | None:
    """The classes that were asked for, as numbers."""
    if not FLAGS.labels:
        return None
    if not run.task.num_classes:
        raise ValueError("--labels: this run is unconditional (model.num_classes = 0)")
    from jaxalign.data.sources import open_source

    names = None
    numbers = []
    for label in FLAGS.labels:
        if not label.isdigit():
            names = open_source(config.data.source).classes if names is None else names
            if label not in names:
                raise ValueError(f"--labels: no class {label!r}; there are {', '.join(names[:10])} ...")
            label = names.index(label)
        if int(label) >= run.task.num_classes:
            raise ValueError(f"--labels: {label} is no class; there are 0..{run.task.num_classes - 1}")
        numbers.append(int(label))
    return numbers


if __name__ == "__main__":
    define_flags()
    config_lib.run_verb(main)
