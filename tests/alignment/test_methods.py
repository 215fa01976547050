"""The named losses call the right function, and the weight's schedules have the right shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.alignment import definitions, methods, relations
from jaxalign.alignment.methods import AlignmentSettings, alignment_loss, similarity_cutoff, weight_schedule
from jaxalign.alignment.saliency import motion_saliency, select_queries
from jaxalign.alignment.tokens import frame_weights, normalize
from jaxalign.benchmarks import relations as benchmark


def draw(width=8):
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher = (jax.random.normal(key, (2, 4, 2, 3, width)) for key in keys[:2])
    return student, teacher, jax.random.uniform(keys[2], (2, 8, 8, 12, 3), minval=-1)


def flat(tokens):
    return tokens.reshape(*tokens.shape[:2], -1, tokens.shape[-1])


def test_methods_are_their_definitions():
    student, teacher, video = draw()
    s, r = flat(student), flat(teacher)
    settings = AlignmentSettings(temperature=0.2, mask_ratio=0.5, margin=0.05, part="temporal", tau=3.0)
    queries = select_queries(motion_saliency(video, (4, 2, 3)), 0.5)
    temporal, soft = frame_weights("temporal", 4), frame_weights("moalign", 4, 3.0)
    wanted = {
        "repa": definitions.cosine_distance(s, r),
        "layersync": definitions.cosine_distance(s, r),
        "align4gen": definitions.cosine_distance(s, r),
        "trd": definitions.relation_l1(s, r, frame_weights=temporal, margin=0.05),
        "moalign": definitions.relation_l1(s, r, frame_weights=soft),
        "tsa": definitions.tempered_kl(s, r, temperature=0.2),
        "m_tsa": definitions.tempered_kl(s, r, temperature=0.2, queries=queries),
    }
    assert set(wanted) | {"crepa", "irepa"} == set(methods.METHODS)
    for method, values in wanted.items():
        found = alignment_loss(method, student, teacher, video=video, settings=settings)
        np.testing.assert_allclose(found, values, rtol=1e-5)
    # The papers' values by default, and no gradient for the teacher.
    np.testing.assert_allclose(
        alignment_loss("trd", student, teacher), definitions.relation_l1(s, r, margin=0.1), rtol=1e-5
    )
    for method in ("irepa", "tsa"):
        grad = jax.grad(lambda r, m=method: alignment_loss(m, student, r, video=video).sum())(teacher)
        assert not np.any(grad)


def test_crepa_is_a_sum_over_neighbour_frames():
    student, teacher, _ = draw()
    for wrong in (dict(neighbour=0), dict(neighbour=-1), dict(neighbour_tau=0.0)):
        with pytest.raises(ValueError, match=r"crepa: align\.neighbour = .* and align\.neighbour_tau = "):
            alignment_loss("crepa", student, teacher, settings=AlignmentSettings(**wrong))
    s, r = np.asarray(normalize(flat(student))), np.asarray(normalize(flat(teacher)))
    for d, tau in ((1, 1.0), (2, 0.5)):
        wanted = np.zeros(2)
        for f in range(4):
            for k in (f, f - d, f + d):
                if 0 <= k < 4:
                    distance = 1 - (r[:, k] * s[:, f]).sum(-1).mean(-1)
                    wanted += np.exp(-abs(k - f) / tau) * distance / 4
        settings = AlignmentSettings(neighbour=d, neighbour_tau=tau)
        np.testing.assert_allclose(alignment_loss("crepa", student, teacher, settings=settings), wanted, rtol=1e-5)
    one = alignment_loss("crepa", student[:, :1], teacher[:, :1])
    np.testing.assert_allclose(one, alignment_loss("repa", student[:, :1], teacher[:, :1]), rtol=1e-6)


def test_irepa_normalises_the_teachers_channels():
    student, teacher, _ = draw()
    r = np.asarray(flat(teacher))
    r = (r - 0.6 * r.mean(axis=2, keepdims=True)) / (r.std(axis=2, keepdims=True) + 1e-6)
    wanted = definitions.cosine_distance(flat(student), jnp.asarray(r))
    np.testing.assert_allclose(alignment_loss("irepa", student, teacher), wanted, rtol=1e-5)


def test_fused_target_weighs_teachers_alike():
    student, teacher, _ = draw(5)
    fused = methods.fuse_targets([student, 100 * teacher])
    assert fused.shape == (2, 4, 2, 3, 10)
    np.testing.assert_allclose(jnp.linalg.norm(fused, axis=-1), 2**0.5, rtol=1e-5)
    np.testing.assert_allclose(fused[..., 5:], normalize(teacher), rtol=1e-5)
    with pytest.raises(ValueError, match="different grids"):
        methods.fuse_targets([student, teacher[:, :2]])


def test_schedules():
    def weights(*args, **kwargs):
        schedule = jax.jit(weight_schedule(*args, weight=0.5, **kwargs))
        return [float(schedule(step)) for step in (0, 1, 4, 6, 8, 20)]

    assert weights("constant") == [0.5] * 6
    np.testing.assert_allclose(weights("constant", warmup=3), [0.125, 0.25, 0.5, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(weights("linear", steps=8), [0.5, 0.4375, 0.25, 0.125, 0, 0])
    cosine = [0.25 + 0.25 * np.cos(np.pi * min(step, 8) / 8) for step in (0, 1, 4, 6, 8, 20)]
    np.testing.assert_allclose(weights("cosine", steps=8), cosine, atol=1e-7)
    assert weights("cutoff", cutoff=6) == [0.5, 0.5, 0.5, 0, 0, 0]
    np.testing.assert_allclose(weights("linear", steps=8, warmup=4)[2:], [0.5, 0.25, 0, 0])
    for kind, match in (("step", "no kind 'step'"), ("cosine", "steps = 0"), ("cutoff", "cutoff = 0")):
        with pytest.raises(ValueError, match=match):
            weight_schedule(kind, weight=0.5)


@pytest.mark.parametrize("permanent, wanted", [(True, [1, 1, 0, 0, 0, 0]), (False, [1, 1, 0, 1, 1, 0])])
def test_cutoff_by_similarity(permanent, wanted):
    state, factors = methods.cutoff_start(), []
    cutoff = methods.Cutoff(threshold=0.6, decay=0.5, permanent=permanent)
    for similarity in (0.4, 0.7, 1.0, 0.0, 0.2, 1.0):  # running means .2, .45, .725, .363, .281, .64
        state, factor = similarity_cutoff(state, jnp.float32(similarity), cutoff)
        factors.append(float(factor))
    assert factors == wanted


def test_bad_input_is_named():
    student, teacher, _ = draw()
    with pytest.raises(ValueError, match="no method 'tas'; there are repa, irepa"):
        alignment_loss("tas", student, teacher)
    with pytest.raises(ValueError, match=r"student tokens \(2, 4, 2, 3, 8\), teacher tokens \(2, 4, 2, 2, 8\)"):
        alignment_loss("tsa", student, teacher[:, :, :, :2])
    with pytest.raises(ValueError, match="give it video="):
        alignment_loss("m_tsa", student, teacher)


def test_benchmark_times_the_same_mathematics():
    torch = pytest.importorskip("torch")
    student, teacher, _ = draw()
    inputs = flat(student), flat(teacher), jnp.zeros((2, 4, 1), jnp.int32)
    both = [torch.from_numpy(np.array(x)) for x in inputs[:2]]
    for name, loss in benchmark.torch_losses(torch).items():
        values = benchmark.losses(definitions)[name](*inputs)
        np.testing.assert_allclose(loss(*both), values.mean(), rtol=1e-5)
    seconds, memory, flops = benchmark.time_jax(benchmark.losses(relations)["M-TSA"], inputs, 1, 1)
    assert seconds > 0 and memory > 0 and flops == 2 * 8 * (4 * 1) * (4 * 6) * 8
