"""configs/compare.py and `evaluate compare`: what is compared, how it is put together, what is said to be missing."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags

from configs import compare as compare_config
from jaxalign import evaluate
from jaxalign.interop import sealed
from jaxalign.training import comparison, setup
from jaxalign.training import config as config_lib
from jaxalign.training.comparison import REAL, Questions, Reference, Row
from jaxalign.training.outcomes import Outcome

ROOT = Path(__file__).parents[2]
DATA = "synthetic:gravity, 8 × 16 × 16, stride 2"


def test_all_methods_meet_the_same_steps_clips_and_student():
    for data in compare_config.DATA:
        for size in (1, 2, 4):
            configs = {
                method: config_lib.resolve(compare_config.get_config(f"{method},{data},size={size}"))
                for method in comparison.METHODS
            }
            assert [comparison.method_of(c) for c in configs.values()] == list(comparison.METHODS)
            for field in ("steps", "batch_size", "model", "data", "optimizer", "ema_decay", "precision"):
                assert len({str(getattr(c, field)) for c in configs.values()}) == 1, field
            head = config_lib.resolve(compare_config.get_config(f"motion_head,{data},size={size}"))
            moalign = configs["moalign"]
            assert moalign.teacher.motion_head == f"runs/compare-heads/{data},size={size}/motion_head"
            assert (head.teacher.size, head.teacher.stride) == (moalign.teacher.size, moalign.teacher.stride)
    sizes = [compare_config.get_config(f"repa,gravity,size={size}") for size in (1, 2, 4)]
    for of in (lambda c: c.model.width, lambda c: c.model.depth, lambda c: c.batch_size, lambda c: c.data.height):
        assert sorted({of(c) for c in sizes}) == [of(c) for c in sizes]
    assert compare_config.get_config("moalign,real,heads=x").teacher.motion_head == "x/real,size=1/motion_head"


@pytest.mark.parametrize("method", ["baseline", "m_tsa", "align4gen", "motion_head"])
def test_students_and_teachers_fit(method):
    config = config_lib.resolve(compare_config.get_config(f"{method},gravity"))
    run = setup.build(config, abstract=True)
    assert run.student_grid == (8, 4, 4)
    assert all(a.grid == (8, 4, 4) for a in getattr(run.task, "alignments", ()))


@pytest.mark.parametrize("point", ["x,real", "repa,x", "repa,real,size=0", "repa,real,size=a", "repa,real,n=1", ""])
def test_a_point_that_is_none(point):
    with pytest.raises(ValueError, match=r"METHOD|whole number"):
        compare_config.get_config(point)


def _outcome(folder, name="repa,seed=0", **changes):
    config = compare_config.get_config("repa,gravity")
    config.update(changes)
    return Outcome(name, "repa", config_lib.resolve(config), {"step": 2}, folder)


def test_runs_of_other_clips_have_a_table_of_their_own(tmp_path):
    assert comparison.data_of(_outcome(tmp_path).config) == DATA
    for name, value in dict(stride=3, short="pad", split=2, frame_rate=30.0).items():
        assert f"{name} {value}" in comparison.data_of(_outcome(tmp_path, data={name: value}).config)
    older = _outcome(tmp_path).config
    del older.data.split, older.data.frame_rate
    assert comparison.data_of(older) == DATA


def test_runs_that_are_sampled_otherwise_do_not_compare(tmp_path):
    one = _outcome(tmp_path)
    assert comparison._unequal(DATA, [one, _outcome(tmp_path, seed=3)]) == []
    other = _outcome(tmp_path, sample=dict(steps=5, guidance_scale=2.0), steps=7)
    (line,) = comparison._unequal(DATA, [one, other])
    assert "differ in steps, sample.steps, sample.guidance_scale, so" in line


def test_a_run_is_asked_again_when_it_was_trained_again(tmp_path, monkeypatch):
    measured = []
    videos = np.zeros((2, 2, 4, 4, 3), np.uint8)
    monkeypatch.setattr(comparison, "_measure", lambda o, *_: (measured.append(o.name) or {"aligned": 0.5}, videos))
    monkeypatch.setattr(comparison, "_distance", lambda *_: 3.0)
    reference = Reference({}, SimpleNamespace(), SimpleNamespace())
    folder = tmp_path / "checkpoints" / "2"
    folder.mkdir(parents=True)

    def train(what):
        (folder / "state").write_text(what)
        sealed.write_manifest(folder)

    def ask(questions=Questions()):  # noqa: B008  (frozen)
        _, (found,), remarks = comparison._ask([_outcome(tmp_path)], questions, reference, lambda _: None)
        assert not remarks and found["aligned"] == 0.5 and found["frechet"] == 3.0
        return len(measured)

    train("one")
    assert [ask(), ask()] == [1, 1]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [comparison.KEPT]
    train("another")
    assert [ask(), ask()] == [2, 2]
    assert ask(Questions(weights="raw")) == 3
    (folder / "state").write_text("torn")  # named nowhere: it would not be what is measured
    members, found, (said,) = comparison._ask([_outcome(tmp_path)], Questions(), reference, lambda _: None)
    assert not members and not found and len(measured) == 3
    assert said == "repa,seed=0: its checkpoints are gone or damaged, so it is left out"


def test_runs_without_checkpoints_leave_a_table(tmp_path, monkeypatch):
    """What one answered before, at its end and to the same questions, stands; another one is left out."""
    monkeypatch.setattr(comparison, "_reference", lambda *_: Reference({}, SimpleNamespace(width=2), None))
    asked = comparison._asked(Questions(), None) | {"checkpoint": "step 2, 0123"}
    others = [{"checkpoint": "step 1, 0123"}, {"version": 1}, {"questions": dict(samples=4)}]
    outcomes = []
    for seed, kept in enumerate([{}, *others]):
        workdir = tmp_path / str(seed)
        workdir.mkdir()
        (workdir / comparison.KEPT).write_text(json.dumps({"asked": asked | kept, "values": {"frechet": seed}}))
        outcomes.append(_outcome(workdir, f"repa,seed={seed}", seed=seed))
    outcomes.append(_outcome(tmp_path / "bare", "repa,seed=9", seed=9))
    rows, remarks = comparison.answers(outcomes, Questions())
    assert rows[1:] == [Row(DATA, "repa", (0,), {"frechet": [0.0]})]
    gone = "its checkpoints are gone or damaged"
    assert f"repa,seed=0: {gone}; what stands here was measured earlier (step 2, 0123)" in remarks
    assert all(f"repa,seed={seed}: {gone}, so it is left out" in remarks for seed in (1, 2, 3, 9))
    with pytest.raises(FileNotFoundError, match=r"nothing to compare: .*seed=9: its checkpoints are gone"):
        comparison.answers(outcomes[-1:], Questions())


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], dict(weights="ema")),
        (["--weights=raw", "--count=4", "--clips=3"], dict(weights="raw", samples=4, clips=3)),
        (["--weights=last"], None),
    ],
)
def test_compare_takes_the_weights_that_are_asked(words, asked, monkeypatch, tmp_path):
    values = flags.FlagValues()
    for name, default in (("root", str(tmp_path)), ("weights", "ema")):
        flags.DEFINE_string(name, default, "", flag_values=values)
    for name, default in (("count", 2048), ("clips", 16)):
        flags.DEFINE_integer(name, default, "", flag_values=values)
    argv = values(["evaluate", "compare", *words])
    seen = []
    monkeypatch.setattr(evaluate, "flags", SimpleNamespace(FLAGS=values))
    monkeypatch.setattr(evaluate, "compare", lambda root, **options: seen.append((root, options)))
    if asked is None:
        with pytest.raises(ValueError, match=r"--weights=last: write ema or raw"):
            evaluate.main(argv)
    else:
        assert evaluate.main(argv) == 0 and seen == [(tmp_path, asked)]


def _rows():
    lossless = {"denoising_low": [0.3, 0.32, 0.34], "motion_error": [10.0, 12.0, 14.0], "frechet": [90.0, 91.0, 95.0]}
    return [
        Row(DATA, REAL, (), {"motion_error": [0.4], "frechet": [3.0]}),
        Row(DATA, "baseline", (0, 1, 2), lossless),
        Row(DATA, "m_tsa", (0, 1), {"denoising_low": [0.3, 0.3], "motion_error": [9.0, np.nan], "aligned": [0.2, 0.3]}),
        Row("demo, 8 × 16 × 16", "baseline", (0, 1, 2), {"denoising_low": [0.1, 0.2, 0.3]}),
    ]


def test_the_table_has_means_deviations_and_what_is_missing(tmp_path):
    rows = _rows()
    remarks = comparison.missing(rows)
    assert any("m_tsa lacks seed 2" in line and DATA in line for line in remarks)
    assert any("no finished run of repa, trd, tsa, moalign, align4gen" in line for line in remarks)
    assert any("fewer than 3 seeds" in line for line in remarks)
    comparison.write(tmp_path, rows, remarks, Questions())
    comparison.draw(rows, tmp_path / "compare.png")
    text = (tmp_path / "compare.md").read_text()
    assert "| baseline | 3 | 0.320 ± 0.020 |  | 12.0 ± 2.0 | 92.0 ± 2.6 |" in text
    assert "| m_tsa | 2 | 0.3 | 0.250 ± 0.071 | 9 |  |" in text
    assert f"| {REAL} |  |  |  | 0.4 | 3 |" in text and text.count("###") == 2
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert kept["rows"][2]["columns"]["motion_error"] == {"mean": 9.0, "std": None, "values": [9.0, None]}
    flat = comparison.by_run(rows)
    assert len(flat) == 1 + 3 + 2 + 3 and flat[2] == {"data": DATA, "method": "baseline", "seed": 1} | {
        "denoising_low": 0.32,
        "motion_error": 12.0,
        "frechet": 91.0,
    }
    assert (tmp_path / "compare.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("mean", "deviation", "shown"),
    [
        (0.12341, 0.00678, "0.1234 ± 0.0068"),
        (123.4, 45.6, "123 ± 46"),
        (0.5, float("nan"), "0.5"),
        (float("nan"), float("nan"), ""),
        (12.0, 0.0, "12"),
    ],
)
def test_a_cell_shows_the_digits_that_mean_something(mean, deviation, shown):
    assert comparison.cell(mean, deviation) == shown


def test_runs_share_the_cores_where_there_are_no_gpus(monkeypatch):
    spec = importlib.util.spec_from_file_location("sweep_for_cores", ROOT / "launch" / "sweep.py")
    sweep = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sweep_for_cores", sweep)
    spec.loader.exec_module(sweep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    assert sweep.shares_of_cores(2, [{}, {}]) == [{0, 2}, {1, 5}]
    assert sweep.shares_of_cores(1, [{}]) == [None] and sweep.shares_of_cores(5, [{}] * 5) == [None] * 5
    assert sweep.shares_of_cores(2, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]) == [None, None]
    monkeypatch.undo()
    before = os.sched_getaffinity(0)
    with sweep.on_cores({min(before)}):
        assert subprocess.check_output([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]).strip() == (
            b"{%d}" % min(before)
        )
    assert os.sched_getaffinity(0) == before


@pytest.mark.slow
def test_two_methods_from_sweep_to_table(tmp_path):
    root, few = tmp_path / "r", ["--grid", "seed=0", "--config.steps=3", "--config.optimizer.warmup_steps=1"]
    points = [f"--config=configs/compare.py:{method},gravity" for method in ("baseline", "m_tsa")]
    subprocess.run([sys.executable, "launch/sweep.py", *points, *few, f"--root={root}"], cwd=ROOT, check=True)
    text = evaluate.compare(root, samples=4, clips=4)
    assert "| m_tsa | 1 |" in text and "no finished run of repa" in text and "lacks seed" not in text
    with open(root / "compare.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [REAL, "baseline", "m_tsa"]
    assert float(rows[0]["motion_error"]) < 2 < float(rows[1]["motion_error"])
    kept = root / "compare-baseline-gravity,seed=0" / comparison.KEPT
    stamp = kept.stat().st_mtime_ns
    assert evaluate.compare(root, samples=4, clips=4) == text and kept.stat().st_mtime_ns == stamp
