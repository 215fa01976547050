"""The spectrum and its gap: equal to the Fourier sum written out, and right about waves of known frequency."""

import numpy as np
import pytest

from jaxalign.metrics import spectrum


def written_out(tokens, epsilon):
    """Eq. 8, 9, 11 and 12 by their sums, on a square grid."""
    t, h, w, d = tokens.shape
    frequencies = np.arange(-(h // 2), h - h // 2)
    wave = np.exp(-2j * np.pi * np.outer(frequencies, np.arange(h)) / h)
    magnitude = np.zeros((h, w))
    for frame in tokens.astype(np.float64):
        for channel in range(d):
            magnitude += np.log(np.abs(wave @ frame[..., channel] @ wave.T) + epsilon) / (t * d)
    high = [magnitude[i, j] for i in range(h) for j in range(w)
            if np.sqrt(frequencies[i] ** 2 + frequencies[j] ** 2) > 0.75 * h / 2]  # fmt: skip
    return magnitude, np.mean(high) - magnitude[h // 2, h // 2]


@pytest.mark.parametrize("side", [8, 7])
def test_equals_the_definition(side):
    tokens = (np.random.default_rng(side).normal(size=(2, side, side, 3)) + 0.7).astype(np.float32)
    magnitude, gap = written_out(tokens, 1e-3)
    found = spectrum.log_spectrum(tokens, epsilon=1e-3)
    np.testing.assert_allclose(found, magnitude, atol=1e-9)
    assert spectrum.frequency_gap(found) == pytest.approx(gap, abs=1e-9)
    assert abs(gap) > 0.1


def test_a_wave_stands_at_its_frequency():
    x = np.arange(16)
    wave = np.cos(2 * np.pi * 3 * x / 16)[None, :, None, None] * np.ones((2, 1, 16, 4))  # along the rows' axis
    found = spectrum.log_spectrum(wave.astype(np.float32))
    assert {tuple(place) for place in np.argwhere(found > 0)} == {(8 - 3, 8), (8 + 3, 8)}


def test_fine_detail_raises_the_gap():
    rng = np.random.default_rng(0)
    smooth, noise = np.ones((1, 16, 16, 8)), rng.normal(size=(1, 16, 16, 8))
    gaps = [
        spectrum.frequency_gap(spectrum.log_spectrum((smooth + part * noise).astype(np.float32)))
        for part in (0.01, 0.1, 1.0)
    ]
    assert gaps[0] < gaps[1] < gaps[2] < 0
    assert gaps[1] - gaps[0] == pytest.approx(np.log(10), abs=0.1)


def test_the_gap_falls_with_the_grid_for_the_same_kind_of_tokens():
    rng = np.random.default_rng(1)
    tokens = (1 + 0.1 * rng.normal(size=(4, 32, 32, 16))).astype(np.float32)
    fine, coarse = (spectrum.frequency_gap(spectrum.log_spectrum(x)) for x in (tokens, tokens[:, :16, :16]))
    assert coarse - fine == pytest.approx(np.log(2), abs=0.05)  # what the module's docstring warns of


def test_profile_and_gap_agree():
    found = spectrum.log_spectrum(np.random.default_rng(2).normal(size=(1, 8, 12, 5)).astype(np.float32))
    where, relative = spectrum.radial_profile(found, rings=5)
    assert where[0] == 0 and relative[0] == 0 and (np.diff(where) > 0).all() and where[-1] <= 1
    distance = spectrum.radius((8, 12))
    ring = (distance > 0.75) & (distance <= 1.0)
    assert relative[-1] == pytest.approx(found[ring].mean() - found[4, 6])
    assert distance[0, 6] == distance[4, 0] == 1.0 and distance[4, 6] == 0.0  # each axis by its own highest
    with pytest.raises(ValueError, match="no high frequencies"):
        spectrum.frequency_gap(np.zeros((1, 1)))
