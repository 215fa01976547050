"""The block-by-block relation losses against their definitions: values, gradients, cost, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.alignment import definitions, relations, sweep
from jaxalign.alignment.tokens import check_queries, frame_weights, normalize
from jaxalign.training.flops import matmul_flops


def draw(b, t, n, d, width=None, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], (b, t, n, d)), jax.random.normal(keys[1], (b, t, n, width or d))


def evaluate(function, student, teacher, **settings):
    """Values [b] and the gradients for both sides, under a cotangent that differs from sample to sample."""
    cotangent = jnp.arange(1.0, len(student) + 1)

    @jax.jit
    def run(student, teacher):
        values, vjp = jax.vjp(lambda s, r: function(s, r, **settings), student, teacher)
        return values, *vjp(cotangent)

    return run(student, teacher)


def assert_equal_to_definition(name, student, teacher, tolerance=1e-5, **settings):
    """Both relative to the largest entry; the definition sees the same numbers in fp32."""
    values, grad, teacher_grad = evaluate(getattr(relations, name), student, teacher, **settings)
    student, teacher = (x.astype(jnp.float32) for x in (student, teacher))
    wanted, wanted_grad, _ = evaluate(getattr(definitions, name), student, teacher, **settings)
    assert values.shape == (len(student),) and values.dtype == jnp.float32
    assert np.abs(wanted).min() > 0 and np.abs(wanted_grad).max() > 0
    np.testing.assert_allclose(values, wanted, rtol=tolerance)
    np.testing.assert_allclose(grad.astype(jnp.float32), wanted_grad, atol=tolerance * np.abs(wanted_grad).max())
    assert not np.any(teacher_grad)


def small_blocks(monkeypatch, entries):
    for backend in ("cpu", "gpu", "tpu"):
        monkeypatch.setitem(sweep.BLOCK, backend, entries)


CASES = {
    "trd": ("relation_l1", {"margin": 0.1}),
    "trd_spatial": ("relation_l1", {"margin": 0.1, "frame_weights": "spatial"}),
    "trd_temporal": ("relation_l1", {"margin": 0.1, "frame_weights": "temporal"}),
    "moalign": ("relation_l1", {"frame_weights": "moalign"}),
    "tsa": ("tempered_kl", {"temperature": 0.1}),
    "tsa_sharp": ("tempered_kl", {"temperature": 0.02}),  # here the exponentials need the true maximum
    "m_tsa": ("tempered_kl", {"temperature": 0.1, "queries": 3}),
    "repa": ("cosine_distance", {}),
}


@pytest.mark.parametrize(
    "case, dtype",
    [(case, "float32") for case in CASES] + [(case, "bfloat16") for case in ("trd", "tsa", "m_tsa", "repa")],
)
def test_equals_definition(case, dtype, monkeypatch):
    """13 frames and 7 positions are both prime; the blocks are small enough for many of them."""
    name, settings = CASES[case]
    student, teacher = draw(2, 13, 7, 16, width=None if name == "cosine_distance" else 12)
    if settings.get("frame_weights"):
        settings = settings | {"frame_weights": frame_weights(settings["frame_weights"], 13)}
    if settings.get("queries"):
        queries = jax.random.randint(jax.random.key(5), (2, 13, settings["queries"]), 0, 7)  # with repetitions
        settings = settings | {"queries": queries}
    small_blocks(monkeypatch, 300)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert_equal_to_definition(name, student.astype(dtype), teacher.astype(dtype), tolerance, **settings)


@pytest.mark.parametrize("case, group", [("trd", 1), ("tsa", 2), ("trd", 3), ("tsa", 6)])
def test_every_grouping_of_frames(case, group, monkeypatch):
    """Tiles of 1, 2, 3 or all of 6 frames; in the first case the samples go one by one, too."""
    monkeypatch.setitem(sweep.OVERHEAD, jax.default_backend(), 10**6)  # the larger the tile, the better
    small_blocks(monkeypatch, 1 if group == 1 else 3 * (group * 5) ** 2)
    assert sweep.choose_group(np.ones((6, 6), bool), n=5, b=3, parts=1) == group
    relations._loss.clear_cache()
    name, settings = CASES[case]
    assert_equal_to_definition(name, *draw(3, 6, 5, 8), **settings)


@pytest.mark.parametrize("name, settings", [CASES["moalign"], CASES["tsa"]])
def test_frames_too_large_for_a_block_are_cut_into_rows(name, settings, monkeypatch):
    monkeypatch.setattr(sweep, "LARGEST_BLOCK", 10)
    if "frame_weights" in settings:
        settings = settings | {"frame_weights": frame_weights("moalign", 3)}
    student, teacher = draw(2, 3, 37, 8)  # 111 rows in chunks of at most 64: one row of filling
    assert_equal_to_definition(name, student, teacher, **settings)


@pytest.mark.parametrize("name, settings", [CASES["trd"], CASES["tsa"], CASES["m_tsa"]])
def test_one_frame(name, settings):
    if "queries" in settings:
        settings = settings | {"queries": jnp.array([[[4, 4, 0]], [[1, 2, 3]]])}
    assert_equal_to_definition(name, *draw(2, 1, 11, 8), **settings)


@pytest.mark.parametrize("name, settings", [CASES["trd"], CASES["tsa"], CASES["tsa_sharp"], CASES["repa"]])
def test_zero_tokens_and_equal_tokens(name, settings):
    """Zeros get a zero gradient, and where all tokens are one the gradient is finite; NaN nowhere."""
    student, teacher = draw(4, 3, 5, 6)
    student = student.at[0].set(0).at[1, 0, 2].set(0).at[2].set(student[2, 0, 0])
    teacher = teacher.at[1, 2, 3].set(0).at[3].set(teacher[3, 0, 0])
    values, grad, _ = evaluate(getattr(relations, name), student, teacher, **settings)
    wanted, wanted_grad, _ = evaluate(getattr(definitions, name), student, teacher, **settings)
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(grad))
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grad, wanted_grad, atol=1e-5 * np.abs(wanted_grad).max())
    assert not np.any(grad[0]) and not np.any(grad[1, 0, 2]) and np.any(grad[1]) and np.any(grad[3])


def test_student_equal_to_teacher_costs_nothing():
    student, _ = draw(2, 4, 6, 8)
    for name in ("trd", "tsa", "repa"):
        function, settings = CASES[name]
        values, grad, _ = evaluate(getattr(relations, function), student, student, **settings)
        np.testing.assert_allclose(values, 0, atol=1e-6)
        np.testing.assert_allclose(grad, 0, atol=1e-6)


# The papers' formulas, in plain NumPy.


def similarities(tokens):
    unit = np.asarray(normalize(tokens), np.float64)[0].reshape(-1, tokens.shape[-1])
    return unit @ unit.T


def test_trd_is_videorepas_mean_over_pairs():
    """One mean over all N² pairs; spatial only and temporal only are means over the masked pairs (§2)."""
    t, n = 4, 5
    student, teacher = draw(1, t, n, 8, width=3)
    cost = np.maximum(np.abs(similarities(student) - similarities(teacher)) - 0.1, 0)
    same_frame = np.kron(np.eye(t, dtype=bool), np.ones((n, n), bool))
    for part, mask in (("full", np.ones_like(same_frame)), ("spatial", same_frame), ("temporal", ~same_frame)):
        weights = frame_weights(part, t)
        value = relations.relation_l1(student, teacher, frame_weights=weights, margin=0.1)
        np.testing.assert_allclose(value[0], cost[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(relations.relation_l1(student, teacher, margin=0.1)[0], cost.mean(), rtol=1e-5)


def test_moalign_is_its_formula():
    """(1/t) Σ_f mean|ΔA(f, f)| + mean(W ⊙ |ΔA|), W = exp(−|f_i − f_j|/τ) between frames, 0 inside (§4)."""
    t, n, tau = 5, 3, 10.0
    student, teacher = draw(1, t, n, 8)
    cost = np.abs(similarities(student) - similarities(teacher))
    spatial = np.mean([cost[f * n : f * n + n, f * n : f * n + n].mean() for f in range(t)])
    frame = np.repeat(np.arange(t), n)
    distance = np.abs(frame[:, None] - frame[None])
    soft = np.where(distance > 0, np.exp(-distance / tau), 0)
    value = relations.relation_l1(student, teacher, frame_weights=frame_weights("moalign", t, tau))
    np.testing.assert_allclose(value[0], spatial + (soft * cost).mean(), rtol=1e-5)


def test_tsa_gradient_is_the_difference_of_the_distributions():
    """dL/dR = (P_student − P_teacher)/(τ N t), TSA's eq. (10), followed through R = x̂ x̂ᵀ and the norm."""
    t, n, tau = 3, 4, 0.1
    student, teacher = draw(1, t, n, 8)

    def distributions(tokens):
        e = np.exp(similarities(tokens).reshape(t * n, t, n) / tau)
        return (e / e.sum(-1, keepdims=True)).reshape(t * n, t * n)

    slope = (distributions(student) - distributions(teacher)) / (tau * t * n * t)
    x = np.asarray(student, np.float64).reshape(t * n, -1)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / norm
    wanted = (slope + slope.T) @ unit
    wanted = (wanted - unit * (unit * wanted).sum(-1, keepdims=True)) / norm
    grad = jax.grad(lambda s: relations.tempered_kl(s, teacher, temperature=tau).sum())(student)
    np.testing.assert_allclose(grad.reshape(t * n, -1), wanted, atol=1e-5 * np.abs(wanted).max())


def test_weights_may_be_skew_or_traced_and_temporal_of_one_frame_is_zero():
    student, teacher = draw(2, 4, 5, 8)
    weights = np.random.default_rng(0).random((4, 4)).astype(np.float32) - 0.3
    assert_equal_to_definition("relation_l1", student, teacher, frame_weights=weights)
    static = relations.relation_l1(student, teacher, frame_weights=weights)
    traced = jax.jit(lambda w: relations.relation_l1(student, teacher, frame_weights=w))(jnp.asarray(weights))
    np.testing.assert_allclose(static, traced, rtol=1e-6)
    one = relations.relation_l1(student[:, :1], teacher[:, :1], frame_weights=frame_weights("temporal", 1), margin=0.1)
    assert not np.any(one)


# What it costs.


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


@pytest.mark.parametrize("case", ["trd", "tsa", "m_tsa"])
def test_no_array_of_all_pairs_and_4_n_squared_d_flops(case, monkeypatch):
    name, settings = CASES[case]
    b, t, n, d = 1, 24, 30, 16
    student, teacher = draw(b, t, n, d)
    if case == "m_tsa":
        settings = settings | {"queries": jnp.zeros((b, t, 6), jnp.int32)}
    small_blocks(monkeypatch, (2 * n) ** 2)
    relations._loss.clear_cache()

    def value(student):
        return getattr(relations, name)(student, teacher, **settings)

    def step(student):
        return jax.value_and_grad(lambda s: value(s).sum())(student)

    largest = max(np.prod(shape, dtype=int) for shape in shapes_in(jax.make_jaxpr(step)(student).jaxpr))
    assert largest <= max(t * n * d, (2 * n) ** 2)
    unit = 2 * (t * n) ** 2 * d
    if case == "m_tsa":  # 6 of 30 positions are rows: forward two products, backward two
        assert matmul_flops(value, student) == 2 * unit * 6 // 30
        assert matmul_flops(step, student) == 4 * unit * 6 // 30
    else:  # 12 tiles: 66 pairs of them and the diagonal
        assert matmul_flops(value, student) == 2 * unit * (66 + 12) / 144
        assert matmul_flops(step, student) == unit * (4 * 66 + 3 * 12) / 144 < 1.05 * 2 * unit


def test_pairs_of_weight_zero_are_not_visited(monkeypatch):
    student, teacher = draw(1, 8, 6, 4)
    small_blocks(monkeypatch, 36)
    relations._loss.clear_cache()
    spatial = functools.partial(relations.relation_l1, frame_weights=frame_weights("spatial", 8))
    assert matmul_flops(spatial, student, teacher) == 8 * 2 * (2 * 6 * 6 * 4)


def test_under_jit_remat_scan_and_vmap():
    student, teacher = draw(2, 3, 6, 8)
    loss = functools.partial(relations.tempered_kl, temperature=0.1)
    grad = jax.grad(lambda s: loss(s, teacher).sum())(student)
    remat = jax.jit(jax.grad(lambda s: jax.checkpoint(loss)(s, teacher).sum()))(student)
    np.testing.assert_allclose(remat, grad, rtol=1e-5, atol=1e-7)

    def single(s, r):
        return loss(s[None], r[None])[0]

    vmapped = jax.vmap(jax.grad(single))(student, teacher)
    np.testing.assert_allclose(vmapped, grad, rtol=1e-5, atol=1e-7)
    _, scanned = jax.lax.scan(lambda c, x: (c, jax.grad(single)(*x)), 0, (student, teacher))
    np.testing.assert_allclose(scanned, grad, rtol=1e-5, atol=1e-7)


def test_calls_outside_jit_compile_once():
    student, teacher = draw(1, 2, 9, 4)
    relations._loss.clear_cache()
    for _ in range(2):
        relations.tempered_kl(student, teacher, temperature=0.1)
        relations.relation_l1(student, teacher, frame_weights=frame_weights("moalign", 2))
    assert relations._loss._cache_size() == 2


# Bad input.


def test_bad_input_is_named():
    student, teacher = draw(2, 3, 4, 8)
    kl = functools.partial(relations.tempered_kl, temperature=0.1)
    for function in (relations.cosine_distance, relations.relation_l1, kl):
        with pytest.raises(ValueError, match=r"student grid \(t, n\) = \(3, 4\), teacher grid \(3, 3\)"):
            function(student, teacher[:, :, :3])
        with pytest.raises(ValueError, match="student batch of 2, a teacher batch of 1"):
            function(student, teacher[:1])
        with pytest.raises(ValueError, match="cast the tokens"):
            function(student.astype(jnp.float16), teacher)
        with pytest.raises(ValueError, match="no tokens"):
            function(student[:, :0], teacher[:, :0])
    with pytest.raises(ValueError, match="student width 8, teacher width 7"):
        relations.cosine_distance(student, teacher[..., :7])
    for temperature in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            relations.tempered_kl(student, teacher, temperature=temperature)
    with pytest.raises(ValueError, match=r"expected \[t, t\]"):
        relations.relation_l1(student, teacher, frame_weights=np.ones((2, 3)))
    with pytest.raises(ValueError, match="no kind 'all'"):
        frame_weights("all", 3)
    with pytest.raises(ValueError, match="tau = 0"):
        frame_weights("moalign", 3, 0.0)


def test_bad_queries_are_named_and_clamped_under_jit():
    student, teacher = draw(2, 3, 4, 8)
    kl = functools.partial(relations.tempered_kl, temperature=0.1)
    queries = jnp.array([[[0, 4]] * 3] * 2)
    with pytest.raises(ValueError, match=r"queries span 0\.\.4, but a frame has the positions 0\.\.3"):
        kl(student, teacher, queries=queries)
    with pytest.raises(ValueError, match=r"queries span -1\.\.3"):
        kl(student, teacher, queries=queries - 1)
    with pytest.raises(ValueError, match="expected integer positions"):
        check_queries(queries.astype(bool), student)
    with pytest.raises(ValueError, match=r"expected \[b, t, k\] = \[2, 3, k >= 1\]"):
        kl(student, teacher, queries=queries[:, :2])
    clamped = jax.jit(lambda q: kl(student, teacher, queries=q))(queries)
    np.testing.assert_allclose(clamped, kl(student, teacher, queries=queries.clip(0, 3)), rtol=1e-6)
