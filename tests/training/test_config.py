"""What a person may write in a config, and what is said to one who wrote something else."""

import hashlib
import json
import shutil
import sys
from types import SimpleNamespace

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from configs import align4gen, base, baseline, compare, repa, trd, tsa
from jaxalign import main
from jaxalign.training import config as config_lib
from jaxalign.training import setup


@pytest.fixture
def parse(monkeypatch):
    def read(*argv):
        named = any(word.split("=")[0] == "--config" for word in argv)
        argv = ["main", *([] if named else ["--config", "configs/tsa.py"]), *argv]
        monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks for overrides there
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
        config_lib.parse_flags(argv, values)
        return values.config

    return read


@pytest.fixture
def message(parse, capsys):
    def of(*argv):
        with pytest.raises(SystemExit) as stopped:
            parse(*argv)
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, "one line"
        return said

    return of


def test_override_and_scale(parse):
    assert parse("--config.align.temperature=0.2").align.temperature == 0.2
    config = parse("--config", "configs/tsa.py:vdit_l")
    assert config.scale == "vdit_l" and config.model.preset == "L"


def test_unknown_fields_name_the_nearest(message):
    assert "config.algin.weight: no such field; did you mean config.align.weight?" in message("--config.algin.weight=1")
    assert "did you mean config.align.weight?" in message("--config.align.weigth=1")


def test_wrong_type_and_missing_file(message):
    assert "config.align.weight = abc: could not convert" in message("--config.align.weight=abc")
    assert "nope.py" in message("--config", "configs/nope.py")


def test_unknown_scale(message):
    said = message("--config", "configs/tsa.py:huge")
    assert "write one of demo, cogvideox_2b, cogvideox_5b, vdit_l, vdit_xl" in said
    assert "Traceback" not in said and "configs/tsa.py:huge: scale 'huge'" in said


def test_the_word_none_leaves_a_text_out(parse):
    config = parse("--config=configs/moalign.py", "--config.teacher.motion_head=None", "--config.teacher.size=None")
    teacher = config_lib.resolve(config).teacher
    assert teacher.motion_head is None and teacher.size is None
    where = "--config.teacher.beside.sam21_hiera_bplus"
    config = parse("--config=configs/align4gen.py:sky_l", f"{where}.motion_head=none", f"{where}.output=None")
    config.data.source = "somewhere"
    section = config_lib.resolve(config).teacher.beside.sam21_hiera_bplus
    assert section.motion_head is None and section.output is None and section.name == "sam21_hiera_bplus"
    config = base.get_config(align=dict(method="trd", weight=1.0))
    config.align.beside = dict(x=dict(teacher=dict(motion_head="None")), y=dict(method="none"))
    beside = config_lib.resolve(config).align.beside
    assert beside.x.teacher.motion_head is None and beside.y.method == "none", "a choice that bears the name"


def test_irepa_is_given_its_convolution(parse):
    head = ("--config.align.projector.hidden=0", "--config.align.projector.conv=frame")
    config = parse("--config=configs/repa.py", "--config.align.method=irepa", *head)
    run = setup.build(config_lib.resolve(config), abstract=True)
    (a,) = run.task.alignments
    assert (a.method, a.head.hidden, a.head.conv, a.grid) == ("irepa", 0, "frame", run.student_grid)


def test_a_config_is_shown_before_its_videos_are_named(monkeypatch, capsys):
    monkeypatch.setattr(main, "CONFIG", SimpleNamespace(value=tsa.get_config("vdit_l")))
    monkeypatch.setattr(main, "PRINT_CONFIG", SimpleNamespace(value=True))
    assert main.main(["main"]) == 0 and "scale: vdit_l" in capsys.readouterr().out
    monkeypatch.setattr(main, "PRINT_CONFIG", SimpleNamespace(value=False))
    with pytest.raises(ValueError, match=r"config.data.source is empty"):
        main.main(["main"])


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(objective="flwo"), "did you mean 'flow'"),
        (dict(align=dict(method="m-tsa")), "did you mean 'm_tsa'"),
        (dict(batch_size=0), "config.batch_size = 0"),
        (dict(align=dict(weight=-1.0)), "must not be negative"),
        (dict(ema_decay=1.0), "config.ema_decay"),
        (dict(optimizer=dict(grad_accum=3)), "does not divide"),
        (dict(data=dict(source="")), "--config.data.source=FOLDER"),
    ],
)
def test_impossible_values(change, said):
    config = base.get_config()
    config.update(change)
    with pytest.raises(ValueError, match=said):
        config_lib.resolve(config)


def test_no_alignment_is_one_thing_however_it_is_said():
    config = tsa.get_config()
    config.align.weight = 0.0
    resolved = config_lib.resolve(config)
    assert resolved.align.method == "none" and resolved.align.weight == 0
    named = tsa.get_config()
    named.align.method = "none"
    assert config_lib.identity(config_lib.resolve(named)) == config_lib.identity(resolved)
    assert config_lib.identity(config_lib.resolve(baseline.get_config())) == config_lib.identity(resolved)


@pytest.mark.parametrize("module", [baseline, repa, trd, tsa])
@pytest.mark.parametrize("scale", list(base.SCALES))
def test_every_config_and_scale_resolves(module, scale):
    config = module.get_config(scale)
    config.data.source = config.data.source or "somewhere"
    assert config_lib.resolve(config).scale == scale
    json.dumps(config.to_dict())


def test_the_latents_have_the_papers_heads_and_taps():
    for module in (repa, trd, tsa, align4gen):
        scales = {"vdit_l": 8, "vdit_xl": 12} if module is not align4gen else {"ucf101_l": 8, "ucf101_xl": 12}
        for scale, depth in scales.items():
            align = module.get_config(scale).align
            assert (align.depth, align.projector.hidden) == (depth, 2048), (module, scale)
    compared, own = compare.get_config("align4gen,gravity").align, align4gen.get_config("demo").align
    for field in ("method", "weight", "resize", "fusion"):
        assert compared[field] == own[field]


@pytest.mark.parametrize(
    ("main_ends", "beside", "spans"),
    [(100, {}, False), (0, {}, True), (100, dict(schedule_steps=0), True), (0, dict(schedule_steps=100), True)],
)
def test_every_schedule_may_span_the_run(main_ends, beside, spans):
    config = base.get_config(optimizer=dict(schedule="constant"))
    config.align.update(method="trd", weight=1.0, schedule="linear", schedule_steps=main_ends)
    config.align.beside = dict(x=beside)
    assert config_lib.spans_the_run(config) == spans
    config.align.update(schedule="constant")
    config.align.beside = dict(x=dict(schedule="cosine"))
    assert config_lib.spans_the_run(config) == (main_ends == 0)


def test_the_same_command_finds_its_workdir_and_another_does_not():
    one = config_lib.default_workdir(config_lib.resolve(tsa.get_config()), "tsa")
    longer = tsa.get_config()
    longer.checkpoint.every = 7
    assert config_lib.default_workdir(config_lib.resolve(longer), "tsa") == one
    other = tsa.get_config()
    other.seed = 1
    assert config_lib.default_workdir(config_lib.resolve(other), "tsa") != one


def test_how_a_run_is_computed_may_change_on_the_way(tmp_path, monkeypatch):
    """What is said to do behind a NaN, and what fewer or smaller chips need."""
    monkeypatch.chdir(tmp_path)
    config = config_lib.resolve(tsa.get_config())
    workdir = config_lib.default_workdir(config, "tsa")
    how = dict(remat=False, attention="auto", on_nonfinite="stop")  # workdirs have been named with these
    text = json.dumps(config_lib.identity(config) | how, sort_keys=True)
    assert workdir.name == f"tsa-demo-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    stored = json.loads(json.dumps(config.to_dict()))
    for field, value in dict(remat=True, attention="xla", on_nonfinite="skip").items():
        changed = ml_collections.ConfigDict(config.to_dict())
        changed[field] = value
        assert config_lib.compare(stored, changed) == [f"config.{field}: {how[field]!r} -> {value!r}"]
        own = config_lib.default_workdir(changed, "tsa")
        assert own != workdir
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text("{}")
        assert config_lib.default_workdir(changed, "tsa") == workdir
        own.mkdir()
        (own / "config.json").write_text("{}")  # as both were made before
        assert config_lib.default_workdir(changed, "tsa") == own
        assert config_lib.default_workdir(config, "tsa") == workdir
        shutil.rmtree("runs")


def test_a_run_of_before_a_field_is_still_the_same_run():
    config = config_lib.resolve(tsa.get_config())
    older = config.to_dict()
    del older["data"]["split"], older["data"]["frame_rate"]
    assert config_lib.identity(older) == config_lib.identity(config)
    config.data.split = 2
    assert config_lib.identity(older) != config_lib.identity(config)


def test_compare_lists_differences():
    config = config_lib.resolve(tsa.get_config())
    stored = json.loads(json.dumps(config.to_dict()))
    assert config_lib.compare(stored, config) == []
    other = ml_collections.ConfigDict(config.to_dict())
    other.align.temperature = 0.3
    with pytest.raises(ValueError, match=r"align.temperature: 0.1 there, 0.3 here"):
        config_lib.compare(stored, other)
    other = ml_collections.ConfigDict(config.to_dict())
    other.data.workers = 2
    assert config_lib.compare(stored, other) == ["config.data.workers: 0 -> 2"]
    other.steps += 1
    with pytest.raises(
        ValueError, match=r"schedule of this run spans all its steps: keep .* or give another --workdir"
    ):
        config_lib.compare(stored, other)
