"""The demo with another teacher: its whole run against a file in upstream's format, and what it says without one."""

import json

import numpy as np
import pytest

from configs import tsa
from jaxalign import teachers
from jaxalign.interop import mapping
from jaxalign.training import config as config_lib
from jaxalign.training import loop

NAME = "dinov2_s"


def demo(**teacher):
    """configs/tsa.py with --config.teacher.name=dinov2_s, at a size that a test can train."""
    config = tsa.get_config()
    small = dict(num_frames=2, height=16, width=16, stride=1, source="synthetic")
    config.update(dict(steps=1, batch_size=2, data=small, sample=dict(steps=1, count=1)))
    config.align.projector.hidden = 16
    config.teacher.update(dict(name=NAME, size=56, **teacher))  # 4 x 4 patches, as the student has
    return config_lib.resolve(config)


def test_without_the_file_it_says_which_and_how(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        loop.train(demo(), tmp_path / "run")
    for part in (
        "it wants dinov2_vits14_pretrain.pth of DINOv2 (Apache-2.0), found at https://",
        "--config.teacher.weights=FILE",
        "python -m jaxalign.convert dinov2_s --weights FILE --out FOLDER",
    ):
        assert part in str(caught.value)


def test_it_trains_against_a_file_of_upstreams_form(tmp_path):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    shapes = mapping.upstream_shapes(teachers.abstract(NAME), teachers.TEACHERS[NAME].layouts[""])
    state = {key: 0.05 * random.standard_normal(spec.shape, np.float32) for key, spec in shapes.items()}
    path = tmp_path / teachers.files(NAME)[0].name
    torch.save({key: torch.from_numpy(array) for key, array in state.items()}, path)
    assert loop.train(demo(weights=str(path)), tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 1 and summary["train"]["align/m_tsa"] > 0.1
    assert np.isfinite(list(summary["held_out"].values())).all() and summary["held_out"]["m_tsa"] > 0.1
    assert list((tmp_path / "run" / "figures").glob("correspondence_*.png"))
