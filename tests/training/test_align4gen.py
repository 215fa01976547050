"""configs/align4gen.py: each scale and each ablation of the paper is one value, and small copies of them train."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import align4gen
from jaxalign import codecs, teachers
from jaxalign.alignment.methods import AlignmentSettings
from jaxalign.tasks.aligning import Alignment, target
from jaxalign.training import config as config_lib
from jaxalign.training import setup
from jaxalign.training.config import resolve

FUSED = ("dinov2_b", "sam21_hiera_bplus")


@pytest.fixture(scope="module", autouse=True)
def _shapes_once():
    """The same few networks are laid out for every ablation."""
    with pytest.MonkeyPatch.context() as patch:
        for package in (codecs, teachers):
            patch.setattr(package, "abstract", functools.cache(package.abstract))
        yield


@pytest.fixture
def of(monkeypatch):
    """of(point, *overrides): the resolved config of a command line."""

    def read(point, *argv):
        argv = ["main", "--config", f"configs/align4gen.py:{point}", *(f"--config.{a}" for a in argv)]
        monkeypatch.setattr(sys, "argv", argv)
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
        config_lib.parse_flags(argv, values)
        config = values.config
        config.data.source = config.data.source or "somewhere"
        return resolve(config)

    return read


def abstract(config):
    return setup.build(config, num_classes=config.model.num_classes, abstract=True)


def test_the_scales_are_the_papers_runs(of):
    ucf, xl, sky, ffs = (of(scale) for scale in ("ucf101_l", "ucf101_xl", "sky_l", "ffs_l"))
    assert [c.steps for c in (ucf, xl, sky, ffs)] == [1_000_000, 200_000, 200_000, 200_000]
    assert [c.batch_size for c in (ucf, xl, sky, ffs)] == [24, 16, 24, 24]
    assert [c.model.num_classes for c in (ucf, xl, sky, ffs)] == [101, 101, 0, 0]
    assert [c.data.hflip for c in (ucf, xl, sky, ffs)] == [True, True, False, True]
    assert [c.optimizer.grad_clip_from for c in (ucf, xl, sky, ffs)] == [100_000, 100_000, 20_000, 20_000]
    assert [c.align.depth for c in (ucf, xl, sky, ffs)] == [8, 12, 8, 8]
    for config in (ucf, xl, sky, ffs):
        d, o = config.data, config.optimizer
        assert (d.num_frames, d.height, d.width, d.stride, config.codec.name) == (16, 256, 256, 3, "sd_kl")
        assert (o.learning_rate, o.schedule, o.weight_decay, o.grad_clip, config.ema_decay) == (
            *(1e-4, "constant", 0.0, 0.1),
            0.9999,
        )
        assert (config.objective, config.learn_sigma, config.align.weight, config.align.fusion) == (
            *("ddpm", True, 0.5),
            "concat",
        )
        assert (config.sample.steps, config.sample.guidance_scale, config.model.class_dropout) == (50, 1.0, 0.1)
        json.dumps(config_lib.identity(config))


@pytest.mark.parametrize(("scale", "millions"), [("ucf101_l", 456.9), ("ucf101_xl", 673.8)])
def test_sizes_and_grids_of_the_real_runs(of, scale, millions):
    run = abstract(of(scale))
    trainable = jax.eval_shape(run.init, jax.random.key(0))
    model, head = (sum(x.size for x in jax.tree.leaves(trainable[name])) for name in ("model", "heads"))
    assert round(model / 1e6, 1) == millions and 8e6 < head < 9.5e6
    (a,) = run.task.alignments
    assert run.student_grid == a.grid == (16, 16, 16) and a.teachers == FUSED and a.head.teacher_width == 768 + 256
    assert run.task.process.learn_sigma and run.task.class_dropout == 0.1 and run.task.num_classes == 101
    sam = run.frozen["teachers"]["sam21_hiera_bplus"]
    assert sam.grid((16, 256, 256)) == (16, 64, 64), "stride 16 of 1024 pixels, resized to 16 x 16"


@pytest.mark.parametrize(
    ("point", "override", "seen"),
    [
        ("ucf101_xl,teachers=dinov2_b", "", ("dinov2_b",)),
        ("ucf101_xl,teachers=sam21_hiera_bplus", "", ("sam21_hiera_bplus",)),
        ("ucf101_xl,teachers=videomae_v1_b", "", ("videomae_v1_b",)),
        ("ucf101_xl,teachers=vjepa2_l+dinov2_l+efficientnet_lite0", "", ("vjepa2_l", "dinov2_l", "efficientnet_lite0")),
        ("ucf101_xl", "teacher.beside.sam21_hiera_bplus.size=256", FUSED),
        ("ucf101_xl", "align.depth=13", FUSED),
        ("ucf101_xl", "align.weight=0.25", FUSED),
        ("ucf101_xl", "objective=flow", FUSED),
        ("ucf101_xl", "align.fusion=heads", FUSED),
        ("ucf101_xl", "align.weight=0", ()),
    ],
)
def test_an_ablation_is_one_value(of, point, override, seen):
    run = abstract(of(point, *([override] if override else [])))
    alignments = run.task.alignments
    assert tuple(key for a in alignments for key in a.teachers) == seen
    assert all(a.grid == (16, 16, 16) for a in alignments)
    if override == "align.fusion=heads":
        assert [(a.head.teacher_width, float(a.weight(0))) for a in alignments] == [(768, 0.25), (256, 0.25)]
    elif seen:
        assert float(alignments[0].weight(0)) == (0.25 if "weight" in override else 0.5)
        assert alignments[0].depth == (13 if "depth" in override else 12)
    assert run.task.process.learn_sigma == ("flow" not in override)


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("ucf101", "no such scale; write one of demo, ucf101_l, ucf101_xl, sky_l, ffs_l"),
        ("demo,teachers=dinov_b", r"no teacher 'dinov_b'; did you mean 'dinov2_b'"),
        ("demo,teachers=dinov2_b+dinov2_b", "dinov2_b is there twice"),
        ("demo,depth=3", r"'depth=3': after the scale stands teachers=NAME"),
        ("demo,teachers=", "after the scale stands teachers=NAME"),
    ],
)
def test_mistakes_after_the_colon_say_what_to_write(point, said):
    with pytest.raises(ValueError, match=said) as caught:
        align4gen.get_config(point)
    assert "\n" not in str(caught.value)


def test_missing_weights_name_the_field_that_wants_them(of):
    config = of("demo,teachers=efficientnet_lite0+sam21_hiera_bplus")
    with pytest.raises(
        FileNotFoundError, match=r"teacher sam21_hiera_bplus: .*--config.teacher.beside.sam21_hiera_bplus.w"
    ):
        setup.build(config)


def test_tokens_of_two_frames_are_spread_over_both():
    taught = jnp.arange(2.0)[None, :, None, None, None] * jnp.ones((1, 2, 3, 3, 5))
    fields = {"weight": float, "head": None, "name": "a", "method": "align4gen", "depth": 0}
    a = Alignment(grid=(4, 6, 6), teachers=("t",), resize=True, settings=AlignmentSettings(), **fields)
    found = target(a, {"t": taught}, {})
    np.testing.assert_allclose(found[0, :, 0, 0, 0], [0, 0.25, 0.75, 1], err_msg="linear, centres of pairs")
    assert found.shape == (1, 4, 6, 6, 5)


# ---- small copies train


SMALL = (
    *("batch_size=2", "data.num_frames=4", "data.height=32", "data.width=32", "align.depth=1", "align.resize=True"),
    *("teacher.size=64", "teacher.beside.efficientnet_lite0.size=128"),
)


def trained(config, given=(), **tokens):
    """Distances before and after two steps on one batch, from weights drawn by NumPy."""
    run = setup.build(config, given=given)
    assert [a.grid for a in run.task.alignments] == [(4, 8, 8)]
    rng = np.random.default_rng(0)
    draw = lambda x: (0.05 * rng.normal(size=x.shape)).astype(x.dtype)  # noqa: E731
    trainable = jax.tree.map(draw, jax.eval_shape(run.init, jax.random.key(0)))
    batch = {"video": rng.integers(0, 256, (2, 4, 32, 32, 3), np.uint8), "label": np.zeros(2, np.int32), **tokens}
    step = jax.jit(jax.value_and_grad(run.task.loss, has_aux=True))
    distances = []
    for _ in range(3):
        (loss, metrics), grads = step(trainable, run.frozen, batch, jax.random.key(0), 0, {})
        assert np.isfinite(float(loss))
        distances.append(float(metrics["align/align4gen"]))
        trainable = jax.tree.map(lambda p, g: p - 0.1 * np.asarray(g), trainable, grads)
    return distances


def stored():
    """(what batches hold, tokens as precompute stores them): the networks need not be compiled."""
    rng = np.random.default_rng(1)
    shapes = {"teacher/efficientnet_lite0": (2, 4, 8, 8, 40), "teacher/efficientnet_lite0_2": (2, 4, 4, 4, 320)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_small_copy_trains(of):
    tokens = stored()
    distances = trained(of("demo", *SMALL), tuple(tokens), **tokens)
    assert distances[2] < distances[1] < distances[0] < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("override", ["objective=ddpm", "align.fusion=concat"])
def test_small_copies_train_with_the_demos_own_teachers(of, override):
    distances = trained(of("demo", *SMALL, override))
    assert distances[2] < distances[0]


def test_the_demos_two_stages(of):
    stages = abstract(of("demo")).frozen["teachers"].values()
    assert [(t.config.stride, t.width, t.grid((8, 64, 64))) for t in stages] == [
        (8, 40, (8, 16, 16)),
        (32, 320, (8, 8, 8)),
    ]
