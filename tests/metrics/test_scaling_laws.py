"""The fits find the laws that made the points, with noise, outliers and several seeds, and say what they lack."""

import itertools

import numpy as np
import pytest

from jaxalign.metrics import scaling

E, A, B, ALPHA, BETA = 0.3, 0.2, 0.25, 0.4, 0.3
SIZES, STEPS = (10**6, 4 * 10**6, 16 * 10**6, 64 * 10**6), range(1, 7)


def ladder(noise: float, seeds: int = 3) -> list[scaling.Point]:
    """Runs of four sizes evaluated six times, their losses E + A (N/8e6)^-α + B (D/3e8)^-β with noise."""
    rng, points = np.random.default_rng(0), []
    for size in SIZES:
        for seed in range(seeds):
            for tokens in (1e8 * step for step in STEPS):
                loss = E + A * (size / 8e6) ** -ALPHA + B * (tokens / 3e8) ** -BETA
                loss *= np.exp(noise * rng.standard_normal())
                name = f"size={size}"
                points.append(
                    scaling.Point(f"{name},seed={seed}", name, size, 256, tokens, 6 * size * tokens, float(loss))
                )
    return points


def test_compute_law_is_found():
    compute = np.geomspace(1e15, 1e19, 12)
    law = scaling.fit({"C": compute}, 0.2 + 0.5 * (compute / 1e17) ** -0.15)
    assert law.floor == pytest.approx(0.2, rel=1e-4) and law.exponents[0] == pytest.approx(0.15, rel=1e-4)
    assert law(1e17) == pytest.approx(0.7, rel=1e-6) and law.residual < 1e-6
    pure = scaling.fit({"C": compute}, 3.0 * (compute / 1e17) ** -0.05, floor=False)
    assert pure.floor == 0 and pure.exponents[0] == pytest.approx(0.05, rel=1e-5)
    assert scaling.fit({"C": compute}, 3.0 * (compute / 1e17) ** -0.05).floor < 0.2  # no floor is made up


def test_an_outlier_hardly_matters():
    compute = np.geomspace(1, 1e4, 12)
    loss = 0.2 + 0.5 * compute**-0.3
    loss[5] *= 1.3
    law = scaling.fit({"C": compute}, loss)
    assert law.exponents[0] == pytest.approx(0.3, rel=0.1) and law.floor == pytest.approx(0.2, rel=0.1)


def test_size_and_data_law_is_found_within_its_interval():
    points = ladder(0.003)
    front, laws, remarks = scaling.analyse(points, replicates=20)
    assert len(remarks) <= 1 and len(laws) == 3 and len(front) > 5
    numbers = laws[-1].numbers()
    for name, true in (("E", E), ("α", ALPHA), ("β", BETA), ("a (best N ∝ C^a)", BETA / (ALPHA + BETA))):
        value, low, high = numbers[name]
        assert low < true < high and value == pytest.approx(true, rel=0.15), (name, numbers[name])
        assert high - low < true  # an interval that says something
    assert {p.seeds for p in laws[-1].points} == {3}
    without_noise = scaling.fit_size_and_data(scaling.mean_over_seeds(ladder(0.0, 1)))
    assert without_noise.exponents == pytest.approx((ALPHA, BETA), rel=1e-3)


def test_more_noise_gives_wider_intervals():
    widths = []
    for noise in (0.001, 0.02):
        front, laws, _ = scaling.analyse(ladder(noise, 2), replicates=8)
        _, low, high = laws[1].numbers()["α"]
        widths.append(high - low)
        assert all(b.loss < a.loss and b.compute > a.compute for a, b in itertools.pairwise(front))
    assert widths[1] > widths[0] > 0


def test_envelope_is_the_best_at_each_compute():
    def point(compute, loss):
        return scaling.Point("r", "g", 1, 1, 1.0, compute, loss)

    points = [point(1.0, 5.0), point(1.05, 4.9), point(2.0, 6.0), point(4.0, 3.0), point(8.0, 3.0), point(9.0, 2.0)]
    assert [(p.compute, p.loss) for p in scaling.envelope(points)] == [(1.05, 4.9), (4.0, 3.0), (9.0, 2.0)]


def test_too_few_points_are_counted():
    points = [p for p in ladder(0.0, 1) if p.tokens == 6e8][:3]
    front, laws, remarks = scaling.analyse(points)
    assert laws == [] and len(front) == 3 and len(remarks) == 3
    assert "at least 5 points on the lower envelope, there are 3" in remarks[0]
    assert "at least 3 sizes, 3 amounts of data and 7 points, there are 3, 1 and 3" in remarks[2]
    _, laws, remarks = scaling.analyse([p for p in ladder(0.0, 1) if p.parameters == SIZES[0]], replicates=2)
    assert len(laws) == 2 and remarks[0].startswith("6 of the 6 points on the envelope are those of size=1000000")
    with pytest.raises(ValueError, match="a law of 3 numbers needs"):
        scaling.fit_compute(points[:2])
    with pytest.raises(ValueError, match="positive, finite"):
        scaling.fit({"C": np.asarray([1.0, 2.0, 3.0])}, np.asarray([1.0, np.nan, 2.0]))
