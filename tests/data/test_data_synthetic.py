"""The moving shapes: flow and visibility are exact, motion obeys the walls and gravity, worlds are
reproducible."""

import numpy as np
import pytest
from scipy import ndimage

from jaxalign.data.pipeline import batches, held_out
from jaxalign.data.sources import open_source
from jaxalign.data.synthetic import GRAVITY, HUE_CHANNELS, HUE_CONTRAST, STATE, bounce, falling_shapes, moving_shapes

SIZE = {"num_frames": 6, "height": 64, "width": 96}


def _warp_error(world, frame):
    """|frame t+1 fetched along the flow − frame t| (cubic interpolation), for each pixel, in grey levels."""
    y, x = np.mgrid[: SIZE["height"], : SIZE["width"]].astype(float)
    dx, dy = world["flow"][frame, ..., 0], world["flow"][frame, ..., 1]
    later = world["video"][frame + 1].astype(float)
    fetched = np.stack(
        [ndimage.map_coordinates(later[..., c], [y + dy, x + dx], order=3, mode="nearest") for c in range(3)],
        -1,
    )
    return np.abs(fetched - world["video"][frame]).max(-1)


def _interior(visible, flow):
    """Away from edges, where a pixel mixes two surfaces."""
    speed = np.abs(np.stack([ndimage.sobel(flow[..., c], axis) for c in (0, 1) for axis in (0, 1)])).max(0)
    return visible & ~ndimage.binary_dilation((speed > 0.5) | ~visible, iterations=2)


@pytest.mark.parametrize("index", [0, 1, 7, 10])
def test_flow_brings_every_visible_pixel_home(index):
    world = moving_shapes(3, index, **SIZE)
    moved = 0
    for frame in range(5):
        error, visible = _warp_error(world, frame), world["visible"][frame]
        inside = _interior(visible, world["flow"][frame])
        moved += int((np.abs(world["flow"][frame][inside]).max(-1) > 0.5).sum())
        assert error[inside].max() < 12.0 and error[inside].mean() < 1.0
        # The check can fail: without the flow, moving pixels do not match; hidden pixels do not match with
        # it.
        moving = inside & (np.abs(world["flow"][frame]).max(-1) > 1.0)
        if moving.sum() > 50:
            still = np.abs(world["video"][frame + 1].astype(float) - world["video"][frame]).max(-1)
            assert still[moving].mean() > 4 * error[moving].mean()
    assert moved > 300  # objects were looked at, not only the ground


def test_hidden_pixels_are_those_that_get_covered():
    hidden_error, visible_error, share = [], [], []
    for index in range(12):
        world = moving_shapes(1, index, **SIZE)
        for frame in range(5):
            error, visible = _warp_error(world, frame), world["visible"][frame]
            hidden_error.append(error[~visible])
            visible_error.append(error[visible])
            share.append(1 - visible.mean())
    assert 0.001 < np.mean(share) < 0.2
    assert np.median(np.concatenate(hidden_error)) > 15 > 2 > np.median(np.concatenate(visible_error))


def test_state_is_what_is_drawn_and_flown():
    world = moving_shapes(0, 4, objects=1, **SIZE)
    state = dict(zip(STATE, world["state"][:, 0].T, strict=True))
    y, x = np.mgrid[: SIZE["height"], : SIZE["width"]]
    for frame in range(5):
        near = np.hypot(x - state["x"][frame], y - state["y"][frame])
        centre = np.unravel_index(near.argmin(), near.shape)
        expected = [state[axis][frame + 1] - state[axis][frame] for axis in "xy"]
        # a turn moves it a little
        np.testing.assert_allclose(world["flow"][frame][centre], expected, atol=0.12)
        assert (world["flow"][frame][near > 1.5 * state["size"][frame]] == 0).all()
        assert (np.abs(world["flow"][frame][near < 0.8 * state["size"][frame]]).max(-1) > 0).mean() > 0.95


def test_walls_and_gravity():
    assert bounce(5.0, 2.0, 0.0, 0.0, 10.0, duration=1.0) == (7.0, 2.0)
    assert bounce(9.0, 2.0, 0.0, 0.0, 10.0, duration=1.0) == (9.0, -2.0)
    # 1 down, 10 up, 10 down, 4 up.
    assert bounce(1.0, -25.0, 0.0, 0.0, 10.0, duration=1.0) == pytest.approx((4.0, 25.0))
    position, velocity, energy = 3.0, 0.7, []
    for _ in range(400):
        position, velocity = bounce(position, velocity, 0.3, 0.0, 20.0, duration=1.0)
        energy.append(0.5 * velocity**2 - 0.3 * position)
        assert -1e-9 <= position <= 20 + 1e-9
    np.testing.assert_allclose(energy, 0.5 * 0.7**2 - 0.3 * 3.0, rtol=1e-6)  # elastic: nothing is lost
    assert bounce(3.0, 1.0, 0.0, 5.0, 2.0, duration=1.0) == (3.0, 0.0)
    for index in range(8):
        world = moving_shapes(2, index, num_frames=24, height=32, width=32)
        centre, size = world["state"][..., :2], world["state"][..., 6:7]
        assert (centre >= size - 1e-3).all() and (centre <= 31 - size + 1e-3).all()
        falls = np.diff(world["state"][:, :, 3], axis=0)
        assert (np.median(falls) > 0.04) == bool(index % 2)


def test_reproducible_distinct_and_strided():
    one, two = moving_shapes(0, 3, **SIZE), moving_shapes(0, 3, **SIZE)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["video"], moving_shapes(0, 5, **SIZE)["video"])
    assert not np.array_equal(one["video"], moving_shapes(1, 3, **SIZE)["video"])
    fast = moving_shapes(0, 3, **{**SIZE, "num_frames": 3}, stride=2)
    np.testing.assert_allclose(fast["state"][..., :6], one["state"][[0, 2, 4]][..., :6], atol=1e-4)
    assert one["video"].min() > 0 and one["video"].max() < 255  # nothing is clipped
    assert one["video"].dtype == np.uint8 and one["flow"].dtype == np.float32 and one["visible"].dtype == bool


def test_as_a_source():
    source = open_source("synthetic")
    size = {"num_frames": 4, "height": 32, "width": 32}
    batch = batches(source, seed=0, batch_size=4, **size)[0]
    shapes = {name: value.shape for name, value in batch.items()}
    assert shapes == {
        "video": (4, 4, 32, 32, 3),
        "flow": (4, 3, 32, 32, 2),
        "visible": (4, 3, 32, 32),
        "state": (4, 4, 3, 8),
        "label": (4,),
        "index": (4,),
        "substituted": (4,),
        "item": (4,),
    }
    assert source.classes == ("drift", "gravity")
    np.testing.assert_array_equal(batch["label"], batch["index"] % 2)
    held = held_out(source, 8, **size)
    assert held["item"].min() >= 4096 and set(held["label"]) == {0, 1}  # worlds of both kinds, none of them trained on
    np.testing.assert_array_equal(held["video"][0], moving_shapes(0, int(held["item"][0]), **size)["video"])


def test_falling_shapes_are_told_by_their_hue_and_fall_alike():
    worlds = [falling_shapes(0, k, num_frames=6, height=48, width=64, stride=2) for k in range(4)]
    assert len({world["video"].tobytes() for world in worlds}) == 4
    for world in worlds:
        video, state = world["video"].astype(int), world["state"]
        assert state.shape == (6, 2, len(STATE))
        other = np.stack([np.delete(video, c, -1).max(-1) for c in HUE_CHANNELS[:2]])
        above = np.stack([video[..., c] for c in HUE_CHANNELS[:2]]) - other
        assert above.max() <= HUE_CONTRAST + 1
        ground = (above <= 0).all(0)  # and where the edges of both meet, which are neither
        assert ground.mean() > 0.5 and (np.ptp(video, -1)[ground] <= 1).mean() > 0.98
        for frame in range(6):
            x, y = state[frame, 1, :2].round().astype(int)  # the last drawn is whole
            assert abs(above[1, frame, y, x] - HUE_CONTRAST) <= 2
            assert above[:, frame].max() > 0.9 * HUE_CONTRAST
        # Energy is kept through every bounce.
        energy = (state[..., 2] ** 2 + state[..., 3] ** 2) / 2 - GRAVITY * 48 * state[..., 1]
        np.testing.assert_allclose(energy, np.broadcast_to(energy[0], energy.shape), atol=1e-4)
    source = open_source("synthetic:gravity")
    batch = held_out(source, 3, num_frames=3, height=16, width=16, stride=2)
    assert source.classes == ("gravity",) and batch["video"].shape == (3, 3, 16, 16, 3) and (batch["label"] == 0).all()
    with pytest.raises(ValueError, match="'synthetic:gravity'"):
        open_source("synthetic:drift")
    with pytest.raises(ValueError, match="1 to 3"):
        falling_shapes(0, 0, num_frames=1, height=16, width=16, objects=4)
