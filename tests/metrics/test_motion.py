"""Motion from pixels: the extremes, and the speed that a known translation must give."""

import numpy as np
import pytest

from jaxalign.metrics.motion import motion_energy_ratio, motion_magnitude


def still(frames=4):
    picture = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    return picture.repeat(frames, axis=0)


def flicker(frames=4):
    return np.stack([np.full((16, 16, 3), 255 * (i % 2), np.uint8) for i in range(frames)])


def moving(speed, frames=8, contrast=100.0):
    """A smooth texture, the same in both directions, that moves `speed` pixels a frame to the right."""
    y, x = np.mgrid[:64, :64].astype(np.float64)
    frames = [np.sin((x - speed * t) * 0.25) + np.sin(y * 0.25) for t in range(frames)]
    return np.stack([(128 + contrast / 2 * f).round().astype(np.uint8)[..., None].repeat(3, -1) for f in frames])


def test_extremes():
    clips = np.stack([still(), flicker(), np.zeros((4, 16, 16, 3), np.uint8)])
    assert motion_magnitude(clips).tolist() == [0.0, 1.0, 0.0]
    assert motion_energy_ratio(clips).tolist() == [0.0, 1.0, 0.0]


def test_the_ratio_follows_speed_and_not_contrast():
    for speed in (0.5, 1.0, 2.0):
        expected = speed**2 / (speed**2 + 2)
        strong, weak = motion_energy_ratio(np.stack([moving(speed), moving(speed, contrast=50)]))
        assert strong == pytest.approx(expected, rel=0.06)
        assert weak == pytest.approx(expected, rel=0.06)
    slow, fast = motion_magnitude(np.stack([moving(0.5), moving(1.0)]))
    assert fast == pytest.approx(2 * slow, rel=0.05)
    strong, weak = motion_magnitude(np.stack([moving(1.0), moving(1.0, contrast=50)]))
    assert strong == pytest.approx(2 * weak, rel=0.05)


def test_one_frame_is_refused():
    with pytest.raises(ValueError, match="at least 2 frames"):
        motion_magnitude(still(1)[None])
    with pytest.raises(ValueError, match="at least 2 frames"):
        motion_energy_ratio(still(1)[None])
