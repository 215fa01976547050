"""Train a config, or go on with it.

python -m jaxalign.main --config configs/tsa.py [--workdir DIR] [--config.key=value]

The scale stands after a colon: `--config configs/tsa.py:vdit_l`. The same command resumes. Exit status: 0 finished,
2 a mistake in the input, 3 another process was lost, 130 or 143 stopped by Ctrl-C or SIGTERM with everything saved.

On several machines every process runs the same command. Slurm (srun), Open MPI and TPU slices on GKE are detected, TPU
VMs elsewhere with --detect_cluster; anything else says --coordinator=HOST:PORT --num_processes=N --process_id=K, or
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. The workdir must be one folder that all of them see.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxalign.training import config as config_lib
from jaxalign.training import loop, processes

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with a scale after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/<config>-<scale>-<hash>.")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Show the resolved config and stop.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print shapes, grids, parameters and memory; train nothing.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where there are several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes make this run together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
DETECT = flags.DEFINE_bool("detect_cluster", False, "Ask JAX who the other processes are (TPU VMs outside of GKE).")
LOST_AFTER = flags.DEFINE_integer("lost_after", 60, "Seconds of silence after which a process counts as lost.")
HANG_AFTER = flags.DEFINE_integer(
    "hang_after", 600, "Seconds without a step after which the stacks are shown; 0: never."
)
PROFILE = flags.DEFINE_integer("profile", 0, "Trace so many steps, for TensorBoard's profile plugin (xprof).")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"{argv[1]!r}: not understood; options start with --, e.g. --config configs/tsa.py")
    if CONFIG.value is None:
        raise ValueError("--config is missing; write for example --config configs/tsa.py")
    config = config_lib.resolve(CONFIG.value, without_source=PRINT_CONFIG.value)
    if PRINT_CONFIG.value:
        print(config)
        return 0
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(WORKDIR.value) if WORKDIR.value else config_lib.default_workdir(config, name)
    if DRY_RUN.value:
        return loop.dry_run(config)
    processes.join(
        COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, detect=DETECT.value, timeout=LOST_AFTER.value
    )
    with processes.leaving_at_once():
        return loop.train(config, workdir, hang_after=HANG_AFTER.value, profile_steps=PROFILE.value)


if __name__ == "__main__":
    config_lib.run_verb(main)
