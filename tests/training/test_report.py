"""What a person sees: screen, log, TensorBoard, summary; a full disk costs reports, never training."""

import io
import json
import re
import resource
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure
from PIL import Image

from jaxalign.training import environment, tensorboard
from jaxalign.training import report as reports
from jaxalign.training.mesh import make_mesh
from jaxalign.training.report import Report


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Part(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 10, rngs=rngs)
        self.last = nnx.Linear(10, 1, rngs=rngs)


def clip(frames=6):
    stream = np.random.default_rng(0)
    return stream.integers(0, 255, (frames, 16, 24, 3), np.uint8)


def test_the_first_screen_and_the_parameter_table(tmp_path):
    screen = io.StringIO()
    trees = {"student": Part(nnx.Rngs(0)), "teacher": jax.eval_shape(lambda: Part(nnx.Rngs(0)))}
    with Report(tmp_path, screen=screen) as report:
        report.first_screen(trees, mesh=make_mesh(), facts={"data": "3 clips"})
    text = screen.getvalue()
    assert "student  61 parameters: first 50 · last 11" in text
    assert "mesh     data 1 · fsdp 1 · context 1 · tensor 1" in text
    assert "data     3 clips" in text and "1 × cpu" in text and "cores" in text
    table = (tmp_path / "parameters.txt").read_text()
    assert table.count("Total: 61") == 2 and "| first.kernel | (4, 10) | float32 | 40" in table
    assert (tmp_path / "log.txt").read_text().count("\n") == text.count("\n")


def test_progress_without_a_terminal_is_plain_lines(tmp_path):
    screen = io.StringIO()
    with Report(tmp_path, screen=screen, line_every=1000) as report:
        report.start(10, 40)
        for step in range(11, 41):
            report.progress(step, loss=jnp.asarray(0.5))
        report.say("done")
    lines = screen.getvalue().splitlines()
    # No speed before there is one: the first step compiles, and what it took is said in its place.
    assert re.fullmatch(r"step 11/40  loss 0\.5  \d+\.\d s from the start to this step", lines[0])
    assert lines[1].startswith("step 40/40") and "steps/s  ETA 0:00" in lines[1]
    assert lines[2:] == ["done"]
    assert "\r" not in screen.getvalue()


def test_progress_on_a_terminal_is_a_bar(tmp_path):
    screen = Terminal()
    with Report(tmp_path, screen=screen) as report:
        report.start(0, 3)
        for step in (1, 2):
            report.progress(step, loss=0.25)
            time.sleep(0.12)
        report.say("checkpoint 2 written")
        report.progress(3, loss=0.125)
    text = screen.getvalue()
    assert "| 3/3 [" in text and "loss 0.125" in text and "checkpoint 2 written" in text
    assert "step 3/3" in (tmp_path / "log.txt").read_text() and "step 3/3" not in text


def test_speed_leaves_out_compilation_and_pauses(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reports.time, "monotonic", lambda: now[0])
    report = Report(tmp_path, screen=io.StringIO())
    report.start(0, 100)
    assert np.isnan(report.steps_per_second)
    for step in range(1, 11):
        now[0] += 30.0 if step == 1 else 20.0 if step == 6 else 0.5
        report.progress(step)
    assert report.steps_per_second == pytest.approx(2.0)
    assert report.seconds_left == pytest.approx(45.0)
    assert [reports.duration(s) for s in (0, 62, 3723, float("nan"))] == ["0:00", "1:02", "1:02:03", "?"]


def test_tensorboard_reads_what_was_written(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    figure = Figure(figsize=(1, 1), dpi=50)
    figure.subplots().plot([0, 1])
    video = clip()
    with Report(tmp_path, screen=io.StringIO()) as report:
        report.start(0, 10)
        report.scalars(1, {"train/loss": jnp.asarray(0.5), "train/rate": 2})
        report.video(1, "samples", video, 8)
        report.image(1, "still", video[0])
        report.figure(1, "curve", figure)
    found = loader.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert found.Scalars("train/loss")[0].value == 0.5
    (moving,), (still,), (drawn,) = (found.Images(tag) for tag in ("samples", "still", "curve"))
    assert (moving.height, moving.width) == (16, 24) and (drawn.height, drawn.width) == (50, 50)
    gif = Image.open(io.BytesIO(moving.encoded_image_string))
    assert gif.format == "GIF" and gif.n_frames == 6 and gif.info["duration"] == 120
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(still.encoded_image_string))), video[0])


def test_resuming_replaces_what_was_logged_after_the_checkpoint(tmp_path):
    for first, last in ((0, 8), (5, 7)):  # killed at 8, resumed from 5
        with Report(tmp_path, screen=io.StringIO()) as report:
            report.start(first, 10)
            for step in range(first + 1, last):
                report.scalars(step, {"loss": step + 10 * first})
    rows = tensorboard.read_scalars(tmp_path / "tensorboard")
    assert rows == [{"step": s, "loss": float(s + (50 if s > 5 else 0))} for s in range(1, 7)]
    (newest, *_) = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: -path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-5])  # torn by a kill
    assert [row["step"] for row in tensorboard.read_scalars(tmp_path / "tensorboard")] == [1, 2, 3, 4, 5]


def test_the_summary_merges_and_stays_json(tmp_path):
    with Report(tmp_path, screen=io.StringIO()) as report:
        report.summary({"config": {"seed": 1}, "step": 5, "path": tmp_path})
        report.summary({"config": {"steps": 9}, "loss": np.float32(0.5), "bad": [float("nan"), jnp.inf]})
    text = (tmp_path / "summary.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["config"] == {"seed": 1, "steps": 9} and found["step"] == 5
    assert found["loss"] == 0.5 and found["bad"] == ["nan", "inf"] and found["path"] == str(tmp_path)
    reports.merge_json(tmp_path / "summary.json", {"config": {"a": 2}, "loss": 1}, whole=["config", "path"])
    found = reports.read_json(tmp_path / "summary.json")
    assert found["config"] == {"a": 2} and found["loss"] == 1 and found["path"] == str(tmp_path)
    (tmp_path / "summary.json").write_text("{torn")
    assert reports.merge_json(tmp_path / "summary.json", {"a": 1}) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["summary.json"]  # no temporary file is left


def test_other_processes_are_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    screen, home = Terminal(), tmp_path / "run"
    with Report(home, screen=screen) as report:
        report.start(0, 2)
        report.first_screen({"student": Part(nnx.Rngs(0))})
        report.say("hello")
        report.progress(1, loss=0.0)
        report.scalars(1, {"a": 1.0})
        report.video(1, "v", clip(), 8)
        report.summary({"a": 1})
    assert screen.getvalue() == "" and not home.exists()


def test_a_full_disk_costs_reports_and_one_line(tmp_path):
    screen = io.StringIO()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Report(tmp_path, screen=screen, line_every=0) as report:
        report.start(0, 100)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            for step in range(1, 101):  # far more events than the queue of tensorboardX would hold
                report.progress(step, loss=1.0)
                report.scalars(step, {"loss": 1.0})
                report.video(step, "v", clip(2), 8)
                report.summary({"filler": "x" * 3000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, previous)
    lines = screen.getvalue().splitlines()
    assert sum(line.startswith("step ") for line in lines) == 100
    assert sum("could not be written" in line for line in lines) == 1
    assert report.failed_writes > 100
    assert not (tmp_path / "summary.json").exists()  # the old one, here none, is untouched


@pytest.mark.parametrize("bar", [False, True])
def test_a_screen_that_breaks_costs_its_lines_and_nothing_else(tmp_path, bar):
    """Standard output on a full disk; a closed pipe says EPIPE in its place."""

    class Full(io.TextIOWrapper):
        def isatty(self):
            return bar

    screen = Full(open("/dev/full", "wb"), write_through=True)  # noqa: SIM115
    with Report(tmp_path, screen=screen, line_every=0) as report:
        report.start(0, 30)
        for step in range(1, 31):
            report.progress(step, loss=1.0)
        other = threading.Thread(target=report.say, args=("checkpoint 30 written",))  # tqdm's lock must be free
        other.start()
        other.join(5)
        assert not other.is_alive()
    log = (tmp_path / "log.txt").read_text()
    assert "step 30/30" in log and "checkpoint 30 written" in log
    assert log.count("the screen could not be written (No space left on device)") == 1
    assert report.failed_writes >= 2
    screen.close()  # as Python does at its end: an error here would be status 120


def test_the_environment_is_recorded_and_compared():
    here = json.loads(json.dumps(environment.environment()))
    assert here["versions"]["jax"] == jax.__version__ and here["devices"] == 1 and here["cpu_cores"] >= 1
    then = here | {"cpu_cores": 64, "versions": here["versions"] | {"jax": "0.1"}}
    assert environment.changes(then, here) == [
        f"cpu_cores: 64 -> {here['cpu_cores']}",
        f"versions.jax: '0.1' -> {jax.__version__!r}",
    ]
    assert not environment.changes(here, here)


def test_peak_memory_is_in_bytes():
    found = environment.peak_memory()["host"]
    status = Path("/proc/self/status")
    if status.exists():  # the kernel's own figure, in kB
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        assert found == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)
    assert 10_000_000 < found < 1_000_000_000_000
