#!/usr/bin/env python3
"""Runs a grid of runs, or submits it: one workdir a point under --root. The same command goes on where it stopped.

python launch/sweep.py --config configs/scaling.py --grid model.width=32,64,128 --grid seed=0,1,2 --root runs/sweep1
python launch/sweep.py --config configs/repa.py --config configs/trd.py --grid seed=0,1,2 --root runs/methods \\
    --point "configs/tsa.py:demo --config.align.method=tsa" --config.steps=200

Points are all --config and --point, each with all values of every --grid; further --config.FIELD=VALUE hold for all of
them. Every point is checked before the first one starts. More values, and further points, may be added to a sweep
later: those that are there keep their workdirs. ROOT/sweep.json says which workdir is which point and how it stands,
ROOT/logs/ has what a run said.

--run=local   one run after another through launch/local.sh, or --jobs at once, which share the GPUs evenly, or the
              cores where there are none: two small runs on a core each are faster than one after the other on two
--run=slurm   one job a point through launch/slurm.sbatch; --sbatch="--gpus-per-node=1 …" are options of sbatch
--run=print   the commands of all that is not finished, for any other scheduler

Ctrl-C and SIGTERM are passed on; once more stops at once. Exit status: 0 all finished (or submitted), 1 a point failed
(the others have run), 2 a mistake in the input (or sbatch refused: what was submitted before goes on), 130 or 143
stopped with everything saved.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # configs/ is no part of the installed package

import jax  # noqa: E402
from absl import flags  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from jaxalign.interop.sealed import write_atomic  # noqa: E402
from jaxalign.training import config as config_lib  # noqa: E402
from jaxalign.training import setup  # noqa: E402
from jaxalign.training.report import duration, read_json  # noqa: E402

TAIL = 12  # lines of a failed run's log that are shown


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the sweep; `fields` are the overrides that are its own, in the order of its name."""

    name: str
    config_file: str
    fields: dict[str, str]
    arguments: list[str]  # of jaxalign.main
    workdir: Path
    config: ConfigDict  # resolved


# ---- What is to be run


def overrides(words: list[str], where: str) -> dict[str, str]:
    """['--config.a.b=1'] -> {'a.b': '1'}; ValueError for anything else."""
    found = {}
    for word in words:
        if not (match := re.fullmatch(r"--config\.([\w.]+)=(.*)", word, re.DOTALL)):
            raise ValueError(f"{where}: {word!r} is not understood; write --config.FIELD=VALUE")
        found[match[1]] = match[2]
    return found


def grid_of(texts: list[str]) -> dict[str, list[str]]:
    """['seed=0,1'] -> {'seed': ['0', '1']}; commas inside brackets belong to a value."""
    grid = {}
    for text in texts:
        field, equals, values = text.removeprefix("--config.").partition("=")
        values = re.split(r",(?![^(\[{]*[)\]}])", values)
        if not equals or not all(values):
            raise ValueError(f"--grid {text}: write FIELD=VALUE,VALUE,…, e.g. --grid seed=0,1,2")
        if field in grid:
            raise ValueError(f"--grid {field} is given twice; write all its values after one")
        grid[field] = values
    return grid


def resolve(config_file: str, given: dict[str, str]) -> ConfigDict:
    """The config that jaxalign.main would run; leaves with the same line as main where it cannot be read."""
    argv = ["sweep", f"--config={config_file}", *(f"--config.{field}={value}" for field, value in given.items())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True, sys_argv=argv)
    config_lib.parse_flags(argv, values)
    return config_lib.resolve(values.config)


def points_of(
    configs: list[str], own: list[str], grid: dict[str, list[str]], common: dict[str, str], root: Path
) -> list[Point]:
    """All points, checked: their fields exist, their students and teachers fit, no two are the same run.

    A point that ROOT/sweep.json knows keeps its name, which is its workdir's; what is added is named beside those.
    """
    bases = [(config, {}) for config in configs]
    for text in own:
        config, *words = shlex.split(text)
        bases.append((config, overrides(words, f"--point {text!r}")))
    if not bases:
        raise ValueError("give --config or --point, e.g. --config configs/scaling.py --grid seed=0,1,2")
    for field in grid:
        if any(field in given for given in (common, *(given for _, given in bases))):
            raise ValueError(f"--grid {field} and --config.{field} both say what {field} is; leave one out")
    entries = read_json(root / "sweep.json").get("points", {}).values()
    stored = [(entry["workdir"], _of_file(entry["config"]), entry["fields"]) for entry in entries]
    named = set(grid).union(*(given for _, given in bases), *(fields for *_, fields in stored))
    last = {field: field.split(".")[-1] for field in named}
    short = {field: name if list(last.values()).count(name) == 1 else field for field, name in last.items()}
    files = {_of_file(config) for config, _ in bases} | {file for _, file, _ in stored}
    points, seen = [], {}
    for config_file, given in bases:
        for values in itertools.product(*grid.values()):
            fields = given | dict(zip(grid, values, strict=True))
            file = _of_file(config_file)
            taken = set(seen.values())
            name = next((known for known, *point in stored if point == [file, fields]), None)
            if name is None:
                taken |= {known for known, *_ in stored}
                parts = [_plain(f"{short[field]}={value}") for field, value in fields.items()]
                name = ",".join([file, *parts] if len(files) > 1 or not parts else parts)
            try:
                config = resolve(config_file, common | fields)
                setup.build(config, abstract=True)
            except (ValueError, OSError) as error:
                raise ValueError(f"{name}: {error}") from None
            same = json.dumps([config_lib.identity(config), config.steps], sort_keys=True)
            if same in seen:
                raise ValueError(f"{name} is the same run as {seen[same]}: leave one of them out")
            if name in taken:
                raise ValueError(f"{name} would be two points' folder; let their files or values differ in letters")
            seen[same] = name
            arguments = [f"--config={config_file}", f"--workdir={root / name}"]
            arguments += [f"--config.{field}={value}" for field, value in (common | fields).items()]
            points.append(Point(name, config_file, fields, arguments, root / name, config))
    return points


def _of_file(config_file: str) -> str:
    """What a name says of 'configs/trd.py:demo'; wherever the file lies, so that it may be moved."""
    file, *scale = config_file.split(":")
    return _plain("-".join([Path(file).stem, *scale]))


def _plain(text: str) -> str:
    """A text as part of a folder's name."""
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-")


# ---- How it stands


def finished(point: Point) -> bool:
    """Whether the workdir has all the steps that are asked for."""
    step = read_json(point.workdir / "summary.json").get("step", 0)
    return (point.workdir / "config.json").exists() and step >= point.config.steps


class Index:
    """ROOT/sweep.json: what belongs to the sweep, and how each point stands."""

    def __init__(self, root: Path, points: list[Point], grid: dict[str, list[str]], common: dict[str, str]):
        """Raises ValueError when the folder holds another sweep, or a point's workdir another run."""
        self.path = root / "sweep.json"
        free = config_lib.NOT_IDENTITY

        def fixed(fields: dict[str, str]) -> dict[str, str]:
            return {k: v for k, v in fields.items() if not any((k + ".").startswith(f"{name}.") for name in free)}

        head = {"grid": sorted(grid), "common": fixed(common)}
        stored = read_json(self.path)
        if "common" in stored:
            stored["common"] = fixed(stored["common"])
        for key, value in head.items():
            if stored.get(key, value) != value:
                raise ValueError(
                    f"--root={root} holds another sweep ({key}: {json.dumps(stored[key])} there, "
                    f"{json.dumps(value)} here): give another --root"
                )
        for point in points:
            if there := read_json(point.workdir / "config.json"):
                try:
                    config_lib.compare(there, point.config)
                except ValueError as error:
                    raise ValueError(f"--root={root} holds another sweep: {point.name}: {error}") from None
        self.said = False  # that the file cannot be written
        self.content = head | {"points": stored.get("points", {})}
        for point in points:
            entry = self.content["points"].setdefault(point.name, {})
            entry |= {"workdir": point.name, "config": point.config_file, "fields": point.fields}
            known = entry.get("status") if entry.get("status") in ("failed", "stopped", "submitted") else "waiting"
            entry["status"] = "finished" if finished(point) else known

    def set(self, point: Point, status: str, **more) -> None:
        """The point's status is known to the file at once, or with the next write that the disk takes.

        A sweep does not end for it: the runs go on, and the next call looks into their workdirs.
        """
        self.content["points"][point.name] |= {"status": status, **more}
        try:
            self.write()
        except OSError as error:
            if not self.said:
                print(f"warning: {self.path} cannot be written and lags behind: {error}", file=sys.stderr, flush=True)
            self.said = True

    def job(self, point: Point) -> str:
        return self.content["points"][point.name].get("job", "")

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.content, indent=2, ensure_ascii=False) + "\n")


# ---- Running it


def shares_of_gpus(jobs: int) -> list[dict[str, str]]:
    """The environment of each of `jobs` runs at once: an equal share of the GPUs; nothing where there are none."""
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if jobs > 1 and not gpus and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
        gpus = [str(k) for k in range(len(listed.splitlines()))]
    if jobs == 1 or not gpus:
        return [{}] * jobs
    if len(gpus) % jobs:
        raise ValueError(f"--jobs={jobs} does not divide the {len(gpus)} GPUs of this machine")
    each = len(gpus) // jobs
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[k * each : (k + 1) * each])} for k in range(jobs)]


def shares_of_cores(jobs: int, shares: list[dict[str, str]]) -> list[set[int] | None]:
    """The CPU cores of each of `jobs` runs at once; None, all of them, beside GPUs and where they cannot be shared."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = any(shares) or bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [None] * jobs if jobs == 1 or gpus or len(cores) < jobs else [set(cores[k::jobs]) for k in range(jobs)]


@contextlib.contextmanager
def on_cores(cores: set[int] | None):
    """What is started inside inherits these cores."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_local(points: list[Point], index: Index, jobs: int) -> int:
    """Run all points, `jobs` at once; returns the exit status."""
    shares, logs = shares_of_gpus(jobs), index.path.parent / "logs"
    cores = shares_of_cores(jobs, shares)
    logs.mkdir(parents=True, exist_ok=True)
    lock = open(logs / ".lock", "w")  # noqa: SIM115  (inherited by the runs and held until the last has ended)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        where = f"--root={index.path.parent}"
        raise ValueError(f"{where}: a run of this sweep is still going; wait for it or stop it") from None
    waiting, running, outcomes, asked = deque(points), {}, [], 0

    def pass_on(number, frame):
        nonlocal asked
        asked = number
        for _, process, *_ in list(running.values()):
            # SIGHUP: a closed terminal must not kill runs that could save.
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if running:
            print("\nstopping: the runs finish their step and save; once more to stop at once", flush=True)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        while running or (waiting and not asked):
            for slot in [k for k in range(jobs) if k not in running]:
                if not waiting or asked:
                    break
                point = waiting.popleft()
                try:
                    log = open(logs / f"{point.name}.log", "ab")  # noqa: SIM115  (closed when the run ends)
                    with on_cores(cores[slot]):
                        process = subprocess.Popen(
                            ["bash", str(ROOT / "launch" / "local.sh"), *point.arguments],
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env={"PYTHON": sys.executable} | os.environ | shares[slot],
                            pass_fds=[lock.fileno()],
                            start_new_session=True,  # the terminal's Ctrl-C reaches a run once, through `pass_on`
                        )
                except OSError as error:  # those that run are still watched
                    print(f"  failed to start: {point.name}: {error}", flush=True)
                    index.set(point, "failed")
                    outcomes.append("failed")
                    continue
                running[slot] = point, process, log, log.tell(), time.monotonic()
                index.set(point, "running")
                print(f"[{len(points) - len(waiting)}/{len(points)}] {point.name}", flush=True)
            for slot, (point, process, log, start, began) in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[slot]
                log.close()
                outcomes.append(_ended(point, index, status, Path(log.name), start, time.monotonic() - began))
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        lock.close()
    outcomes += ["waiting"] * len(waiting)
    counted = ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes)) or "nothing to do"
    complete = set(outcomes) <= {"finished"}
    print(f"{counted}; {index.path}" + ("" if complete else "; the same command goes on from here"))
    return 128 + asked if asked else int(not complete)


def _ended(point: Point, index: Index, status: int, log: Path, start: int, seconds: float) -> str:
    """Say how a run ended; its outcome."""
    if status == 0 and finished(point):
        loss = read_json(point.workdir / "summary.json").get("held_out", {}).get("denoising")
        shown = f", held-out denoising {loss:.4f}" if loss is not None else ""
        print(f"  finished in {duration(seconds)}: {point.name}{shown}", flush=True)
        index.set(point, "finished", exit_status=0)
        return "finished"
    outcome = "stopped" if status in (130, 143, -signal.SIGINT, -signal.SIGTERM) else "failed"
    index.set(point, outcome, exit_status=status)
    print(f"  {outcome} with status {status} after {duration(seconds)}: {point.name}", flush=True)
    if outcome == "failed":
        with open(log, "rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()[-TAIL:]
        print("\n".join(f"    | {line}" for line in [*lines, f"({log})"]), flush=True)
    return outcome


def submit_slurm(points: list[Point], index: Index, options: list[str]) -> int:
    """One job for each point that is not in the queue already; returns the exit status."""
    if not shutil.which("sbatch"):
        raise ValueError("--run=slurm: there is no sbatch here; submit from a login node, or write --run=print")
    logs = index.path.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    queued = {point.name for point in points if index.job(point) and _in_queue(index.job(point))}
    for point in points:
        if point.name in queued:
            index.set(point, "submitted")
            print(f"{point.name}: job {index.job(point)} is in the queue already")
            continue
        index.write()  # a job that cannot be noted would be submitted again by the next call
        log = logs.resolve() / f"{point.name}.log"
        command = ["sbatch", "--parsable", f"--job-name={point.name}", f"--output={log}", *options]
        command += ["launch/slurm.sbatch", *point.arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            index.set(point, "waiting")
            raise ValueError(f"{point.name}: sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
        index.set(point, "submitted", job=done.stdout.strip().split(";")[0])
        print(f"{point.name}: job {index.job(point)}")
    return 0


def _in_queue(job: str) -> bool:
    """Whether Slurm has the job. ValueError where squeue does not say: two jobs must not train in one workdir."""
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False)
    if done.returncode and "invalid job id" not in done.stderr.lower():  # which is what it says of one long gone
        raise ValueError(f"does job {job} still go? Nothing was submitted, for squeue said: {done.stderr.strip()}")
    return done.returncode == 0 and bool(done.stdout.strip())


def main(argv: list[str]) -> int:
    """Read the command line, check all points, run what is not finished; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE[:SCALE]")
    parser.add_argument("--point", action="append", default=[], metavar='"FILE[:SCALE] --config.FIELD=VALUE …"')
    parser.add_argument("--grid", action="append", default=[], metavar="FIELD=VALUE,…")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--run", choices=("local", "slurm", "print"), default="local")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--sbatch", default="", metavar='"OPTIONS"')
    given, rest = parser.parse_known_args(argv)
    try:
        if given.jobs < 1:
            raise ValueError(f"--jobs={given.jobs}: must be at least 1")
        common = overrides(rest, "command line")
        grid = grid_of(given.grid)
        points = points_of(given.config, given.point, grid, common, given.root)
        index = Index(given.root, points, grid, common)
        index.write()
        left = [point for point in points if not finished(point)]
        if given.run == "print":
            print("\n".join(shlex.join(["python", "-m", "jaxalign.main", *point.arguments]) for point in left))
            return 0
        print(f"{len(points)} points, {len(points) - len(left)} finished already, in {given.root}", flush=True)
        if given.run == "slurm":
            return submit_slurm(left, index, shlex.split(given.sbatch))
        return run_local(left, index, given.jobs)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    os.chdir(ROOT)  # as the other launchers: paths are the checkout's
    jax.config.update("jax_platforms", "cpu")  # here shapes are worked out only; the GPUs are the runs'
    sys.exit(main(sys.argv[1:]))
