"""What a person may write in a config, and what is said to one who wrote something else."""

import json
import sys

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from configs import base, baseline, repa, trd, tsa
from jaxalign.training import config as config_lib


@pytest.fixture
def parse(monkeypatch):
    def read(*argv):
        argv = ["main", "--config", "configs/tsa.py", *argv]
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


def test_the_same_command_finds_its_workdir_and_another_does_not():
    one = config_lib.default_workdir(config_lib.resolve(tsa.get_config()), "tsa")
    longer = tsa.get_config()
    longer.checkpoint.every = 7
    assert config_lib.default_workdir(config_lib.resolve(longer), "tsa") == one
    other = tsa.get_config()
    other.seed = 1
    assert config_lib.default_workdir(config_lib.resolve(other), "tsa") != one


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
    with pytest.raises(ValueError, match="schedule of this run spans all its steps"):
        config_lib.compare(stored, other)
