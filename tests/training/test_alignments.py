"""What config.align and config.teacher become: several alignments, several teachers, grids that meet or say so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from jaxalign.tasks.aligning import init_gates, update_gates
from jaxalign.training import config as config_lib
from jaxalign.training import setup
from jaxalign.training.config import resolve
from jaxalign.training.state import create_state
from jaxalign.training.step import make_step

SMALL = dict(
    batch_size=2,
    teacher=dict(size=64, stride=8),
    data=dict(num_frames=4, height=32, width=32),
    align=dict(method="tsa", weight=0.5),
)


def build(**changes):
    config = base.get_config("demo", **SMALL)
    config.update(changes)
    return setup.build(resolve(config))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {"video": jnp.asarray(rng.integers(0, 256, (2, 4, 32, 32, 3), np.uint8)), "label": jnp.array([0, 0])}


def perturbed(tree):
    """Every leaf random: adaLN-Zero would hide the blocks."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return treedef.unflatten([x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def test_several_alignments_have_their_own_tap_teacher_and_weight(batch):
    run = build(
        align=dict(
            beside=dict(
                deep=dict(method="repa", depth=6, weight=0.25, teacher=dict(stride=16), projector=dict(conv="none")),
                again=dict(method="trd", depth=2, schedule="linear"),
                off=dict(weight=0.0),
            )
        ),
        teacher=dict(size=128, stride=16),
    )
    deep = run.task.alignments[2]
    assert [a.name for a in run.task.alignments] == ["tsa", "again", "deep"], "the others in alphabetical order"
    assert run.task.taps == (2, 4, 6) and deep.head.teacher_width == 112
    assert list(run.frozen["teachers"]) == ["efficientnet_lite0"], "asked for three times, loaded once"
    trainable = perturbed(run.init(jax.random.key(0)))
    assert set(trainable["heads"]) == {"tsa", "deep", "again"}
    grad = jax.jit(jax.value_and_grad(run.task.loss, has_aux=True))
    (loss, metrics), grads = grad(trainable, run.frozen, batch, jax.random.key(1), 0, {})
    weights = {"tsa": 0.5, "deep": 0.25, "again": 0.5}
    total = metrics["denoising"] + sum(w * metrics[f"align/{name}"] for name, w in weights.items())
    assert float(loss) == pytest.approx(float(total), rel=1e-6)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_two_teachers_are_one_target_or_get_a_head_each(batch):
    # The strides give 8 x 8 and 4 x 4 tokens; the second is resized to the first.
    teacher = dict(beside=dict(semantic=dict(name="efficientnet_lite0", size=64, stride=16)))
    fused = build(align=dict(method="align4gen", resize=True), teacher=teacher)
    (a,) = fused.task.alignments
    assert a.teachers == ("efficientnet_lite0", "efficientnet_lite0_2") and a.head.teacher_width == 40 + 112
    assert a.grid == (4, 8, 8)
    split = build(align=dict(method="align4gen", resize=True, fusion="heads"), teacher=teacher)
    assert [x.name for x in split.task.alignments] == [f"align4gen_{key}" for key in a.teachers]
    assert [x.head.teacher_width for x in split.task.alignments] == [40, 112]
    assert [float(x.weight(0)) for x in split.task.alignments] == [0.25, 0.25]
    for run in (fused, split):
        trainable = perturbed(run.init(jax.random.key(0)))
        _, metrics = jax.jit(run.task.loss)(trainable, run.frozen, batch, jax.random.key(1), 0, {})
        assert all(0 < float(metrics[f"align/{x.name}"]) < 2 for x in run.task.alignments)


def test_layersync_needs_no_teacher(batch):
    run = build(align=dict(method="layersync", depth=2, teacher_depth=6))
    assert run.frozen["teachers"] == {} and run.task.taps == (2, 6)
    trainable = perturbed(run.init(jax.random.key(0)))
    assert trainable["heads"] == {}
    grads, _ = jax.jit(jax.grad(run.task.aligning_loss, has_aux=True))(
        trainable, run.frozen, batch, jax.random.key(1), 0, {}
    )
    # Up to the tap there is a gradient; the target beyond it gets none. Pair i holds blocks 2i and 2i + 1.
    stacks = jax.tree.leaves(grads["model"].blocks)
    assert any(float(jnp.abs(g[0]).max()) > 0 for g in stacks)
    assert all(float(jnp.abs(g[2:]).max()) == 0 for g in stacks)
    with pytest.raises(ValueError, match=r"write --config.align.teacher_depth=N with N > align.depth = 4"):
        build(align=dict(method="layersync"))


def test_a_similarity_shuts_the_weight_off_and_is_part_of_the_state(batch):
    run = build(align=dict(method="repa", schedule="similarity", cutoff=dict(threshold=-1.0, decay=0.5)))
    alignments = run.task.alignments
    optimizer = optax.sgd(0.0)
    state = create_state(run.init(jax.random.key(0)), optimizer, init_gates(alignments))
    assert set(state.gates) == {"repa"}
    step = jax.jit(
        make_step(
            run.task.loss,
            optimizer,
            ema_decay=0.9,
            update_gates=lambda gates, metrics: update_gates(alignments, gates, metrics),
        )
    )
    weights = []
    for _ in range(2):
        state, metrics = step(state, run.frozen, batch, jax.random.key(0))
        weights.append(float(metrics["align/repa_weight"]))
    assert weights == [0.5, 0.0] and float(metrics["loss"]) == float(metrics["denoising"])
    with pytest.raises(ValueError, match="'similarity' wants a method whose loss is a cosine; trd compares relations"):
        build(align=dict(method="trd", schedule="similarity"))


def test_full_resolution_asks_the_teacher_for_more_pixels():
    run = build(align=dict(grid="student"), teacher=dict(size=None, stride=16))
    (a,) = run.task.alignments
    assert a.grid == (4, 8, 8) and run.frozen["teachers"]["efficientnet_lite0"].config.size == (128, 128)
    with pytest.raises(ValueError, match=r"write --config.teacher.size=None \(and --config.align.projector.conv=same"):
        build(align=dict(grid="student"))


def test_what_cannot_meet_says_so():
    with pytest.raises(
        ValueError, match=r"student's grid \(4, 8, 8\) into \(4, 8, 8\), but the teacher's is \(4, 4, 4"
    ):
        build(teacher=dict(stride=16))
    with pytest.raises(ValueError, match=r"pool_time = 2: efficientnet_lite0 gives 4 frames, not 1 \+ a multiple"):
        build(align=dict(pool_time=2))
    with pytest.raises(ValueError, match=r"config.align.beside.x.dept: no such field; did you mean 'depth'"):
        build(align=dict(beside=dict(x=dict(dept=1))))
    with pytest.raises(ValueError, match=r"config.align.beside.x.method = 'tas': write one of"):
        build(align=dict(beside=dict(x=dict(method="tas"))))
    with pytest.raises(ValueError, match="the name is taken"):
        build(align=dict(beside=dict(tsa=dict(depth=1))))
    with pytest.raises(ValueError, match=r"config.align.teacher_depth = 8: the student has blocks 0..7"):
        build(align=dict(method="layersync", teacher_depth=8))
    with pytest.raises(ValueError, match="no setting 'drop_first'; it has size, stride, frames_at_once"):
        build(teacher=dict(drop_first=True))


def test_weight_zero_switches_everything_off():
    config = base.get_config("demo", align=dict(method="tsa", weight=0.0, beside=dict(x=dict(weight=1.0))))
    config = resolve(config)
    assert config.align.method == "none" and not config.align.beside
    assert not config_lib.spans_the_run(base.get_config("demo", optimizer=dict(schedule="constant")))
