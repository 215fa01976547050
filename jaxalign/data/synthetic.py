"""A world whose motion is known: textured discs and squares that drift or fall and bounce, with exact flow.

Everything is a closed formula of pixel position: textures are sums of waves in an object's own coordinates,
so a surface point keeps its colour however it moves, flow is what the rigid motion says, and visibility is
decided at the exact (sub-pixel) place where a point arrives. Coordinates are pixels, x to the right, y down,
pixel centres at integers.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jaxalign.data.clips import Clip, Item, Source, Window

OBJECTS = 3
CAPTIONS = (
    "three discs and squares with wavy colours drift and turn over a wavy ground",
    "three discs and squares with wavy colours fall, bounce off the floor and turn over a wavy ground",
)
# The worlds of `synthetic:gravity`, in which every object can be told by its colour (metrics/motion_law.py): a red and
# a blue one over grey, and a green one if there are three; the largest is drawn first, so that none is wholly hidden.
HUES = ("red", "blue", "green")
HUE_CHANNELS = (0, 2, 1)
HUE_SIZES = ((0.180, 0.200), (0.150, 0.165), (0.120, 0.135))  # radius of a disc, in sides; a square has its area
HUE_CONTRAST = 150.0  # an object's own channel above its two others, in grey levels, wherever its texture is
GRAVITY = 0.003  # picture sides a frame²
SPEED = (0.010, 0.035)  # at the start, sides a frame
# The fastest along x and y: all of the speed, and a fall through the picture besides.
FASTEST = (SPEED[1], (SPEED[1] ** 2 + 2 * GRAVITY) ** 0.5)
FALLING = "a red and a blue shape fall, bounce off the floor and turn over a grey ground"
STATE = ("x", "y", "velocity x", "velocity y", "angle", "angular velocity", "size", "is square")


def synthetic(variant: str = "", *, train: int = 4096, held_out: int = 256, seed: int = 0) -> Source:
    """Moving shapes: `train` and `held_out` different worlds; class 0 drifts, class 1 falls and bounces.

    Variant 'gravity': all fall and bounce, and are told by their colour (see `falling_shapes`). Batches carry flow,
    visible and state as well. Raises ValueError for another variant.
    """
    if variant not in ("", "gravity"):
        raise ValueError(f"data.source='synthetic:{variant}': write 'synthetic' or 'synthetic:gravity'")
    names = [f"synthetic{'-' * bool(variant)}{variant}-{k}" for k in range(train + held_out)]
    items = tuple(
        Item(name, None, 25.0, 0 if variant else k % 2, "train" if k < train else "held_out")
        for k, name in enumerate(names)
    )
    if variant:
        render, captions = functools.partial(_render, falling_shapes, seed), (FALLING,) * len(items)
        return Source("synthetic:gravity", items, ("gravity",), render=render, captions=captions)
    render, captions = functools.partial(_render, moving_shapes, seed), tuple(CAPTIONS[item.label] for item in items)
    return Source("synthetic", items, ("drift", "gravity"), render=render, captions=captions)


def _render(world: Callable[..., dict], seed: int, window: Window, clip: Clip) -> dict:
    return world(
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
    motion = centre, velocity, reach, pull, angle, spin
    return _film(motion, half, square, textures, ground, num_frames, height, width, stride)


def falling_shapes(
    seed: int, index: int, *, num_frames: int, height: int, width: int, stride: int = 1, objects: int = 2
) -> dict:
    """World `index` of the variant 'gravity', as `moving_shapes` has it: objects that can be told by their colour.

    Each has a hue of its own (HUES in turn) over a grey ground; textures are waves of brightness and leave the hue
    alone: an object's channel lies HUE_CONTRAST above its two others, which are equal, and grey has all three equal.
    All fall with the same GRAVITY. Raises ValueError for more objects than hues.
    """
    if not 1 <= objects <= len(HUES):
        raise ValueError(f"objects={objects}: a world told by colour has 1 to {len(HUES)}")
    rng = np.random.default_rng((seed, index, 1))
    side = min(height, width)
    radius = np.array([rng.uniform(*HUE_SIZES[k]) for k in range(objects)]) * side
    square = rng.random(objects) < 0.5
    half = np.where(square, np.sqrt(np.pi / 4), 1.0) * radius
    reach = half * np.where(square, np.sqrt(2), 1.0)
    angle, spin = rng.uniform(0, 2 * np.pi, objects), rng.uniform(-0.12, 0.12, objects)
    room = [size - 1 - 2 * reach for size in (width, height)]
    centre = reach[:, None] + rng.uniform(0, 1, (objects, 2)) * np.stack(room, -1)
    heading, speed = rng.uniform(0, 2 * np.pi, objects), rng.uniform(*SPEED, objects) * side
    velocity = speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], -1)
    textures = [_grey_waves(rng, 1.1 * r, 2.5 * r, 20.0, _hue(k)) for k, r in enumerate(radius)]
    ground = _grey_waves(rng, side / 3, float(side), 14.0, np.full(3, 110.0))
    motion = centre, velocity, reach, GRAVITY * side, angle, spin
    return _film(motion, half, square, textures, ground, num_frames, height, width, stride)


def _hue(number: int) -> np.ndarray:
    """The mean colour of object `number`."""
    return np.where(np.arange(3) == HUE_CHANNELS[number], 60.0 + HUE_CONTRAST, 60.0)


def _film(motion: tuple, half, square, textures, ground, num_frames: int, height: int, width: int, stride: int) -> dict:
    """What `moving_shapes` returns, of bodies that begin with `motion` and obey it."""
    centre, velocity, reach, pull, angle, spin = motion
    objects = len(half)
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


def _grey_waves(rng, shortest: float, longest: float, loudness: float, base: np.ndarray) -> tuple:
    """`_waves` of brightness alone, within ±loudness about the colour `base`."""
    vector, phase, _, _ = _waves(rng, shortest, longest, loudness)
    return vector, phase, np.full((4, 3), loudness / 4), base


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
