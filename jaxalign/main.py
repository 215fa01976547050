"""Train a config, or go on with it.

python -m jaxalign.main --config configs/tsa.py [--workdir DIR] [--config.key=value]

The scale stands after a colon: `--config configs/tsa.py:vdit_l`. The same command resumes. Exit status: 0 finished,
2 a mistake in the input, 130 or 143 stopped by Ctrl-C or SIGTERM with everything saved.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxalign.training import config as config_lib
from jaxalign.training import loop

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with a scale after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/<config>-<scale>-<hash>.")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Show the resolved config and stop.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print shapes, grids, parameters and memory; train nothing.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"{argv[1]!r}: not understood; options start with --, e.g. --config configs/tsa.py")
    if CONFIG.value is None:
        raise ValueError("--config is missing; write for example --config configs/tsa.py")
    config = config_lib.resolve(CONFIG.value)
    if PRINT_CONFIG.value:
        print(config)
        return 0
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(WORKDIR.value) if WORKDIR.value else config_lib.default_workdir(config, name)
    if DRY_RUN.value:
        return loop.dry_run(config)
    return loop.train(config, workdir)


if __name__ == "__main__":
    config_lib.run_verb(main)
