"""The judge of motion: true clips are lawful to a fraction of a pixel, and what is broken is what rises."""

import itertools

import numpy as np
import pytest

from jaxalign.data import synthetic
from jaxalign.metrics.motion_law import judge, lawful, track

CLIP = dict(num_frames=8, stride=2)
SIZES = (16, 32)


def _worlds(pixels, count=16, first=0):
    found = [synthetic.falling_shapes(7, first + k, height=pixels, width=pixels, **CLIP) for k in range(count)]
    return {name: np.stack([world[name] for world in found]) for name in ("video", "state")}


@pytest.fixture(scope="module")
def worlds():
    return {pixels: _worlds(pixels) for pixels in SIZES}


def _numbers(video):
    return {name: float(np.nanmean(values)) for name, values in judge(track(video), stride=2).items()}


def _rises(name, values, least):
    """Each value is larger than the one before, and the last by far."""
    assert all(b > a for a, b in itertools.pairwise(values)), f"{name}: {values}"
    assert values[-1] > least, f"{name}: {values}"


@pytest.mark.parametrize("pixels", SIZES)
def test_true_clips_are_tracked_and_lawful(worlds, pixels):
    tracks = track(worlds[pixels]["video"])
    usable = tracks.present & ~tracks.covered
    error = np.linalg.norm(tracks.centre - worlds[pixels]["state"][..., :2], axis=-1)[usable]
    assert usable.mean() > 0.4 and error.max() < 0.5 and error.mean() < 0.15
    true_area = np.pi * (np.mean(synthetic.HUE_SIZES[:2], axis=1) * pixels) ** 2
    np.testing.assert_allclose(np.nanmedian(np.where(usable, tracks.area, np.nan), (0, 1)), true_area, rtol=0.2)
    found = _numbers(worlds[pixels]["video"])
    assert found["motion_error"] < 1.5 and found["acceleration"] < 1.5 and found["energy"] < 6
    assert abs(found["gravity"] - 1) < 0.15 and found["open_turns"] == found["extra"] == 0
    assert found["vanished"] < 6 and found["flicker"] < 6  # behind two others at once


def test_gravity_can_be_estimated(worlds):
    tracks = track(worlds[32]["video"])
    known, estimated = (judge(tracks, stride=2, gravity=g)["motion_error"] for g in (synthetic.GRAVITY, None))
    np.testing.assert_allclose(np.nanmean(estimated), np.nanmean(known), atol=0.3)


def test_jitter_and_disorder_are_seen(worlds):
    video, rng = worlds[32]["video"], np.random.default_rng(0)
    moves = rng.uniform(-1, 1, (*video.shape[:2], 2))
    found = []
    for pixels in (0, 1.6, 4):
        shaken = video.copy()
        for i, j in np.ndindex(video.shape[:2]):
            shaken[i, j] = np.roll(video[i, j], np.round(pixels * moves[i, j]).astype(int), (0, 1))
        found.append(_numbers(shaken))
    for name, least in (("motion_error", 3), ("acceleration", 5), ("energy", 10)):
        _rises(name, [one[name] for one in found], least)
    found = [_numbers(video)]
    for first, second in ((3, 4), (2, 5), (1, 6)):
        order = np.arange(8)
        order[[first, second]] = second, first
        found.append(_numbers(video[:, order]))
    for name, least in (("motion_error", 3), ("energy", 20)):
        _rises(name, [one[name] for one in found], least)
    assert found[-1]["open_turns"] > 10


def test_what_goes_and_comes_is_counted(worlds):
    video = worlds[32]["video"]
    found, flicker = [], []
    for gone in (0, 2, 4):
        emptied = video.copy()
        frames = emptied[:, 8 - gone :]
        frames[..., 0] = np.minimum(frames[..., 0], frames[..., 1:].min(-1))  # red turns grey
        found.append(_numbers(emptied))
        flickering = video.copy()
        for frame in range(1, 2 * gone, 2):
            part = flickering[:, frame]
            part[..., 0] = np.minimum(part[..., 0], part[..., 1:].min(-1))
        flicker.append(_numbers(flickering))
    _rises("vanished", [one["vanished"] for one in found], 15)
    _rises("motion_error", [one["motion_error"] for one in found], 2)
    _rises("flicker", [one["flicker"] for one in flicker], 20)
    y, x = np.mgrid[:32, :32]
    doubled = []
    for count in (0, 2, 8):
        more = video.copy()
        more[:, :count, np.hypot(x - 4, y - 4) < 4.2] = (60, 60, 210)
        doubled.append(_numbers(more)["extra"])
    _rises("extra", doubled, 15)


def test_motion_without_gravity_is_no_fall(worlds, monkeypatch):
    numbers = [_numbers(worlds[32]["video"])]
    for share in (0.5, 0.0):
        monkeypatch.setattr(synthetic, "GRAVITY", share * 0.003)
        numbers.append(_numbers(_worlds(32)["video"]))
    np.testing.assert_allclose([one["gravity"] for one in numbers], [1, 0.5, 0], atol=0.1)
    for name, least in (("motion_error", 0.6), ("acceleration", 0.7)):
        _rises(name, [one[name] for one in numbers], least)


def test_lawful_paths_are_those_of_the_generator():
    rng = np.random.default_rng(0)
    low, high = rng.uniform(0, 0.2, 20), rng.uniform(0.7, 1, 20)
    p, v = rng.uniform(0.2, 0.7, 20), rng.uniform(-0.5, 0.5, 20)
    for pull in (0.0, 0.1):
        paths = lawful(p, v, pull, low, high, 6)
        for k in range(20):
            position, velocity = p[k], v[k]
            for frame in range(6):
                np.testing.assert_allclose(paths[k, frame], position, atol=1e-9)
                position, velocity = synthetic.bounce(position, velocity, pull, low[k], high[k], duration=1.0)
    resting = lawful(np.ones(1), np.zeros(1), 0.1, np.zeros(1), np.ones(1), 4)
    np.testing.assert_array_equal(resting, 1)


def test_clips_that_cannot_be_judged():
    with pytest.raises(ValueError, match="4 frames: a path is judged by 5"):
        judge(track(np.zeros((1, 4, 16, 16, 3), np.uint8)), stride=1)
    empty = judge(track(np.full((2, 6, 16, 16, 3), 110, np.uint8)), stride=1)
    np.testing.assert_allclose(empty["vanished"], 100)
    np.testing.assert_allclose(empty["motion_error"], 25)
    assert np.isnan(empty["acceleration"]).all()
