"""Two real processes on this machine, over loopback: they agree, lose each other, and end as if nothing had been."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from configs import base, tsa
from jaxalign import precompute
from jaxalign.interop import sealed
from jaxalign.training import config as config_lib
from jaxalign.training import loop, processes
from jaxalign.training.restore import find_checkpoint, load_params, read_metadata

ROOT = Path(__file__).parents[2]
LOST_AFTER = 20
MAIN = Path(__file__).with_name("main_without_torch.py")
SMALL = dict(
    steps=4,
    batch_size=2,
    teacher=dict(size=32, stride=8),
    data=dict(source="synthetic", num_frames=2, height=16, width=16, stride=1),
    align=dict(projector=dict(hidden=16)),
    sample=dict(steps=1, count=1),
    checkpoint=dict(every=2),
    log_every=1,
    sample_every=4,
    eval_every=4,
)


def start(workdir: Path, *more: str, config: str = "baseline", each=((), ())) -> list[subprocess.Popen]:
    """Both processes of a run; `each` are flags of one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(MAIN), "--config", f"configs/{config}.py", "--workdir", str(workdir)]
    command += [f"--config.{name}={value}" for name, value in config_lib.flatten(SMALL).items()]
    command += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--lost_after={LOST_AFTER}", *more]
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONPATH": str(ROOT)}
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    pipes = dict(cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return [subprocess.Popen([*command, f"--process_id={k}", *each[k]], **pipes) for k in range(2)]


def ends(pair: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit status, output) of each."""
    found = []
    for process in pair:
        output = process.communicate(timeout=300)[0]
        found.append((process.returncode, output))
    return found


def wait_for(path: Path, pair: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() and all(p.poll() is None for p in pair) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not path.exists():
        for process in pair:
            process.kill()
        pytest.fail("\n".join(output for _, output in ends(pair)))


def killed(workdir: Path, victim: int) -> None:
    """A run one of whose processes is killed once its first checkpoint is sealed; the other must stop by itself."""
    pair = start(workdir)
    wait_for(workdir / "checkpoints" / "2" / sealed.NAME, pair)
    pair[victim].kill()
    before = time.monotonic()
    status, output = ends([pair[1 - victim]])[0]
    assert time.monotonic() - before < LOST_AFTER + 20  # and some for a machine that does other things
    assert status == processes.LOST, output
    line = next(line for line in output.splitlines() if line.startswith("error:"))
    assert f"process {1 - victim} of 2" in line and "another process was lost" in line and "goes on from" in line
    pair[victim].communicate()


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    names = read_metadata(find_checkpoint(workdir))["leaves"]
    wanted = {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, (dtype, shape) in names.items()}
    return {k: np.asarray(v) for k, v in load_params(workdir, wanted, source="")[0].items()}


def losses(workdir: Path) -> tuple[float, float]:
    summary = json.loads((workdir / "summary.json").read_text())
    return summary["train"]["loss"], summary["held_out"]["denoising"]


def assert_both_finish(workdir: Path, *more: str, **options) -> None:
    found = ends(start(workdir, *more, **options))
    assert [status for status, _ in found] == [0, 0], "\n".join(output for _, output in found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "undisturbed"
    first, second = ends(start(workdir))
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert "in 2 processes" in first[1]
    assert "loss" not in second[1]  # only process 0 speaks and writes
    assert (workdir / "log.txt").read_text().count("in 2 processes") == 1
    return workdir


def test_one_is_killed_and_both_start_again(undisturbed, tmp_path):
    workdir = tmp_path / "killed"
    killed(workdir, victim=1)
    shutil.copytree(workdir, tmp_path / "alone")
    assert_both_finish(workdir)
    wanted, found = leaves(undisturbed), leaves(workdir)
    assert wanted.keys() == found.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)

    # From the same checkpoint as one process: the same clips, noise and labels, so the same losses.
    config = base.get_config("demo")
    config.update(SMALL)
    assert loop.train(config_lib.resolve(config), tmp_path / "alone") == 0
    assert "resumed at step 2 of 4" in (tmp_path / "alone" / "log.txt").read_text()
    np.testing.assert_allclose(losses(tmp_path / "alone"), losses(undisturbed), rtol=1e-5)


@pytest.mark.slow
def test_the_first_is_killed(undisturbed, tmp_path):
    killed(tmp_path / "killed", victim=0)
    assert_both_finish(tmp_path / "killed")
    wanted, found = leaves(undisturbed), leaves(tmp_path / "killed")
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step(undisturbed, tmp_path):
    pair = start(tmp_path / "run", "--config.steps=400", "--config.optimizer.schedule=constant")
    wait_for(tmp_path / "run" / "checkpoints" / "2" / sealed.NAME, pair)
    pair[1].send_signal(signal.SIGTERM)
    (first, said), (second, _) = ends(pair)
    assert (first, second) == (143, 143), said
    step = int(re.search(r"stopped by a signal to another process at step (\d+), saved", said)[1])
    assert find_checkpoint(tmp_path / "run").name == str(step)


@pytest.mark.slow
def test_who_differs_is_said_and_nothing_is_written(tmp_path):
    rates = ("--config.optimizer.learning_rate=0.1",), ("--config.optimizer.learning_rate=0.2",)
    for status, output in ends(start(tmp_path / "run", each=rates)):
        assert status == 2
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        host = socket.gethostname()
        assert f"config.optimizer.learning_rate: 0.1 on process 0 ({host}), 0.2 on process 1 ({host})" in line
    assert not (tmp_path / "run").exists()
    # A folder of one's own is not the workdir of all.
    found = ends(start(tmp_path / "a", each=((), ("--workdir", str(tmp_path / "b")))))
    assert all(status == 2 and "is not the folder of process 0" in output for status, output in found), found
    # A mistake that one of them meets is everybody's end.
    small = "--config.batch_size=3"
    found = ends(start(tmp_path / "c", small))
    assert all(status == 2 and "write a multiple of 2" in output for status, output in found), found


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "context", "tensor"])
def test_every_axis_between_processes(tmp_path, axis):
    """M-TSA with all that a run shows of itself; the processes read the same clips unless the axis is the batch's."""
    assert_both_finish(tmp_path / "two", "--config.mesh.data=1", f"--config.mesh.{axis}=2", config="tsa")
    config = tsa.get_config("demo")
    config.update(SMALL)
    assert loop.train(config_lib.resolve(config), tmp_path / "one") == 0
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    assert (tmp_path / "two" / "figures" / "correspondence_000004.png").exists()


def test_launchers_are_told_by_their_variables():
    assert processes.cluster({}) is None
    assert processes.cluster({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None  # no step
    assert processes.cluster({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}) == "Slurm"
    assert processes.cluster({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert processes.cluster({"OMPI_COMM_WORLD_SIZE": "2"}) == "Open MPI"
    assert processes.cluster({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert processes.cluster({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"}) == "TPU"


def test_half_told_is_explained():
    assert processes.join(environment={}) is False
    assert processes.join("host:1", 1, 0, environment={}) is False
    with pytest.raises(ValueError, match="--num_processes, --process_id missing"):
        processes.join("host:1", environment={})
    with pytest.raises(ValueError, match="--coordinator missing"):
        processes.join(environment={"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    with pytest.raises(ValueError, match=r"--process_id=2: the processes are 0 … 1"):
        processes.join("host:1", 2, 2, environment={})
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='one': write a number"):
        processes.join(environment={"JAX_PROCESS_ID": "one"})


def test_a_cloud_tpu_vm_is_detected_on_demand_by_precompute_too(monkeypatch):
    told = []
    monkeypatch.setattr(processes, "join", lambda *found, **options: told.append(options))
    for arguments in ([], ["--detect_cluster"]):
        values = flags.FlagValues()
        precompute.define_flags(values)
        values(["precompute", *arguments])
        assert precompute.share(values) == (0, 1)
    assert told == [{"detect": False}, {"detect": True}]


def test_differences_name_the_few():
    facts = [{"host": f"h{k}", "code": "a", "config.seed": 0, "versions.jax": "1"} for k in range(6)]
    assert processes.differences(facts) == []
    facts[4]["code"] = "b"
    del facts[0]["versions.jax"]
    assert processes.differences(facts) == [
        'code: "a" on processes 0 (h0), 1 (h1), 2 (h2) and 2 more, "b" on process 4 (h4)',
        'versions.jax: "1" on processes 1 (h1), 2 (h2), 3 (h3) and 2 more, null on process 0 (h0)',
    ]


def test_what_counts_as_a_loss():
    assert processes.is_loss(ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    assert processes.is_loss(jax.errors.JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy"))
    assert not processes.is_loss(ValueError("config.seed: connection"))
    assert not processes.is_loss(OSError("Connection refused"))
    assert not processes.is_loss(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))


@pytest.mark.parametrize("error, status", [(ValueError("a mistake"), 2), (ValueError("gloo: gone"), 3)])
def test_one_of_several_leaves_also_where_nobody_takes_its_line(monkeypatch, error, status):
    """A closed pipe must not make it stay: the others wait for it."""

    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left, processes.leaving_at_once(broken):
        raise error
    assert left.value.code == status


def test_with_one_process_nothing_is_asked(tmp_path):
    processes.check_agreement({"anything": 1})
    processes.check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    vote = processes.Vote(jax.make_mesh((1,), ("data",)))
    wishes = [processes.GO_ON, processes.SAVE, processes.STOP]
    assert [vote(wish) for wish in wishes] == wishes and wishes == sorted(wishes)
    for context in (processes.leaving_at_once(), processes.all_or_none("setup")):
        with pytest.raises(ValueError, match="as it is"), context:
            raise ValueError("as it is")
    assert processes.code_digest() == processes.code_digest() and len(processes.code_digest()) == 16
