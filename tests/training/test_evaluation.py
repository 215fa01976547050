"""What is measured on held-out clips: every clip counts once, and runs are asked alike or not at all."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import base, tsa
from jaxalign.training import motion_report, probe, setup
from jaxalign.training.config import resolve
from jaxalign.training.data_settings import counted, held_out_size, split_batch
from jaxalign.training.evaluation import held_out_losses
from jaxalign.training.mesh import AXES, batch_sharding, make_mesh
from jaxalign.training.trained import Trained

CLIPS = 5


@pytest.fixture
def clips():
    """Clip number k is k all over."""
    video = np.arange(CLIPS, dtype=np.uint8)[:, None, None, None, None] * np.ones((4, 8, 8, 3), np.uint8)
    return {"video": video, "label": np.zeros(CLIPS, np.int32)}


@pytest.mark.parametrize(
    ("data", "fsdp", "batch_size", "grad_accum", "clips", "size"),
    [
        (8, 8, 256, 1, 8, 64),  # as few as the mesh takes, not the whole batch
        (1, 1, 32, 1, 8, 8),
        (1, 1, 32, 16, 8, 2),  # never more than a step holds at once
        (1, 2, 6, 1, 8, 4),  # two batches of 4, not of 6
        (2, 2, 8, 2, 5, 4),
        (2, 1, 4, 1, 5, 4),
    ],
)
def test_held_out_clips_fill_no_larger_a_batch_than_they_need(data, fsdp, batch_size, grad_accum, clips, size):
    config = base.get_config(batch_size=batch_size, optimizer=dict(grad_accum=grad_accum))
    assert held_out_size(config, AbstractMesh((data, fsdp, 1, 1), AXES), clips) == size


def test_held_out_rows_lie_on_the_mesh_as_a_batch_and_say_the_same(clips):
    config = base.get_config(data=dict(source="synthetic", num_frames=4, height=8, width=8))
    run, mesh = setup.build(resolve(config), abstract=True), make_mesh(devices=jax.devices()[:1])

    def noisy(trainable, frozen, batch, noise, fractions):
        placed.append([x.sharding == batch_sharding(mesh) for x in (*batch.values(), noise)])
        return {"denoising": noise.mean((1, 2, 3, 4))[None] + batch["video"].mean((1, 2, 3, 4))}

    placed, parts = [], split_batch(clips, 3)
    losses = [held_out_losses(run, {}, parts, times=1, compiled=noisy, mesh=where) for where in (None, mesh)]
    assert placed == [[False] * 3] * 2 + [[True] * 3] * 2
    np.testing.assert_array_equal(*(found["denoising"] for found in losses))


@pytest.mark.parametrize("size", [3, 7])
def test_a_clip_counts_once_however_batches_are_filled(clips, size):
    parts = split_batch(clips, size)
    assert {len(part["video"]) for part in parts} == {size}
    assert sum(counted(part) for part in parts) == CLIPS and counted(clips) == CLIPS
    config = base.get_config(data=dict(source="synthetic", num_frames=4, height=8, width=8))
    run = setup.build(resolve(config), abstract=True)

    def brightness(trainable, frozen, batch, noise, fractions):
        assert noise.shape[0] == size and set(batch) == {"video", "label"}
        return {"denoising": np.tile(np.asarray(batch["video"], np.float32).mean((1, 2, 3, 4)), (3, 1))}

    losses = held_out_losses(run, {}, parts, times=3, compiled=brightness)
    np.testing.assert_array_equal(losses["denoising"], np.full(3, 2.0))  # of 0, 1, 2, 3, 4


def test_probes_of_motion_see_a_clip_once(clips):
    of_patch = lambda batch: batch["video"].astype(jnp.float32).mean((2, 3), keepdims=True)  # noqa: E731
    task = SimpleNamespace(
        tokens=lambda frozen, batch: of_patch(batch),
        predict=lambda model, frozen, batch: (of_patch(batch), None, of_patch(batch)[..., :2]),
    )
    run = SimpleNamespace(
        task=task, student_grid=(4, 1, 1), model_config=SimpleNamespace(kernel=1), frozen={}, init=None
    )
    found = motion_report.collect(Trained(None, run, {"model": {}}), split_batch(clips, 3))
    assert found["tokens"].shape == (CLIPS * 4, 3) and found["flow"].shape == (CLIPS * 4, 2)
    np.testing.assert_array_equal(found["motion"][::4, 0], np.arange(CLIPS))


def _changed(**changes):
    config = tsa.get_config()
    config.update(changes)
    return resolve(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(data=dict(source="synthetic")), r"data.source: 'synthetic', not 'demo'"),
        (dict(data=dict(stride=3)), r"data.stride: 3, not 2"),
        (dict(data=dict(split=2)), r"data.split: 2, not 'the default'"),
        (dict(objective="ddpm"), r"objective: 'ddpm', not 'flow'"),
        (dict(codec=dict(name="sd_kl")), r"codec.name: 'sd_kl', not 'pixels'"),
        (dict(model=dict(num_classes=3)), r"model.num_classes: 3, not 0"),
    ],
)
def test_a_run_of_other_clips_or_another_process_is_not_probed(changes, said):
    with pytest.raises(ValueError, match=rf"probe: b cannot be asked what a is asked \({said}\): leave one out"):
        probe.check_alike("b", _changed(**changes), "a", _changed())


def test_the_same_videos_by_another_name_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "clips")
    monkeypatch.setattr(probe.precomputed, "is_precomputed", lambda path: path == "stored")
    monkeypatch.setattr(
        probe.precomputed,
        "open_folder",
        lambda path: SimpleNamespace(clips=SimpleNamespace(about={"source": f"folder:{tmp_path / 'link'}"})),
    )
    base = _changed(data=dict(source=str(tmp_path / "clips")))
    for name in (str(tmp_path / "link"), "stored"):
        probe.check_alike("b", _changed(data=dict(source=name), codec=dict(tiling=True)), "a", base)


def test_students_of_other_widths_and_grids_are_not_probed():
    run, other = (
        setup.build(_changed(align=dict(weight=0.0), model=dict(patch_size=size)), abstract=True) for size in (4, 8)
    )
    probe.check_fits("b", run, "a", run)
    with pytest.raises(ValueError, match=r"b cannot be asked .*tokens 8 × 8 × 8 of width 128, not 8 × 16 × 16 of"):
        probe.check_fits("b", other, "a", run)


def test_what_is_not_read_does_not_keep_runs_apart():
    same = dict(learn_sigma=False, snr_shift=3.0, seed=4, steps=7, optimizer=dict(learning_rate=1.0))
    probe.check_alike("b", _changed(**same, align=dict(weight=0.0)), "a", _changed())
    base = _changed(objective="ddpm")
    with pytest.raises(ValueError, match=r"learn_sigma: False, not True"):
        probe.check_alike("b", _changed(objective="ddpm", learn_sigma=False), "a", base)


def test_an_own_head_answers_only_the_question_that_it_was_trained_for():
    asked = _changed()
    assert probe.asks_alike(_changed(align=dict(weight=0.3, schedule="linear", warmup_steps=3), seed=2), asked)
    for changes in (
        dict(align=dict(depth=2)),
        dict(align=dict(temperature=0.2)),
        dict(align=dict(projector=dict(drop_first=True))),
        dict(teacher=dict(stride=8)),
        dict(align=dict(weight=0.0)),
    ):
        assert not probe.asks_alike(_changed(**changes), asked), changes
