"""The step of a config compiled for devices that are not there, in one child process for all."""

import subprocess
import sys

import pytest

from configs import baseline, tsa
from jaxalign.benchmarks import lowering, train_step
from jaxalign.models.vdit import PRESETS


def tiny():
    config = baseline.get_config("demo")
    config.data.update(num_frames=2, height=16, width=16)
    return config


@pytest.fixture(scope="module")
def found():
    (result,) = lowering.lower_all([lowering.planned(tiny(), 4, fsdp=4)])
    return result


def test_memory_flops_and_communication(found, capsys):
    student = found["parameters"]["student"]
    width, depth = PRESETS["demo"]["width"], PRESETS["demo"]["depth"]
    assert student > 12 * depth * width**2
    # Parameters, two moments and the average in fp32, each cut into four but for biases and norms.
    held = found["held"]
    assert 4 * student <= 4 * held["parameters"] < 1.03 * 4 * student
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=1e-4)
    memory = found["memory"]
    assert memory["arguments"] == pytest.approx(4 * held["parameters"] + held["batch"], rel=1e-3)
    assert lowering.memory_of(found) < memory["arguments"] + memory["temporary"] + 2000  # the state stays in place

    tokens, flops = found["tokens"] * found["batch_size"], found["flops"]
    # Linears of the blocks, each weight once a token and direction, and adaLN once a clip: attention is the rest.
    assert flops["step"] == flops["model"] == flops["student"] > 3 * 2 * 12 * depth * width**2 * tokens
    assert flops["teachers"] == flops["alignment"] == flops["codec"] == 0
    assert 4 * found["device_flops"] == pytest.approx(flops["step"], rel=0.05)
    assert {c["axes"][0] for c in found["communication"]} == {"fsdp"}
    assert sum(lowering.wire_by(found, "kind").values()) == sum(lowering.wire_by(found, "axes").values()) > 0

    train_step.show_lowered(found, "fp32")
    shown = capsys.readouterr().out
    assert f"| student | {student:,} |" in shown and "Fits: h100, h200, v5p, v6e." in shown
    assert "4 devices (data 1 · fsdp 4 · context 1 · tensor 1), batch 4" in shown and "'xla' as compiled" in shown


def test_what_cannot_be_planned_or_compiled_is_one_line():
    planned = lowering.planned(tiny(), 8, clips=3, fsdp=2, context=-1)
    assert (dict(planned.mesh) | {"dcn": 0}) == dict(data=1, fsdp=2, context=4, tensor=1, dcn=0)
    assert planned.batch_size == 6
    with pytest.raises(ValueError, match="does not fit 6 devices"):
        lowering.planned(tiny(), 6, fsdp=4)
    real = tsa.get_config("cogvideox_2b")
    assert lowering.planned(real, 8).mesh.fsdp == 8 and lowering.planned(real, 8).batch_size == 8
    with pytest.raises(ValueError, match="devices are asked for"):
        lowering.lower(lowering.planned(tiny(), 256, fsdp=256))


def test_sizes_of_the_student_beside_torch():
    config = tiny()
    config.model.update(name="cogvideox", preset="demo")
    config.learn_sigma = False
    config = lowering.planned(config, 1)
    student = train_step.student_config(config, dict(width=64, depth=2, num_heads=2, text_tokens=8), (3, 16, 16))
    assert (student.grid, student.num_tokens, student.depth) == ((3, 4, 4), 56, 2)
    with pytest.raises(ValueError, match="--torch compares CogVideoX"):
        vdit = train_step.student_config(lowering.planned(tiny(), 1), {}, None)
        train_step.beside_torch(vdit, "float32", 1, 1)


@pytest.mark.slow
def test_the_demos_step_on_eight_devices_by_command():
    command = [sys.executable, "-m", "jaxalign.benchmarks.train_step", "--config", "configs/tsa.py", "--abstract"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "| teachers |" in done.stdout and "| alignment |" in done.stdout and "| all-gather | fsdp |" not in done.stdout
    )
    assert "| all-reduce | data |" in done.stdout
