"""MoAlign's stage 1 and 2 on tiny clips: the loss, a run through the loop, its artefact, and the target made of it."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from flax import nnx

from configs import base, moalign, moalign_subspace
from jaxalign import evaluate, precompute, teachers
from jaxalign.alignment.relations import relation_l1
from jaxalign.alignment.tokens import frame_weights
from jaxalign.data import host_flow, pipeline
from jaxalign.models.motion import MotionConfig, MotionProjection, MotionSubspace
from jaxalign.tasks import aligning
from jaxalign.tasks.motion_subspace import FLOW_PART, TARGET_PART, MotionSubspaceTask
from jaxalign.teachers import motion_head, raft
from jaxalign.training import config as config_lib
from jaxalign.training import loop, makers, setup
from jaxalign.training.data_settings import clip_settings
from jaxalign.training.makers import Options
from jaxalign.training.prompts import open_told
from jaxalign.training.trained import open_run

TEACHER = dict(size=32, stride=8)  # 4 x 4 tokens a frame, 40 channels
TINY = dict(
    steps=3,
    batch_size=2,
    teacher=TEACHER,
    motion=dict(hidden=8, width=6, smooth=0.0),
    data=dict(source="synthetic", num_frames=3, height=16, width=16, stride=1),
    checkpoint=dict(every=3),
    sample=dict(steps=1, count=1),
    log_every=1,
    sample_every=3,
    eval_every=3,
)


def stage_1(**changes):
    config = moalign_subspace.get_config("demo")
    for layer in (TINY, changes):
        config.update(layer)
    return config_lib.resolve(config)


def stage_2(head, **teacher):
    config = moalign.get_config("demo")
    tiny = {k: v for k, v in TINY.items() if k != "motion"}
    teacher = TEACHER | dict(motion_head=head) | teacher
    config.update(tiny | dict(teacher=teacher, align=dict(projector=dict(hidden=16))))
    config.model.patch_size = 4
    return config_lib.resolve(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "subspace"
    assert loop.train(stage_1(), workdir) == 0
    return workdir


def random_leaves(module):
    leaves, treedef = jax.tree.flatten(module)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(treedef, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module")
def subspace():
    return random_leaves(MotionSubspace(MotionConfig(5, (4, 2, 3), (6, 6), 7, 6, 4), rngs=nnx.Rngs(0)))


def test_the_projection_is_two_convolutions_over_time(subspace):
    projection = subspace.projection
    tokens = np.asarray(jax.random.normal(jax.random.key(0), (2, 4, 2, 3, 5)))
    first, second = getattr(projection, "0"), getattr(projection, "2")
    kernel = np.asarray(first.kernel[...])[:, 0, 0]
    padded = np.pad(tokens, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    hidden = np.stack([sum(padded[:, f + k] @ kernel[k] for k in range(3)) for f in range(4)], 1) + first.bias[...]
    hidden = hidden / (1 + np.exp(-hidden))
    wanted = hidden @ np.asarray(second.kernel[...])[0, 0, 0] + second.bias[...]
    np.testing.assert_allclose(projection(jnp.asarray(tokens)), wanted, atol=1e-5)
    np.testing.assert_allclose(first(tokens) * jax.nn.sigmoid(first(tokens)), hidden, atol=1e-5)  # nnx's own


def test_the_head_of_an_image_teacher_sees_neighbours_of_normalised_tokens():
    settings = MotionConfig(5, (4, 2, 3), (6, 6), 7, 6, kernel=3, norm=True, decoder=0, unit=0.5)
    module = random_leaves(MotionSubspace(settings, rngs=nnx.Rngs(0)))
    tokens = np.asarray(jax.random.normal(jax.random.key(0), (2, 4, 2, 3, 5))) * 9 + 20
    # torch's convolution of three dimensions of what its LayerNorm makes of the tokens
    normed = torch.nn.functional.layer_norm(torch.tensor(tokens), (5,), eps=1e-6).movedim(-1, 1)
    first, second = (getattr(module.projection, name) for name in ("0", "2"))
    weights = [torch.tensor(np.asarray(x[...])) for x in (first.kernel, first.bias, second.kernel, second.bias)]
    hidden = torch.nn.functional.conv3d(normed, weights[0].permute(4, 3, 0, 1, 2), weights[1], padding=1)
    wanted = torch.nn.functional.conv3d(torch.nn.functional.silu(hidden), weights[2].permute(4, 3, 0, 1, 2), weights[3])
    motion, flow = module(jnp.asarray(tokens))
    np.testing.assert_allclose(motion, wanted.movedim(1, -1), atol=1e-4)
    # The decoder is one matrix in its unit: the flow of a token is a line of the subspace there.
    (last,) = [getattr(module.decoder, name) for name in ("0", "2", "4") if hasattr(module.decoder, name)]
    line = 0.5 * (np.asarray(motion) @ np.asarray(last.kernel[...])[0, 0, 0] + np.asarray(last.bias[...]))
    np.testing.assert_allclose(flow, jax.image.resize(line, (2, 4, 6, 6, 2), "bilinear"), atol=1e-5)


@pytest.mark.parametrize("wrong", [dict(kernel=2), dict(kernel=0), dict(unit=0.0), dict(decoder=-1), dict(width=0)])
def test_shapes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"config\.motion"):
        MotionConfig(5, (4, 2, 3), (6, 6), **wrong)


def test_the_loss_is_the_mean_l1_of_flow_in_fractions_and_all_of_it_learns(subspace):
    task = MotionSubspaceTask("t", 4)
    keys = jax.random.split(jax.random.key(2), 2)
    tokens, flow = jax.random.normal(keys[0], (2, 4, 2, 3, 5)), jax.random.normal(keys[1], (2, 8, 6, 6, 2))
    batch = {"teacher/t": tokens, FLOW_PART: flow}
    trainable = {"model": subspace, "heads": {}}
    (loss, metrics), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(trainable, {}, batch, None, 0, {})
    target = np.asarray(flow).reshape(2, 4, 2, 6, 6, 2).mean(2) / 6
    motion, predicted = subspace(tokens)
    assert motion.shape == (2, 4, 2, 3, 6) and predicted.shape == target.shape
    np.testing.assert_allclose(loss, np.abs(predicted - target).mean(), rtol=1e-5)
    assert metrics["flow"] == loss > 0
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    rounded = MotionSubspaceTask("t", 4, smooth=0.2).loss(trainable, {}, batch, None, 0, {})
    error = np.abs(predicted - target)
    wanted = np.where(error < 0.2, error**2 / 0.4, error - 0.1).mean()
    np.testing.assert_allclose(rounded[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(rounded[1]["flow"], loss, rtol=1e-5)
    held_out = task.held_out(trainable, {}, batch, None, None)
    np.testing.assert_allclose(held_out["flow_of_no_motion"].mean(), np.abs(target).mean(), rtol=1e-5)
    assert held_out["flow"].shape == (1, 2)


def test_a_run_leaves_its_head_figures_and_numbers(finished, capsys):
    for name in ("motion_head/motion_head.safetensors", "figures/flow_000003.png", "figures/curves.png"):
        assert (finished / name).stat().st_size > 100, name
    assert not (finished / "samples").exists()
    note = json.loads((finished / "motion_head" / motion_head.NOTE).read_text())
    assert note["teacher"]["name"] == "efficientnet_lite0" and note["teacher"]["width"] == 40
    assert note["grid"] == [3, 4, 4] and (note["hidden"], note["width"]) == (8, 6)
    assert (note["kernel"], note["norm"]) == (3, True)
    assert len(note["teacher"]["sample"]) == 16  # numbers of the teacher, by which it is known again
    summary = json.loads((finished / "summary.json").read_text())
    assert {"flow", "flow_of_no_motion"} == summary["held_out"].keys()
    # Called again, a finished run writes the head that somebody removed.
    shutil.rmtree(finished / "motion_head")
    assert loop.train(stage_1(), finished) == 0
    assert "motion_head" in capsys.readouterr().out and (finished / "motion_head" / motion_head.NOTE).is_file()


def test_stage_2_is_drawn_to_the_subspace_of_stage_1(finished):
    run = setup.build(stage_2(str(finished / "motion_head")))
    (a,) = run.task.alignments
    assert (a.method, a.grid, a.head.teacher_width) == ("moalign", (3, 4, 4), 6)
    (target,) = run.frozen["teachers"].values()
    assert (target.width, target.grid((3, 16, 16))) == (6, (3, 4, 4))
    trained = open_run(finished, task="motion_subspace")
    video = jax.random.uniform(jax.random.key(0), (1, 3, 16, 16, 3), minval=-1.0)
    both = jax.jit(lambda target, projection, video: (target(video), projection(target.teacher(video))))
    found, wanted = both(target, trained.trainable["model"].projection, video)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert float(jnp.abs(found).max()) > 0

    student = jax.random.normal(jax.random.key(3), (1, 3, 4, 4, 6))
    key = next(iter(run.frozen["teachers"]))
    heads = {a.name: jax.tree_util.Partial(lambda x: x)}
    loss = aligning.distance(a, heads, {a.depth: student}, {key: found}, video, {}, jnp.float32)
    weights = frame_weights("moalign", 3, 10.0)
    flat = lambda x: x.reshape(1, 3, 16, -1)  # noqa: E731
    np.testing.assert_allclose(loss, relation_l1(flat(student), flat(found), frame_weights=weights), rtol=1e-5)
    assert float(loss[0]) > 0


def test_a_head_of_another_teacher_is_refused_in_one_line(finished, tmp_path):
    head = str(finished / "motion_head")
    for teacher, said in (
        (dict(stride=16), "width 40 there, 112 here"),
        (dict(size=64), "size 32 there, 64 here"),
        (dict(name="dinov2_b", size=28, stride=None), "name 'efficientnet_lite0' there, 'dinov2_b' here"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            setup.build(stage_2(head, **teacher), abstract=True)
        assert "\n" not in str(error.value) and "config.teacher.motion_head" in str(error.value)
    with pytest.raises(FileNotFoundError, match="moalign_subspace"):
        setup.build(stage_2(str(tmp_path)), abstract=True)
    with pytest.raises(ValueError, match="motion_head is empty"):
        setup.build(stage_2(""))


def test_a_head_of_before_there_was_a_kernel_is_read_as_it_was(tmp_path):
    teacher = teachers.abstract("efficientnet_lite0", **TEACHER)
    projection = MotionProjection(40, 8, 6, rngs=nnx.Rngs(0))
    folder = motion_head.save(tmp_path, projection, name="efficientnet_lite0", teacher=teacher)
    note = motion_head.note(folder)
    assert (note.pop("kernel"), note.pop("norm")) == (1, False)
    (folder / motion_head.NOTE).write_text(json.dumps(note))
    found = motion_head.load(folder, name="efficientnet_lite0", teacher=teacher).projection
    assert jax.tree.structure(found) == jax.tree.structure(projection)
    # One whose note says another kernel than its weights have is damaged.
    (folder / motion_head.NOTE).write_text(json.dumps(note | dict(kernel=3)))
    with pytest.raises(ValueError, match="shape that its motion_head"):
        motion_head.load(folder, name="efficientnet_lite0", teacher=teacher)


def test_a_damaged_head_is_refused(finished, tmp_path):
    shutil.copytree(finished / "motion_head", tmp_path / "head")
    (tmp_path / "head" / motion_head.WEIGHTS).write_bytes(b"0" * 64)
    with pytest.raises(ValueError, match="damaged"):
        setup.build(stage_2(str(tmp_path / "head")))


@pytest.mark.parametrize("scale", base.SCALES)
def test_student_and_subspace_meet_at_every_scale(scale):
    config = moalign.get_config(scale)
    config.data.source = "demo"
    (a,) = setup.build(config_lib.resolve(config), abstract=True).task.alignments
    assert a.head.teacher_width == 64 and a.settings.tau == 10
    assert base.is_cogvideox(scale) == ((a.grid, a.depth) == ((24, 10, 15), 17))


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(task="motion"), "config.task"),
        (dict(motion=dict(flow=dict(name="farneback"))), "config.motion.flow.name"),
        (dict(align=dict(method="trd", weight=0.5)), "aligns nothing"),
        (dict(data=dict(source="demo")), "does not know the flow"),
        (dict(teacher=dict(name="raft_small", size=None, stride=None)), "gives flow, not tokens"),
    ],
)
def test_mistakes_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        config = stage_1(**changes)
        setup.build(config, abstract=True)
        open_told(config)


def test_flow_of_a_network_is_computed_while_training_and_its_settings_are_its_own():
    flow = dict(name="raft_small", size=(128, 128), iterations=1)
    config = stage_1(motion=dict(flow=flow))
    run = setup.build(config, abstract=True)
    assert run.frozen["flow"].config.size == (128, 128) and open_told(config).beside is None
    batch = {"video": jax.ShapeDtypeStruct((2, 3, 16, 16, 3), np.uint8)}
    trainable = jax.eval_shape(run.init, jax.random.key(0))
    loss, _ = jax.eval_shape(run.task.loss, trainable, run.frozen, batch, None, 0, {})
    assert loss.shape == ()


class OnePixelRight(nnx.Module):
    """A flow network that has its answer already."""

    def __init__(self, **settings):
        self.config = raft.RAFTConfig("small", **settings)

    def __call__(self, video):
        return jnp.broadcast_to(jnp.array([1.0, 0.0]), (video.shape[0], video.shape[1] - 1, *video.shape[2:4], 2))


def test_precomputed_flow_is_taken_and_that_of_another_network_refused(tmp_path, monkeypatch):
    load = teachers.load
    monkeypatch.setattr(
        teachers, "load", lambda name, *a, **k: OnePixelRight(**k) if "raft" in name else load(name, *a, **k)
    )
    for name in "ab":
        (tmp_path / f"{name}.pth").write_text(name)
    flow = dict(name="raft_small", size=(128, 136), iterations=3, weights=str(tmp_path / "a.pth"))
    config = stage_1(motion=dict(flow=flow))
    options = Options(what=("video", "flow"), clips=2, held_out=1)  # the network is the config's
    assert precompute.precompute(config, tmp_path / "made", options, say=lambda line: None)["clips"] > 0
    config.data.source = str(tmp_path / "made")
    source = open_told(config)
    batch = pipeline.batches(source, seed=0, batch_size=2, **clip_settings(config))[0]
    np.testing.assert_allclose(batch[TARGET_PART][..., 0], 1 / 16, rtol=1e-2)
    assert batch["video"].shape[0] == 2 and batch[TARGET_PART].shape == (2, 3, 16, 16, 2)
    assert "flow" not in setup.build(config, abstract=True, given=source.given).frozen
    for changes, said in (
        (dict(flow=dict(iterations=4)), r"flow targets .* \(flow.iterations: 3 there, 4 here\)"),
        (dict(flow=dict(size=(128, 128))), r"flow.size: \[128, 136\] there, \[128, 128\] here"),
        (dict(flow=dict(weights=str(tmp_path / "b.pth"))), "flow.weights: '1 bytes, .* there, '1 bytes, .* here"),
        (dict(flow=dict(name="raft_large")), "holds flow of raft_small"),
    ):
        other = ml_collections.ConfigDict(config.to_dict())
        other.motion.update(changes)
        with pytest.raises(ValueError, match=said):
            open_told(other)
    config.motion.flow.update(weights="", pairs_at_once=1)  # not here, and indifferent
    open_told(config)


def test_the_flow_network_of_precompute_is_the_configs():
    config = stage_1(motion=dict(flow=dict(name="sea_raft_s", iterations=2, weights="W")))
    assert makers.asked_flow(config, Options()) == ("sea_raft_s", "W", {"iterations": 2})
    assert makers.asked_flow(config, Options(flow_weights="V")) == ("sea_raft_s", "V", {"iterations": 2})
    assert makers.asked_flow(config, Options(flow_network="raft_small")) == ("raft_small", "", {"iterations": 2})
    assert makers.asked_flow(stage_1(), Options()) == ("raft_large", "", {})  # of a config whose flow is exact


def test_dis_finds_a_shift():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8), (96, 96), interpolation=cv2.INTER_CUBIC)
    video = np.stack([scene[16:80, 16 - 2 * k : 80 - 2 * k] for k in range(3)])  # everything moves right by 2
    flow = host_flow.dis("part", {"video": video})["part"]
    assert flow.shape == (2, 64, 64, 2) and flow.dtype == np.float32
    np.testing.assert_allclose(np.median(flow, axis=(0, 1, 2)), [2, 0], atol=0.2)


def test_without_opencv_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    config = stage_1(motion=dict(flow=dict(name="dis")), data=dict(source="demo"))
    with pytest.raises(ImportError, match=r"pip install .*opencv-python-headless"):
        open_told(config)


def test_the_evaluation_prints_what_each_kind_of_features_tells(finished):
    rows = evaluate.motion([finished], clips=4)
    assert [row["features"].split()[0] for row in rows] == ["motion", "PCA", "PCA"]
    assert all(np.isfinite([row["R² of flow"], row["R² of colour"]]).all() and row["width"] == 6 for row in rows)
    assert len((finished / "evaluate_motion.csv").read_text().splitlines()) == 4
    assert len(list((finished / "figures").glob("motion_*.png"))) == 3
    with pytest.raises(ValueError, match="evaluate motion"):
        evaluate.loss([finished])


def test_a_denoising_run_has_the_identity_it_had():
    """Fields that came later, for another task, do not turn an older workdir into another run's."""
    old = base.get_config("demo", align=dict(method="trd", weight=0.5)).to_dict()
    del old["task"], old["motion"], old["teacher"]["motion_head"]
    stage = stage_1(motion=dict(kernel=1, norm=False, unit=1.0)).to_dict()
    for later in ("kernel", "norm", "unit"):
        del stage["motion"][later]
    config_lib.compare(stage, stage_1(motion=dict(kernel=1, norm=False, unit=1.0)))
    new = base.get_config("demo", align=dict(method="trd", weight=0.5))
    config_lib.compare(old, new)  # else a ValueError
    assert config_lib.identity(old) == config_lib.identity(new)
    assert config_lib.identity(stage_1()) != config_lib.identity(stage_1(teacher=dict(size=64)))


def test_the_projection_fits_any_number_of_tokens():
    shapes = jax.eval_shape(
        lambda x: MotionProjection(768, rngs=nnx.Rngs(0))(x), jax.ShapeDtypeStruct((1, 24, 10, 15, 768), jnp.float32)
    )
    assert shapes.shape == (1, 24, 10, 15, 64)
