"""launch/sweep.py: which runs a grid is, what it refuses, and how it goes on; stand-ins do the training."""

import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import scaling as scaling_config
from jaxalign import evaluate
from jaxalign.models.vdit import PRESETS
from jaxalign.training import config as config_lib
from jaxalign.training import outcomes, setup, tensorboard

ROOT = Path(__file__).parents[2]
GRID = ["--config=configs/scaling.py", "--grid=model.width=64,96", "--grid=seed=0,1"]


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "launch" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sweep"]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An interpreter that leaves a finished workdir, unless told to fail (exit 2) or to wait for a signal."""
    script = tmp_path / "python"
    script.write_text(
        """#!/usr/bin/env bash
for word in "$@"; do [[ $word == --workdir=* ]] && workdir=${word#--workdir=}; done
echo "$@" >> "$(dirname "$0")/calls"
if [[ -n $FAIL && $workdir == *$FAIL* ]]; then echo "error: told to"; exit 2; fi
if [[ -n $WAIT ]]; then trap 'echo saved; exit 143' TERM; touch "$(dirname "$0")/up"; while :; do sleep 0.05; done; fi
mkdir -p "$workdir" && echo '{}' > "$workdir/config.json"
echo '{"step": 300, "held_out": {"denoising": 0.25}}' > "$workdir/summary.json"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(script))
    monkeypatch.setenv("ACCELERATOR", "cpu")
    for name in ("FAIL", "WAIT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def statuses(root: Path) -> dict[str, str]:
    return {name: e["status"] for name, e in json.loads((root / "sweep.json").read_text())["points"].items()}


def test_a_failed_point_is_shown_and_run_again(sweep, stand_in, monkeypatch, capfd):
    root = stand_in / "s"
    monkeypatch.setenv("FAIL", "96,seed=0")
    assert sweep.main([*GRID, f"--root={root}", "--jobs=2"]) == 1
    out = capfd.readouterr().out
    assert "failed with status 2" in out and "| error: told to" in out and "3 finished, 1 failed" in out
    assert statuses(root) == {
        f"width={w},seed={s}": "failed" if (w, s) == (96, 0) else "finished" for w in (64, 96) for s in (0, 1)
    }
    (stand_in / "calls").unlink()
    monkeypatch.delenv("FAIL")
    assert sweep.main([*GRID, f"--root={root}"]) == 0
    (call,) = (stand_in / "calls").read_text().splitlines()
    assert call.startswith("-m jaxalign.main") and "--config.model.width=96 --config.seed=0" in call
    assert sweep.main([*GRID[:2], "--grid=seed=0,1,2", f"--root={root}"]) == 0  # a seed more
    assert (stand_in / "calls").read_text().count("--config.seed=2") == 2 and len(statuses(root)) == 6
    assert sweep.main([*GRID[:2], f"--root={root}"]) == 2
    assert "holds another sweep (grid: " in capfd.readouterr().err


def test_how_runs_are_computed_may_change_in_a_sweep(sweep, tmp_path):
    sweep.Index(tmp_path, [], {}, {"model.width": "64"}).write()
    stored = json.loads((tmp_path / "sweep.json").read_text())
    stored["common"]["remat"] = "True"  # as sweeps were written
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    for how in ({}, {"remat": "False", "on_nonfinite": "skip"}):
        assert sweep.Index(tmp_path, [], {}, {"model.width": "64"} | how).content["common"] == {"model.width": "64"}
    with pytest.raises(ValueError, match="another sweep"):
        sweep.Index(tmp_path, [], {}, {"model.width": "96", "remat": "True"})


def test_a_signal_is_passed_on_and_the_runs_may_save(sweep, stand_in, monkeypatch, capfd):
    root = stand_in / "s"
    monkeypatch.setenv("WAIT", "1")

    def stop():
        while not (stand_in / "up").exists():
            time.sleep(0.02)
        # A second sweep of the same folder is refused while runs of the first are there.
        with pytest.raises(ValueError, match="still going"):
            sweep.run_local([], sweep.Index(root, [], {"model.width": [], "seed": []}, {}), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert sweep.main([*GRID, f"--root={root}"]) == 143
    assert "1 stopped, 3 waiting" in capfd.readouterr().out
    assert "saved" in (root / "logs" / "width=64,seed=0.log").read_text()
    assert sorted(statuses(root).values()) == ["stopped", "waiting", "waiting", "waiting"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--grid=model.widht=64,96"], "config.model.widht: no such field; did you mean config.model.width?"),
        (["--grid=model.width=64,65"], "width=65: model.width must be divisible"),
        (["--grid=seed=0,0"], "seed=0 is the same run as seed=0"),
        (["--grid=align.temperature=0.1,0.2"], "is the same run as"),  # read by nothing without an alignment
        (["--grid=seed="], "write FIELD=VALUE"),
        (["--grid=seed=1", "--config.seed=2"], "both say what seed is"),
        (["--config.seed", "2"], "write --config.FIELD=VALUE"),
        (["--grid=align.method=tsb", "--config.align.weight=1"], "did you mean 'tsa'?"),
    ],
)
def test_mistakes_are_told_before_anything_starts(sweep, tmp_path, capfd, arguments, said):
    try:
        status = sweep.main(["--config=configs/scaling.py", *arguments, f"--root={tmp_path / 's'}"])
    except SystemExit as error:  # as main itself leaves for a field that is not there
        status = error.code
    error = capfd.readouterr().err
    assert status == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_methods_are_points_and_slurm_gets_a_job_each(sweep, tmp_path, capfd, monkeypatch):
    root = tmp_path / "s"
    arguments = ["--config=configs/baseline.py", "--point=configs/trd.py:demo --config.align.weight=0.1"]
    arguments += ["--grid=seed=0", f"--root={root}", "--config.steps=7"]
    assert sweep.main([*arguments, "--run=print"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [re.search(r"--workdir=(\S+)", line)[1] for line in lines] == [
        f"{root}/baseline,seed=0",
        f"{root}/trd-demo,weight=0.1,seed=0",
    ]
    assert lines[1].endswith("--config.steps=7 --config.align.weight=0.1 --config.seed=0")
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", f'echo "$@" >> {tmp_path}/jobs; echo 7'), ("squeue", "echo RUNNING")):
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert sweep.main([*arguments, "--run=slurm", "--sbatch=--time=1:00:00 --nodes=1"]) == 0
    first, _ = (tmp_path / "jobs").read_text().splitlines()
    assert (
        first.startswith("--parsable --job-name=baseline,seed=0 ") and " --time=1:00:00 --nodes=1 launch/slu" in first
    )
    assert set(statuses(root).values()) == {"submitted"}
    assert sweep.main([*arguments, "--run=slurm"]) == 0  # they are in the queue already
    assert len((tmp_path / "jobs").read_text().splitlines()) == 2


def workdirs(sweep, capfd, *arguments):
    """Names of the folders of all points, without training one."""
    assert sweep.main([*arguments, "--run=print"]) == 0
    out, err = capfd.readouterr()
    assert not err
    return [Path(path).name for path in re.findall(r"--workdir=([^ ']+)", out)]


def test_added_points_leave_the_names_of_the_others(sweep, tmp_path, capfd):
    """Also where the names would have been others, had all been there from the start."""
    arguments = ["--grid=seed=0", f"--root={tmp_path / 's'}", "--config.steps=7"]
    scaling, trd = "--config=configs/scaling.py", "--point=configs/trd.py:demo --config.align.schedule=linear"
    first = workdirs(sweep, capfd, scaling, *arguments)
    assert first == ["seed=0"]
    second = workdirs(sweep, capfd, scaling, trd, *arguments)  # a second file
    assert second == [*first, "trd-demo,schedule=linear,seed=0"]
    other = "--point=configs/baseline.py --config.optimizer.schedule=linear"  # a second field with this last word
    third = workdirs(sweep, capfd, other, scaling, trd, *arguments)
    assert third == [second[0], "baseline,optimizer.schedule=linear,seed=0", second[1]]
    assert workdirs(sweep, capfd, trd, *arguments[1:], "--grid=seed=0,1") == [
        second[1],
        "trd-demo,align.schedule=linear,seed=1",
    ]
    (alone,) = workdirs(sweep, capfd, "--config=configs/tsa.py", *arguments)  # not `seed=0`, which is another's
    assert alone == "tsa,seed=0"
    assert workdirs(sweep, capfd, f"--config={ROOT}/configs/scaling.py", *arguments) == first  # however it is written
    assert len(statuses(tmp_path / "s")) == 5


def test_what_squeue_cannot_say_is_not_submitted_again(sweep, tmp_path, capfd, monkeypatch):
    arguments = ["--config=configs/scaling.py", "--grid=seed=0,1", f"--root={tmp_path / 's'}", "--run=slurm"]

    def slurm(**programs):
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (tmp_path / name).chmod(0o755)

    def submitted():
        return len((tmp_path / "jobs").read_text().splitlines())

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    slurm(sbatch=f'echo "$@" >> {tmp_path}/jobs; echo 7', squeue="exit 1")
    assert sweep.main(arguments) == 0 and submitted() == 2
    slurm(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert sweep.main(arguments) == 2 and submitted() == 2
    assert "does job 7 still go? Nothing was submitted, for squeue said: slurm_load_jobs" in capfd.readouterr().err
    slurm(squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert sweep.main(arguments) == 0 and submitted() == 4

    def full(path, text):
        raise OSError(28, "No space left on device")

    slurm(squeue="")  # jobs that are not there any more; what cannot be noted is not submitted
    monkeypatch.setattr(sweep, "write_atomic", full)
    assert sweep.main(arguments) == 2 and submitted() == 4


def test_a_full_disk_ends_no_sweep(sweep, stand_in, monkeypatch, capfd):
    root, write, calls = stand_in / "s", sweep.write_atomic, []

    def full(path, text):
        calls.append(text)
        if 2 <= len(calls) <= 5:  # the first is of before anything has started
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(sweep, "write_atomic", full)
    assert sweep.main([*GRID, f"--root={root}"]) == 0
    out, err = capfd.readouterr()
    assert "4 finished" in out and err.count("cannot be written") == 1
    assert set(statuses(root).values()) == {"finished"}  # the later writes know the earlier ones
    # Where none came through, the workdirs tell.
    (root / "sweep.json").write_text(json.dumps({"grid": ["model.width", "seed"], "common": {}, "points": {}}))
    assert sweep.main([*GRID, f"--root={root}", "--run=print"]) == 0
    assert capfd.readouterr().out.strip() == "" and set(statuses(root).values()) == {"finished"}


def test_a_run_that_cannot_start_ends_no_sweep(sweep, stand_in, capfd):
    (stand_in / "s" / "logs" / "width=64,seed=1.log").mkdir(parents=True)
    assert sweep.main([*GRID, f"--root={stand_in / 's'}"]) == 1
    out = capfd.readouterr().out
    assert "failed to start: width=64,seed=1: [Errno 21]" in out and "3 finished" in out.splitlines()[-1]


def test_gpus_are_shared_evenly(sweep, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    assert sweep.shares_of_gpus(2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,5"}]
    assert sweep.shares_of_gpus(1) == [{}]
    with pytest.raises(ValueError, match="does not divide the 4 GPUs"):
        sweep.shares_of_gpus(3)


def test_ladder_sizes_tokens_and_rates():
    assert {scale.split("_")[0] for scale in scaling_config.SCALES} == {"demo", "s", "b", "l", "xl"}
    for scale in ("demo_1024", "s_256", "xl_4096"):
        size = scale.split("_")[0]
        config = scaling_config.get_config(scale)
        config.data.source = "synthetic"
        config = config_lib.resolve(config)
        run = setup.build(config, abstract=True)
        assert int(np.prod(run.student_grid)) == int(scale.split("_")[1]) and config.scale == scale
        preset = dict(PRESETS["demo" if size == "demo" else size.upper()])
        own = {name: getattr(run.model_config, name) for name in preset}
        assert own == (preset | dict(depth=4) if size == "demo" else preset)
        tuned = 1e-3 * 128 if size == "demo" else 1e-4 * 1152
        assert config.optimizer.learning_rate * run.model_config.width == pytest.approx(tuned)
    with pytest.raises(ValueError, match="no such scale; write one of demo_256"):
        scaling_config.get_config("huge_1")


def test_evaluate_scaling_reads_workdirs(tmp_path, capsys):
    """Made-up losses in real workdirs: curves of constant rates, the flops that all or not all runs know."""
    for width in (64, 96, 128):
        for seed in (0, 1):
            config = scaling_config.get_config("demo")
            config.update(model=dict(width=width), seed=seed)
            folder = tmp_path / f"width={width},seed={seed}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config.to_dict()))

            def loss(step, width=width, seed=seed):
                return 0.2 + 0.1 * (width / 96) ** -1.0 + 0.1 * (step / 150) ** -0.5 + 0.001 * seed

            events = tensorboard.open_events(folder / "tensorboard", first_step=0)
            for step in range(20, 301, 40):
                tensorboard.add_scalars(events, step, {"held_out/denoising": loss(step)})
            events.close()
            summary = {"step": 300, "held_out": {"denoising": loss(300)}, "flops_per_step": 10**6 * width**2}
            (folder / "summary.json").write_text(json.dumps(summary))
    rows, numbers = evaluate.scaling(tmp_path, replicates=4)
    assert [r["runs"] for r in rows] == ["width=64", "width=96", "width=128"] and {r["seeds"] for r in rows} == {2}
    run = setup.build(config_lib.resolve(scaling_config.get_config("demo")), abstract=True)
    leaves = jax.tree.leaves(jax.eval_shape(run.init, jax.random.key(0))["model"])
    assert rows[2]["parameters"] == sum(int(np.prod(leaf.shape)) for leaf in leaves)
    assert rows[2]["FLOPs"] == f"{300 * 10**6 * 128**2:.3g}" and rows[2]["tokens seen"] == f"{300 * 4 * 256:.3g}"
    kept = json.loads((tmp_path / "scaling.json").read_text())
    assert len(kept["points"]) == 6 * 7  # step 20 is within the first tenth
    beta = next(n for n in numbers if n["number"] == "β")
    assert beta["value"] == pytest.approx(0.5, rel=0.1) and (tmp_path / "scaling.png").stat().st_size > 10_000
    assert "note" not in capsys.readouterr().out

    (tmp_path / "width=64,seed=1" / "summary.json").write_text('{"step": 120}')
    del summary["flops_per_step"]
    (folder / "summary.json").write_text(json.dumps(summary))
    runs, remarks = outcomes.read(tmp_path)
    assert len(runs) == 5 and remarks == ["not finished and left out: width=64,seed=1"]
    points, remarks = outcomes.scaling_points(runs)
    assert points[-1].compute == 6 * points[-1].parameters * points[-1].tokens and "6 · parameters" in remarks[0]
    twin = tmp_path / "scaling,width=64,seed=0"
    twin.mkdir()
    for file in ("config.json", "summary.json"):
        (twin / file).write_bytes((tmp_path / "width=64,seed=0" / file).read_bytes())
    again, remarks = outcomes.read(tmp_path)
    assert (
        len(again) == 5
        and remarks[1] == "the same run again and left out: width=64,seed=0 (as scaling,width=64,seed=0)"
    )
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        outcomes.read(tmp_path / "width=64,seed=0")


@pytest.mark.slow
def test_a_sweep_for_real(sweep, tmp_path):
    arguments = ["--config=configs/scaling.py", "--grid=model.width=64,96", f"--root={tmp_path}"]
    tiny = ["steps=4", "data.height=16", "data.width=16", "eval_every=1", "sample.steps=1", "sample.count=1"]
    assert sweep.main([*arguments, *(f"--config.{field}" for field in tiny)]) == 0
    points, remarks = outcomes.scaling_points(outcomes.read(tmp_path)[0])
    assert len({p.parameters for p in points}) == 2 and remarks == []
