"""Trajectories and X-T slices: points stay on what moves, sub-token places are right, pictures show the data."""

import numpy as np
import pytest
from PIL import Image

from jaxalign.figures import trajectories, xt_slices


def drifting(speed, frames=5, side=8, width=24, sharpness=1.0):
    """Tokens that depend smoothly on a world that moves `speed` columns a frame to the right."""
    rng = np.random.default_rng(0)
    waves = rng.normal(size=(width, 2)) * sharpness
    phase = rng.uniform(0, 2 * np.pi, width)
    y, x = np.mgrid[:side, :side].astype(np.float64)
    found = [
        np.cos(y[..., None] * waves[:, 0] + (x - speed * t)[..., None] * waves[:, 1] + phase) for t in range(frames)
    ]
    return np.stack(found).astype(np.float32)


def test_a_point_moves_with_its_thing():
    paths, sure = trajectories.follow(drifting(1), [(2.5, 1.5), (6.5, 3.5)], temperature=0.02)
    for path, (y, x) in zip(paths, [(2.5, 1.5), (6.5, 3.5)], strict=True):
        np.testing.assert_allclose(path[:, 0], y, atol=0.1)
        np.testing.assert_allclose(path[:, 1], x + np.arange(5), atol=0.1)
    assert sure.shape == (2, 5) and (sure > 0.8).all()


def test_places_between_tokens_are_found():
    paths, _ = trajectories.follow(drifting(0.5, sharpness=0.6), [(4.5, 2.5)], temperature=0.05)
    np.testing.assert_allclose(paths[0, :, 1], 2.5 + 0.5 * np.arange(5), atol=0.3)


def test_one_step_is_the_local_mean_of_the_tempered_softmax():
    tokens = np.random.default_rng(3).normal(size=(2, 4, 5, 6)).astype(np.float32)
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    p = np.exp(unit[1] @ unit[0, 1, 2] / 0.1)
    p /= p.sum()
    i, j = np.unravel_index(p.argmax(), p.shape)
    inside = [(a, b) for a in range(4) for b in range(5) if abs(a - i) <= 1 and abs(b - j) <= 1]
    mass = sum(p[place] for place in inside)
    expected = [sum(p[place] * (place[axis] + 0.5) for place in inside) / mass for axis in (0, 1)]
    paths, sure = trajectories.follow(tokens, [(1.5, 2.5)], temperature=0.1)
    np.testing.assert_allclose(paths[0, 1], expected, rtol=1e-4)
    assert sure[0, 1] == pytest.approx(mass, rel=1e-4) and sure[0, 0] == 1


def test_tokens_between_centres_are_bilinear():
    frame = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    for place, value in (
        ((0.5, 0.5), 0),
        ((0.5, 1.0), 0.5),
        ((1.0, 1.5), 3),
        ((2.5, 3.5), 11),
        ((0, 0), 0),
        ((3, 4), 11),
    ):
        assert trajectories.token_at(frame, np.asarray(place, np.float64))[0] == pytest.approx(value)
    assert trajectories.token_at(frame[:1, :1], np.asarray([0.5, 0.5]))[0] == 0


def test_a_teacher_that_knows_nothing_is_unsure():
    paths, sure = trajectories.follow(np.ones((3, 6, 6, 4), np.float32), [(3.5, 3.5)])
    assert np.isfinite(paths).all() and (sure[0, 1:] <= 9 / 36 + 1e-6).all()


def moving_square(frames=6, size=48):
    rng = np.random.default_rng(0)
    video = np.full((frames, size, size, 3), 90, np.uint8)
    patch = rng.integers(0, 256, (12, 12, 3), np.uint8)
    for t in range(frames):
        video[t, 18:30, 4 + 4 * t : 16 + 4 * t] = patch
    return video


def test_the_figure_draws_every_point_where_it_went(tmp_path):
    video, tokens = moving_square(), {"good": drifting(1, frames=6), "half the frames": drifting(1, frames=3)}
    path = tmp_path / "t.png"
    points = [(0.3, 0.2), (0.7, 0.4)]
    figure = trajectories.trajectory_figure(
        video, tokens, path, points=points, frames=3, temperature=0.02, title="a clip"
    )
    assert len(figure.axes) == 6 and np.asarray(Image.open(path)).std() > 20
    expected = trajectories.follow(tokens["good"], [(2.4, 1.6), (5.6, 3.2)], temperature=0.02)[0] / 8 * 48
    for axis, frame in zip(figure.axes[:3], (0, 2, 5), strict=True):
        ends = [line for line in axis.lines if line.get_marker() == "o"][1::2]
        assert [(float(e.get_ydata()[0]), float(e.get_xdata()[0])) for e in ends] == [tuple(p[frame]) for p in expected]
        assert len([line for line in axis.lines if line.get_marker() == "None"]) == 2 * frame
    with pytest.raises(ValueError, match="outside of the picture"):
        trajectories.trajectory_figure(video, tokens, points=[(3, 4)])
    with pytest.raises(ValueError, match="panel 'a'"):
        trajectories.trajectory_figure(video, {"a": tokens["good"][0]})


def test_default_points_lie_on_what_moves():
    for y, x in trajectories.moving_points(moving_square(), 2):
        assert 0.37 <= y <= 0.63 and x <= 0.37
    (y, x), *more = trajectories.moving_points(moving_square()[:1], 3)  # of one frame: on what has texture
    assert 0.37 <= y <= 0.63 and x <= 0.37 and len(more) == 2


def test_an_xt_slice_is_one_row_of_every_frame(tmp_path):
    video = moving_square()
    found = xt_slices.xt_slice(video, 0.5)
    assert np.array_equal(found, video[:, 24]) and np.array_equal(xt_slices.xt_slice(video, 1.0), video[:, 47])
    teacher = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), np.uint8)
    path = tmp_path / "xt.png"
    figure = xt_slices.xt_figure({"a clip": (video, {"net stride=8": teacher})}, path, title="slices")
    first, pixels, tokens = (axis.images[0].get_array() for axis in figure.axes)
    row = int(figure.axes[0].lines[0].get_ydata()[0])
    assert 18 <= row < 30 and np.array_equal(first, video[0]) and np.array_equal(pixels, video[:, row])
    assert np.array_equal(tokens, teacher[:, row * 8 // 48])
    assert figure.axes[2].get_title() == "net\nstride=8" and np.asarray(Image.open(path)).std() > 20
    alone = xt_slices.xt_figure({"a": (video, {}), "b": (video, {})}, places=[0.1, 0.5])
    assert len(alone.axes) == 4 and [a.lines[0].get_ydata()[0] for a in alone.axes[::2]] == pytest.approx([4.8, 24.0])
