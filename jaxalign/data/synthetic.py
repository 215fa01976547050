"""A world whose motion is known: textured discs and squares that drift or fall and bounce, with exact flow.

Everything is a closed formula of pixel position: textures are sums of waves in an object's own coordinates,
so a surface point keeps its colour however it moves, flow is what the rigid motion says, and visibility is
decided at the exact (sub-pixel) place where a point arrives. Coordinates are pixels, x to the right, y down,
pixel centres at integers.
"""

import functools

import numpy as np
from jaxtyping import Float

from jaxalign.data.clips import Clip, Item, Source, Window

OBJECTS = 3
CAPTIONS = (
    "three discs and squares with wavy colours drift and turn over a wavy ground",
    "three discs and squares with wavy colours fall, bounce off the floor and turn over a wavy ground",
)
STATE = ("x", "y", "velocity x", "velocity y", "angle", "angular velocity", "size", "is square")


def synthetic(train: int = 4096, held_out: int = 256, seed: int = 0) -> Source:
    """Moving shapes: `train` and `held_out` different worlds; class 0 drifts, class 1 falls and bounces.

    Batches carry flow, visible and state as well (see `moving_shapes`).
    """
    items = tuple(
        Item(f"synthetic-{k}", None, 25.0, k % 2, "train" if k < train else "held_out") for k in range(train + held_out)
    )
    captions = tuple(CAPTIONS[item.label] for item in items)
    return Source("synthetic", items, ("drift", "gravity"), render=functools.partial(_render, seed), captions=captions)


def _render(seed: int, window: Window, clip: Clip) -> dict:
    return moving_shapes(
        seed,
        window.item,
        num_frames=clip.num_frames,
        height=clip.height,
        width=clip.width,
        stride=max(1, clip.stride),  # a made world is as long as one likes: there is nothing to span
    )


def moving_shapes(
    seed: int,
    index: int,
    *,
    num_frames: int,
    height: int,
    width: int,
    stride: int = 1,
    objects: int = OBJECTS,
) -> dict:
    """World `index`: a dict of

    video   uint8 [t,h,w,3], edges anti-aliased;
    flow    float32 [t-1,h,w,2], (dx, dy) in pixels of the surface point seen at a pixel until the next frame;
    visible bool [t-1,h,w], whether that point is still seen there (not covered, not out of the picture);
    state   float32 [t,objects,8], the columns of STATE: pixels, radians, frames; size a radius or half side.

    Odd worlds have gravity. The same arguments give the same world; stride skips frames of the same motion.
    """
    rng = np.random.default_rng((seed, index))
    side = min(height, width)
    half = rng.uniform(0.12, 0.22, objects) * side
    square = rng.random(objects) < 0.5
    angle, spin = rng.uniform(0, 2 * np.pi, objects), rng.uniform(-0.12, 0.12, objects)
    reach = half * np.where(square, np.sqrt(2), 1.0)  # a turning square touches a wall with its corner
    limits = np.stack([reach, np.stack([width - 1.0 - reach, height - 1.0 - reach]).min(0)], -1)
    centre = np.stack([rng.uniform(limits[:, 0], size - 1 - limits[:, 0]) for size in (width, height)], -1)
    heading, speed = rng.uniform(0, 2 * np.pi, objects), rng.uniform(0.01, 0.035, objects) * side
    velocity = speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], -1)
    pull = rng.uniform(0.002, 0.004) * side if index % 2 else 0.0
    textures = [_waves(rng, 0.9 * side / 8, 2.2 * side / 8, 28.0) for _ in range(objects)]
    ground = _waves(rng, side / 6, side / 2, 20.0)

    state = np.zeros((num_frames, objects, len(STATE)))
    for frame in range(num_frames):
        if frame:
            for k in range(objects):
                for axis, size in enumerate((width, height)):
                    walls = reach[k], size - 1 - reach[k]
                    centre[k, axis], velocity[k, axis] = bounce(
                        centre[k, axis], velocity[k, axis], pull * axis, *walls, duration=float(stride)
                    )
            angle = angle + spin * stride
        state[frame] = np.stack([*centre.T, *velocity.T, angle, spin, half, square], -1)

    y, x = np.mgrid[:height, :width].astype(np.float64)
    owners = [_owner(state[frame], x, y) for frame in range(num_frames)]
    empty = _colour(ground, x, y)
    video = np.stack([_paint(state[frame], x, y, textures, empty) for frame in range(num_frames)])
    flow = np.zeros((num_frames - 1, height, width, 2), np.float32)
    visible = np.zeros((num_frames - 1, height, width), bool)
    for frame in range(num_frames - 1):
        there_x, there_y = x.copy(), y.copy()
        for k in range(objects):
            mine = owners[frame] == k
            u, v = _local(state[frame, k], x[mine], y[mine])
            there_x[mine], there_y[mine] = _world(state[frame + 1, k], u, v)
        flow[frame] = np.stack([there_x - x, there_y - y], -1)
        inside = (there_x >= 0) & (there_x <= width - 1) & (there_y >= 0) & (there_y <= height - 1)
        visible[frame] = inside & (_owner(state[frame + 1], there_x, there_y) == owners[frame])
    return {"video": video, "flow": flow, "visible": visible, "state": state.astype(np.float32)}


def bounce(
    position: float, velocity: float, pull: float, low: float, high: float, *, duration: float
) -> tuple[float, float]:
    """(position, velocity) after `duration` of constant acceleration `pull` between two walls that return all
    energy."""
    if low >= high:
        return position, 0.0  # no room to move in a picture this small
    for _ in range(64):  # a clip's motion meets a wall once or twice a frame at most
        time, wall = min(
            (_arrival(position - low, velocity, pull), low),
            (_arrival(high - position, -velocity, -pull), high),
        )
        if time >= duration:
            break
        position, velocity, duration = wall, -(velocity + pull * time), duration - time
    return position + velocity * duration + 0.5 * pull * duration**2, velocity + pull * duration


def _arrival(height: float, velocity: float, pull: float) -> float:
    """First time > 0 at which height + velocity·t + pull·t²/2 comes down to 0; infinity if never."""
    if abs(pull) < 1e-12:
        return -height / velocity if velocity < -1e-12 else np.inf
    inside = velocity**2 - 2 * pull * height
    if inside < 0:
        return np.inf
    roots = [(-velocity + sign * np.sqrt(inside)) / pull for sign in (-1.0, 1.0)]
    # A body that has just left the wall is at height 0: that root is now, not an arrival.
    return min((t for t in roots if t > 1e-9 and velocity + pull * t <= 0), default=np.inf)


def _waves(rng, shortest: float, longest: float, loudness: float) -> tuple:
    """Four waves with random directions and a random colour: the texture of a surface."""
    length, direction = rng.uniform(shortest, longest, 4), rng.uniform(0, 2 * np.pi, 4)
    vector = 2 * np.pi / length[:, None] * np.stack([np.cos(direction), np.sin(direction)], -1)
    tint = rng.uniform(-1, 1, (4, 3))
    tint *= loudness / np.abs(tint).sum(0) * 2.0  # the sum of all waves stays within ±2·loudness: no clipping
    return vector, rng.uniform(0, 2 * np.pi, 4), tint, rng.uniform(64.0, 190.0, 3)


def _colour(texture: tuple, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    vector, phase, tint, base = texture
    return base + np.sin(u[..., None] * vector[:, 0] + v[..., None] * vector[:, 1] + phase) @ tint


def _local(body: Float[np.ndarray, "8"], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picture to object coordinates."""
    cos, sin = np.cos(body[4]), np.sin(body[4])
    return cos * (x - body[0]) + sin * (y - body[1]), cos * (y - body[1]) - sin * (x - body[0])


def _world(body: Float[np.ndarray, "8"], u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Object to picture coordinates."""
    cos, sin = np.cos(body[4]), np.sin(body[4])
    return body[0] + cos * u - sin * v, body[1] + sin * u + cos * v


def _outside(body: Float[np.ndarray, "8"], u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the object's edge, negative inside (a lower bound beyond a square's corners)."""
    return np.maximum(np.abs(u), np.abs(v)) - body[6] if body[7] else np.hypot(u, v) - body[6]


def _owner(bodies: Float[np.ndarray, "objects 8"], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which object is seen at each place: the last one drawn, -1 for the ground."""
    owner = np.full(x.shape, -1)
    for k, body in enumerate(bodies):
        owner[_outside(body, *_local(body, x, y)) <= 0] = k
    return owner


def _paint(bodies: Float[np.ndarray, "objects 8"], x, y, textures, empty) -> np.ndarray:
    image = empty.copy()
    for body, texture in zip(bodies, textures, strict=True):
        u, v = _local(body, x, y)
        cover = np.clip(0.5 - _outside(body, u, v), 0, 1)  # an edge one pixel wide
        here = cover > 0
        image[here] += cover[here][:, None] * (_colour(texture, u[here], v[here]) - image[here])
    return np.clip(np.round(image), 0, 255).astype(np.uint8)
