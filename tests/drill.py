"""The fault drill: a training run is killed again and again, and nothing that was saved may be lost.

    python -m tests.drill --kills 50

Starts `jaxalign.main` on a tiny config, kills it by SIGKILL at random moments, most of them inside a save, and gives
the same command again. Each time: what bears a manifest is whole, at most one save was under way, and the next start
goes on from the newest whole checkpoint. In the end the state is bit for bit, and the losses logged are number for
number, those of a run that nobody disturbed. About 3 s a kill on two cores; `--fresh` starts a new interpreter each
time (and 3 s more), where otherwise children of one are forked that has done its imports and touched no device.
"""

import argparse
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxalign.interop import sealed
from jaxalign.training.restore import METADATA, find_checkpoint, load_params, read_metadata, step_folders
from jaxalign.training.tensorboard import read_scalars

ROOT = Path(__file__).parents[1]
EVERY = 4  # steps between two saves
NEVER = 10**6
FLAGS = dict(
    batch_size=2,
    log_every=1,
    sample_every=NEVER,
    eval_every=NEVER,
    **{
        "checkpoint.every": EVERY,
        "checkpoint.keep": 2,
        "sample.steps": 1,
        "sample.count": 1,
        "data.source": "synthetic",
    },
    **{f"data.{name}": size for name, size in dict(num_frames=2, height=16, width=16, stride=1).items()},
)
# A student of 2 blocks of width 32 on 8 tokens: what a start costs is then little but Python.
TINY = {"model.width": 32, "model.depth": 2, "data.height": 8, "data.width": 8}
INSIDE = 0.7  # share of the kills that wait for a save to begin; of the others some meet one too
PATIENCE = 120.0  # seconds after which a run that shows nothing counts as stuck


class Count(NamedTuple):
    """What a drill saw."""

    kills: int
    inside: int  # with a checkpoint begun and not sealed
    before: int  # before the run had done a step
    lost: int  # the most steps, logged as done, that had to be done again
    steps: int
    leaves: int

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.inside} of them inside a save and {self.before} before a step was done: "
            f"at most {self.lost} steps lost (a save every {EVERY}), no damaged checkpoint picked; after {self.steps} "
            f"steps all {self.leaves} leaves of the state equal the undisturbed run's bit for bit"
        )


# ---- the run that is drilled


def command(workdir: Path, steps: int, tiny: bool) -> list[str]:
    """The arguments of jaxalign.main."""
    changes = FLAGS | (TINY if tiny else {}) | {"steps": steps}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    # The ladder's config is the one whose width and depth are fields.
    config = "configs/scaling.py" if tiny else "configs/baseline.py"
    return ["--config", config, "--workdir", str(workdir), *flags]


def run_in_child(arguments: list[str], output: str, cache: str, fresh: bool) -> None:
    """`python -m jaxalign.main` in this forked process; its words go to the file `output`."""
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if fresh:
        os.execv(sys.executable, [sys.executable, "-m", "jaxalign.main", *arguments])
    # JAX has read its variables already.
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from jaxalign import main
    from jaxalign.training import config as config_lib

    sys.argv = ["jaxalign.main", *arguments]
    config_lib.run_verb(main.main)


def starter(home: Path, fresh: bool, tiny: bool):
    """start(workdir, steps) -> (process, the file of its output)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxalign.main"])

    def start(workdir: Path, steps: int):
        output = home / "output.txt"
        output.unlink(missing_ok=True)
        process = context.Process(
            target=run_in_child, args=(command(workdir, steps, tiny), str(output), str(home / "cache"), fresh)
        )
        process.start()
        return process, output

    return start


# ---- the moment of a kill


def under_way(checkpoints: Path) -> tuple[int, int] | None:
    """(step, time) of the save that was begun last, if it is not sealed: a kill now is a kill inside a save."""
    steps = step_folders(checkpoints)
    folder = checkpoints / str(max(steps, default=0))
    try:
        begun = (folder / METADATA).stat().st_mtime_ns
        return None if (folder / sealed.NAME).exists() else (int(folder.name), begun)
    except FileNotFoundError:  # not begun, or just being removed
        return None


def until(condition, process) -> bool:
    """Wait until the condition holds; False if the process ends before. RuntimeError when neither happens."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.exitcode is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the run was stuck for {PATIENCE:g} s")
        time.sleep(0.002)
    return True


def wait_for_a_moment(process, checkpoints: Path, moments: random.Random, usual: tuple[float, float]) -> float:
    """Return at the moment of the kill; `usual` are the seconds from a start to its first save, and of a save.

    Gives the seconds to the first save as they were this time, or the usual ones where nobody looked.
    """
    start, first = time.monotonic(), usual[0]
    if moments.random() >= INSIDE:
        end = start + moments.uniform(0, 1.5 * usual[0])
        until(lambda: time.monotonic() > end, process)
        return first
    seen = under_way(checkpoints)  # what the last kill left
    for k in range(moments.choice((1, 1, 2, 3))):
        if not until(lambda seen=seen: under_way(checkpoints) not in (None, seen), process):
            return first
        first = time.monotonic() - start if k == 0 else first
        seen = under_way(checkpoints)
    time.sleep(moments.uniform(0, usual[1]))
    return first


def time_of_saves(process, checkpoints: Path) -> tuple[float, float]:
    """Seconds from now to the first save, and of that save."""
    start = time.monotonic()
    until(lambda: under_way(checkpoints), process)
    begun = time.monotonic()
    until(lambda: (checkpoints / str(EVERY) / sealed.NAME).exists(), process)
    return begun - start, time.monotonic() - begun


# ---- what must hold


def check_disk(workdir: Path) -> tuple[int, int]:
    """(newest sealed step, steps logged as done since) after a kill; AssertionError if what bears a seal is broken."""
    checkpoints = workdir / "checkpoints"
    steps = step_folders(checkpoints)
    with_seal = [step for step in steps if (checkpoints / str(step) / sealed.NAME).exists()]
    for step in with_seal:
        damage = sealed.find_damage(checkpoints / str(step))
        assert damage is None, f"checkpoint {step} bears a manifest, but {damage}"
    newest = max(with_seal, default=0)
    begun = max(steps, default=0)
    assert begun - newest <= EVERY, f"saves were begun up to step {begun}, but only {newest} is sealed"
    done = max((row["step"] for row in read_scalars(workdir / "tensorboard")), default=0)
    # A save waits for the one before it, so the run is never two of them ahead.
    assert done - newest <= 2 * EVERY, f"{done} steps were done, but only {newest} are saved"
    return newest, max(done - newest, 0)


def check_start(said: str, newest: int, checkpoints: Path) -> None:
    """A start said that it goes on from the newest sealed step, and passed over nothing but unfinished saves."""
    if where := re.search(r"from scratch|resumed at step (\d+)", said):  # else it was killed before it said so
        assert int(where[1] or 0) == newest, f"checkpoint {newest} is whole, but the run goes on from {where[0]}"
    for skipped in re.findall(r"skipped the damaged checkpoint (.*)", said):
        assert "it has no manifest" in skipped, skipped
    assert "Traceback" not in said and "was not written" not in said, said


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint."""
    names = read_metadata(find_checkpoint(workdir))["leaves"]
    wanted = {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, (dtype, shape) in names.items()}
    return {k: np.asarray(v) for k, v in load_params(workdir, wanted, source="")[0].items()}


def assert_same_end(one: Path, two: Path) -> int:
    """The newest checkpoints are equal bit for bit; the number of their leaves."""
    a, b = leaves(one), leaves(two)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), f"{name} differs"
    return len(a)


# ---- the drill


def drill(
    home: Path,
    *,
    kills: int,
    least: int = 0,
    seed: int = 0,
    seconds: float = 3600.0,
    fresh: bool = False,
    tiny: bool = False,
    say=print,
) -> Count:
    """Kill a run `kills` times (fewer when the `seconds` are over, then it may finish) and check it each time.

    It goes on until `least` kills have met a save. `home` is an empty folder for the runs and their cache of compiled
    programs; `tiny`: the run is the smallest one. Raises AssertionError, which says what was lost, and RuntimeError
    when a run hangs.
    """
    moments, deadline = random.Random(seed), time.monotonic() + seconds
    steps = EVERY * (2 + kills)  # so that the kills are over before the run is
    start = starter(home, fresh, tiny)
    whole, workdir = home / "undisturbed", home / "killed"
    process, output = start(whole, steps)
    usual = time_of_saves(process, whole / "checkpoints")
    process.join()
    assert process.exitcode == 0, output.read_text()
    say(f"undisturbed: {usual[0]:.1f} s to the first save, {usual[1]:.2f} s a save")

    killed = inside = before = lost = 0
    while (killed < kills or inside < least) and time.monotonic() < deadline:
        newest = check_disk(workdir)[0]
        process, output = start(workdir, steps)
        first = wait_for_a_moment(process, workdir / "checkpoints", moments, usual)
        usual = min(first, usual[0]), usual[1]  # the undisturbed run had to compile
        process.kill()
        process.join()
        said = output.read_text() if output.exists() else ""
        assert process.exitcode in (0, -9), said
        check_start(said, newest, workdir / "checkpoints")
        if process.exitcode == 0:  # it was faster than the drill: on with a new one
            assert_same_end(whole, workdir)
            shutil.rmtree(workdir)
            continue
        killed += 1
        inside += under_way(workdir / "checkpoints") is not None
        before += "step " + str(newest + 1) + "/" not in said
        now, gone = check_disk(workdir)
        lost = max(lost, gone)
        say(f"kill {killed}: sealed {now} (was {newest}), {gone} steps to do again")
    newest = check_disk(workdir)[0]
    process, output = start(workdir, steps)
    process.join()
    assert process.exitcode == 0, output.read_text()
    check_start(output.read_text(), newest, workdir / "checkpoints")
    number = assert_same_end(whole, workdir)
    one, two = ({row["step"]: row["train/loss"] for row in read_scalars(w / "tensorboard")} for w in (whole, workdir))
    assert all(one[step] == loss for step, loss in two.items()), "a step logged another loss than undisturbed"
    return Count(killed, inside, before, lost, steps, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no more kills after so many")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter each time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drill-") as home:
        count = drill(Path(home), kills=args.kills, seed=args.seed, seconds=args.seconds, fresh=args.fresh)
    print(count)


if __name__ == "__main__":
    main()
