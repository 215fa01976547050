"""The scaling picture shows every run, the envelope and the law, and can do without a law."""

import itertools

import numpy as np
import pytest
from PIL import Image

from jaxalign.figures import scaling as figure
from jaxalign.metrics import scaling


def test_picture_with_and_without_laws(tmp_path):
    points = []
    for n, seed, k in itertools.product((10**5, 10**6, 10**7), (0, 1), (1, 2, 4, 8)):
        loss = 0.3 + 0.1 * (n / 1e6) ** -0.3 + 0.2 * k**-0.5 + 0.01 * seed
        points.append(scaling.Point(f"n={n},seed={seed}", f"n={n}", n, 256, 1e4 * k, 6e4 * n * k, loss))
    front, laws, _ = scaling.analyse(points, replicates=3)
    full = figure.draw(points, front, laws, tmp_path / "full.png")
    labels = full.axes[0].get_legend_handles_labels()[1]
    assert labels[:2] == ["100 k parameters, 256 tokens × 2 runs", "1 M parameters, 256 tokens × 2 runs"]
    assert any(label.startswith("E + A") and "α" in label for label in labels) and len(full.axes) == 4
    bare = figure.draw(points[:2], points[:2], [], note="too few")
    assert len(bare.axes) == 1 and [t.get_text() for t in bare.axes[0].texts] == ["too few"]
    pixels = np.asarray(Image.open(tmp_path / "full.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    with pytest.raises(ValueError, match="no points"):
        figure.draw([], [], [])


def test_short_numbers():
    assert [figure.short(n) for n in (12, 333936, 6.75e8, 3e21)] == ["12", "334 k", "675 M", "3e+03 E"]
