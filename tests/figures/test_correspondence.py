"""The correspondence figure: P is the paper's, queries are sensible, every panel shows the model it names."""

import numpy as np
import pytest
from PIL import Image

from jaxalign.figures import correspondence as maps

GRID = (4, 6, 8)


def tokens(seed, grid=GRID, width=16):
    return np.random.default_rng(seed).normal(size=(*grid, width)).astype(np.float32)


def follow(shift):
    """Tokens of a picture that moves `shift` columns a frame: one-hot, so the match is exact."""
    t, h, w = GRID
    found = np.zeros((t, h, w, h * w), np.float32)
    for frame in range(t):
        for i in range(h):
            for j in range(w):
                found[frame, i, j, i * w + (j - shift * frame) % w] = 3.0
    return found


def square(frames=8, size=64):
    """A textured square that moves over a still, textured background."""
    stream = np.random.default_rng(0)
    back, patch = stream.integers(90, 110, (size, size, 3)), stream.integers(0, 256, (16, 16, 3))
    video = back[None].repeat(frames, 0).astype(np.uint8)
    for t in range(frames):
        video[t, 24:40, 4 + 5 * t : 20 + 5 * t] = patch
    return video


def test_p_is_the_tempered_softmax_per_frame():
    x, query, temperature = tokens(0).astype(np.float64), (1, 2, 3), 0.1
    found = maps.correspondence(x.astype(np.float32), query, temperature)
    for frame in range(GRID[0]):
        cosines = np.empty(GRID[1:])
        for i in range(GRID[1]):
            for j in range(GRID[2]):
                a, b = x[query], x[frame, i, j]
                cosines[i, j] = a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
        expected = np.exp(cosines / temperature) / np.exp(cosines / temperature).sum()
        np.testing.assert_allclose(found[frame], expected, rtol=2e-5)
    assert found[query] == found[1].max()


def test_a_moving_picture_is_followed():
    p = maps.correspondence(follow(2), (0, 3, 1), 0.1)
    for frame in range(4):
        assert np.unravel_index(p[frame].argmax(), p[frame].shape) == (3, (1 + 2 * frame) % 8)
        assert p[frame].max() > 0.99


def test_entropy_has_its_extremes():
    certain = np.zeros((6, 8), np.float32)
    certain[2, 2] = 1
    assert maps.entropy(certain) == 0
    assert maps.entropy(np.full((6, 8), 1 / 48, np.float32)) == pytest.approx(np.log(48), rel=1e-5)


def test_a_zero_token_knows_nothing():
    x = tokens(0)
    x[0, 0, 0] = 0
    assert np.allclose(maps.correspondence(x, (0, 0, 0), 0.1), 1 / 48, rtol=1e-5)


def test_queries_lie_on_what_moves():
    found = maps.moving_queries(square(), (8, 16, 16), 3)
    assert len(set(found)) == 3
    for frame, i, j in found:
        assert frame == 0 and 6 <= i < 10 and 1 <= j < 5  # the square's place in frame 0
    assert len(maps.moving_queries(square(), (2, 2, 2), 9)) == 4


@pytest.mark.filterwarnings("error")
def test_queries_of_what_does_not_move():
    for video in (square()[:1], square()[:1].repeat(5, 0)):  # one frame, a still clip: the texture decides
        found = maps.moving_queries(video, (1, 16, 16), 3)
        assert len(set(found)) == 3 and all(6 <= i < 10 and 1 <= j < 5 for _, i, j in found)
    for frames in (1, 4):  # nothing to choose by: inside of the picture, and apart
        places = np.asarray(maps.moving_queries(np.full((frames, 64, 64, 3), 90, np.uint8), (1, 16, 16), 4))[:, 1:]
        apart = np.linalg.norm(places[:, None] - places[None], axis=-1)[~np.eye(4, dtype=bool)]
        assert apart.min() >= 4 and places.min() > 0 and places.max() < 15


def test_the_figure_shows_every_panel(tmp_path):
    panels = {"teacher": follow(2), "student, step 0": tokens(1), "student now": tokens(2, (2, 3, 4))}
    queries = [(0, 3, 1), (0, 1, 6)]
    path = tmp_path / "figures" / "c.png"
    figure = maps.correspondence_figure(square(), panels, queries, 0.1, path, frames=[1, 2, 3], title="a clip")
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert image.shape[1] > 1200 and image.std() > 20

    pictures = [axis for axis in figure.axes if axis.images]
    assert len(pictures) == 2 * (1 + 3 * 3)
    heats = [axis.images[1] for axis in pictures if len(axis.images) == 2]
    assert len({(heat.norm.vmin, heat.norm.vmax) for heat in heats}) == 1  # one scale for all
    shapes = [heat.get_array().shape for heat in heats[:9]]
    assert shapes == [(6, 8)] * 6 + [(3, 4)] * 3
    expected = maps.correspondence(follow(2), queries[0], 0.1)[2] * 48
    np.testing.assert_allclose(heats[1].get_array(), expected, rtol=1e-5)
    words = [text.get_text() for text in figure.texts]
    assert {"a clip", "query", *panels} <= set(words) and any("chance: 3.9 or 2.5" in word for word in words)


def test_other_frames_are_chosen():
    assert maps._other_frames(0, 8) == [2, 7]
    assert maps._other_frames(0, 2) == [1]
    assert maps._other_frames(7, 8) == [0, 5]
    assert maps._other_frames(0, 1) == [0]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"panel 'a': tokens must be \[t, h, w, d\]"):
        maps.correspondence_figure(square(), {"a": tokens(0)[0]}, [(0, 0, 0)], 0.1)
    with pytest.raises(ValueError, match=r"query \(0, 6, 0\) is outside"):
        maps.correspondence_figure(square(), {"a": tokens(0)}, [(0, 6, 0)], 0.1)
    with pytest.raises(ValueError, match="frame 4 is outside"):
        maps.correspondence_figure(square(), {"a": tokens(0)}, [(0, 0, 0)], 0.1, frames=[4])
