"""What a motion head knows of its teacher: settings and numbers, be they in upstream's file or a converted folder."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from configs import moalign, moalign_subspace
from jaxalign import teachers
from jaxalign.interop import converted, mapping, safetensors_file
from jaxalign.teachers import motion_head, videomae
from jaxalign.training import alignments, setup, subspaces
from jaxalign.training import config as config_lib

NAME = "tiny_mae"
SIZES = dict(width=32, depth=2, num_heads=2, hidden=64, image_size=32, frames=4, size=32)
DATA = dict(source="synthetic", num_frames=4, height=16, width=16, stride=1)


def drawn(tree, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32).astype(dtype), tree)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """{what: where} of one teacher's weights: upstream's file, the folders that convert makes of it, and others'."""
    folder = tmp_path_factory.mktemp("weights")
    rules = videomae.RULES["finetuned"]
    with pytest.MonkeyPatch.context() as patch:
        entry = teachers.Entry(videomae.VideoMAE, videomae.VideoMAEConfig, videomae.RULES, SIZES)
        patch.setitem(teachers.TEACHERS, NAME, entry)
        whole = functools.partial(drawn, teachers.abstract(NAME, num_classes=3))
        for name, seed in (("file", 0), ("other", 1)):
            safetensors_file.write(folder / f"{name}.safetensors", mapping.state_dict(whole(seed), rules))
        about = dict(name=NAME, source="file", layout="finetuned", settings={"num_classes": 3})
        for name, dtype in (("folder", np.float32), ("bf16", ml_dtypes.bfloat16)):
            converted.write(folder / name, whole(dtype=dtype), **about)
        files = {name: str(folder / f"{name}.safetensors") for name in ("file", "other")}
        yield files | {name: str(folder / name) for name in ("folder", "bf16")}


def stage_1(weights, folder):
    """The head that a run on a teacher of these weights leaves."""
    config = moalign_subspace.get_config("demo")
    teacher = dict(name=NAME, weights=weights, size=None, stride=None)
    config.update(dict(teacher=teacher, data=DATA, motion=dict(hidden=4, width=3)))
    config = config_lib.resolve(config)
    run = setup.build(config)
    model = drawn(jax.eval_shape(run.init, jax.random.key(0))["model"])
    return subspaces.save_head(config, run, model, folder)


def stage_2(weights, head):
    """The teacher with shapes for leaves that a run aligns with."""
    config = moalign.get_config("demo")
    teacher = dict(name=NAME, weights=weights, size=None, stride=None, motion_head=str(head))
    config.update(dict(teacher=teacher, data=DATA))
    ((_, _, _, found),) = alignments.asked_teachers(config_lib.resolve(config), (4, 4, 4)).values()
    return found


@functools.cache
def teacher_of(weights):
    return teachers.load(NAME, weights)


def loaded(weights, head):
    return motion_head.load(head, name=NAME, teacher=teacher_of(weights))


@pytest.fixture(scope="module")
def heads(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    return {name: stage_1(weights[name], folder / name) for name in ("file", "folder", "other")}


def test_upstreams_file_and_the_converted_folder_are_one_teacher(weights, heads):
    """The folder notes that it keeps the classifier, which makes no token."""
    assert "head" in dict(stage_2(weights["folder"], heads["folder"]).teacher.__dict__)
    for first, second in (("file", "folder"), ("folder", "file"), ("file", "bf16")):
        assert stage_2(weights[second], heads[first]).width == 3
        loaded(weights[second], heads[first])


def test_other_weights_are_refused_in_one_line(weights, heads, tmp_path):
    for there, here in (("file", "other"), ("other", "bf16")):
        with pytest.raises(ValueError, match=rf"other weights of tiny_mae \({there}.safetensors\): .* here;") as error:
            loaded(weights[here], heads[there])
        assert "\n" not in str(error.value)
    # A head of before does not know.
    note = motion_head.note(heads["other"])
    assert note["teacher"].pop("sample")
    note["teacher"]["settings"]["num_classes"] = 0
    for name in (motion_head.NOTE, motion_head.WEIGHTS):
        (tmp_path / name).write_bytes((heads["other"] / name).read_bytes())
    (tmp_path / motion_head.NOTE).write_text(json.dumps(note))
    loaded(weights["folder"], tmp_path)
