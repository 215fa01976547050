"""Flow colours: Middlebury's wheel, equal to torchvision's, and a figure on one scale."""

import numpy as np
import pytest
from PIL import Image

from jaxalign.figures import flow


def test_the_wheel_has_its_corners_and_steps():
    wheel = (flow.colour_wheel() * 255).round().astype(int)
    assert wheel.shape == (55, 3)
    corners = {
        0: (255, 0, 0),
        15: (255, 255, 0),
        21: (0, 255, 0),
        25: (0, 255, 255),
        36: (0, 0, 255),
        49: (255, 0, 255),
    }
    assert {place: tuple(wheel[place].tolist()) for place in corners} == corners
    assert (wheel.max(axis=1) == 255).all() and (wheel.min(axis=1) == 0).all()


def test_equals_torchvision():
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("torchvision.utils")
    field = (np.random.default_rng(0).normal(size=(2, 20, 30, 2)) * 7).astype(np.float32)
    field[0, 0, 0] = 0
    for one in field:
        expected = utils.flow_to_image(torch.from_numpy(one).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        assert np.abs(flow.flow_colours(one).astype(int) - expected).max() <= 1


def test_directions_scale_and_what_is_not_finite():
    directions = np.asarray([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    right, down, left, up = flow.flow_colours(directions[:, None, None])[:, 0, 0]
    assert tuple(right) == (255, 0, 0) and down[0] == 255 and down[1] > 200 and down[2] == 0
    assert left[2] == 255 and left[0] == 0 and up[2] == 255 and up[1] == 0 and up[0] > 50
    field = np.asarray([[[0, 0], [1, 0], [2, 0], [4, 0], [np.nan, 0]]], np.float32)
    still, half, full, faster, unknown = flow.flow_colours(field, largest=2)[0].tolist()
    assert still == [255, 255, 255] and full == [255, 0, 0] and half[0] == 255 and 126 <= half[1] <= 128
    assert faster == [191, 0, 0] and unknown == [0, 0, 0]
    assert (flow.flow_colours(np.zeros((2, 3, 4, 2), np.float32)) == 255).all()


def test_the_legend_agrees_with_the_colours():
    disc = flow.legend(101)
    assert disc.shape == (101, 101, 4) and disc[50, 50].tolist() == [255, 255, 255, 255]
    assert disc[0, 0, 3] == 0 and disc[50, 97, 0] == 255 and disc[50, 97, 1] < 25  # right: red
    assert disc[97, 50, 2] < 25 and disc[97, 50, 0] == 255  # below: yellow


def test_the_figure_has_one_scale_for_all_rows(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
    slow = np.zeros((4, 8, 12, 2), np.float32)
    slow[..., 0] = 1.0
    panels = {"slow": slow, "fast": 4 * slow}
    figure = flow.flow_figure(video, panels, tmp_path / "flow.png", frames=4, title="a clip")
    pictures = [axis.images[0].get_array() for axis in figure.axes[:12]]
    assert np.array_equal(pictures[2], video[2])
    assert (pictures[8] == (255, 0, 0)).all()
    assert (pictures[4][..., 1] == 191).all()  # a quarter of the largest speed
    legend = figure.axes[12]
    assert "rim: 4 px a frame" in [text.get_text() for text in legend.texts]
    assert np.asarray(Image.open(tmp_path / "flow.png")).std() > 20
    with pytest.raises(ValueError, match=r"flow must be \[t, h, w, 2\]"):
        flow.flow_figure(video, {"a": slow[..., :1]})
