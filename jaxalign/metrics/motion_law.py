"""Does a video obey the law of the world that it shows? Of `synthetic:gravity`, whose objects are told by their colour.

Objects are found by hue (`track`), and their paths are compared with those that the law allows (`judge`): constant
speed sideways, constant acceleration down, elastic walls, nothing comes or goes. Everything is NumPy on the host;
lengths are shares of the picture's side, times are frames of the clip, x to the right, y down.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from jaxalign.data.synthetic import FASTEST, GRAVITY, HUE_CHANNELS, HUE_CONTRAST, HUE_SIZES

CORE = 0.4  # of the hue's full contrast: where an object is, however blurred its edges
SMALLEST = 0.3  # of the smallest area that an object of its hue can have: what is less is no object
MISSING = 0.25  # the distance at which an object counts that is not there, in sides: as far off as a guess
FEWEST = 5  # frames of an object that can be judged; a path has four numbers
AT_WALL = 0.03  # sides by which the place of a wall is uncertain, where blob and outline differ
CORNER = np.sqrt(np.pi / 2)  # a square's corner reaches so much farther than a disc of its area


class Tracks(NamedTuple):
    """Where the objects of b clips are; k counts them in the order of synthetic.HUES."""

    centre: Float[np.ndarray, "b t k 2"]  # (x, y) in pixels; NaN where there is none
    area: Float[np.ndarray, "b t k"]  # pixels
    present: Bool[np.ndarray, "b t k"]
    covered: Bool[np.ndarray, "b t k"]  # touched by an object that is drawn over it: its centre is not to be trusted
    extra: Int[np.ndarray, "b t k"]  # further blobs of its hue
    size: tuple[int, int]  # height, width of the picture


def track(videos: UInt8[np.ndarray, "b t h w 3"], objects: int = 2) -> Tracks:
    """Centre, area and number of the blobs of each hue in every frame.

    A pixel belongs to a hue by how far its channel lies above the two others: on anti-aliased edges over grey this is
    exactly the share that is covered, so centres are sub-pixel. The largest connected blob is the object.
    """
    b, t, h, w, _ = videos.shape
    y, x = np.mgrid[:h, :w].astype(float)
    side = min(h, w)
    centre = np.full((b, t, objects, 2), np.nan)
    area, extra = np.zeros((b, t, objects)), np.zeros((b, t, objects), int)
    covered = np.zeros((b, t, objects), bool)
    around = np.ones((3, 3), bool)
    for i, j in np.ndindex(b, t):
        pixels = videos[i, j].astype(float)
        over = [pixels[..., c] - np.delete(pixels, c, -1).max(-1) for c in HUE_CHANNELS[:objects]]
        shares = [np.clip(one / HUE_CONTRAST, 0, 1) for one in over]
        before = np.zeros((h, w), bool)  # what is drawn over object k: the later ones
        for k in reversed(range(objects)):
            labels, count = ndimage.label(shares[k] > CORE, around)
            if not count:
                continue
            sums = ndimage.sum_labels(shares[k], labels, np.arange(1, count + 1))
            least = SMALLEST * np.pi * (HUE_SIZES[k][0] * side) ** 2
            body = ndimage.binary_dilation(labels == 1 + int(sums.argmax()), around)
            weight = shares[k] * body
            if weight.sum() < least:
                continue
            area[i, j, k] = weight.sum()
            centre[i, j, k] = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
            extra[i, j, k] = int((sums >= least).sum()) - int(sums.max() >= least)
            covered[i, j, k] = bool((body & before).any())
            before |= body
    return Tracks(centre, area, ~np.isnan(centre[..., 0]), covered, extra, (h, w))


def judge(tracks: Tracks, *, stride: int, gravity: float | None = GRAVITY) -> dict[str, Float[np.ndarray, " b"]]:
    """How far the clips are from the law, one value a clip; NaN where a clip has nothing to judge by.

    motion_error   distance of each object to the lawful path that is nearest to it, RMS over frames, in % of the
                   side; a frame without the object counts 25 %. The one number that holds all the others
    acceleration   RMS of what the second differences of free flight differ from gravity, in % of the side a frame²
    gravity        the acceleration of free flight that fits best, over the true one: 1 is right, 0 floats
    energy         RMS drift of an object's energy over the clip, in % of the side that it would lift it
    open_turns     bounces where there is no wall, a hundred objects
    vanished       % of the frames of an object in which it is not there
    flicker        % of the steps from frame to frame in which an object comes or goes
    extra          further blobs, a hundred objects and frames

    stride: frames of the world from one frame of the clip to the next. gravity: in sides a frame² of the world, or None
    for the one that these clips fit best. Raises ValueError for clips of fewer than five frames.
    """
    b, t, k = tracks.present.shape
    if t < FEWEST:
        raise ValueError(f"clips of {t} frames: a path is judged by {FEWEST} frames or more")
    side = float(min(tracks.size))
    path = np.moveaxis(tracks.centre, 2, 1).reshape(b * k, t, 2) / side
    present, covered = (np.moveaxis(part, 2, 1).reshape(b * k, t) for part in (tracks.present, tracks.covered))
    usable = present & ~covered
    areas = np.where(present & ~covered, np.moveaxis(tracks.area, 2, 1).reshape(b * k, t), np.nan)
    legal = np.tile([np.pi * (np.mean(sizes) * side) ** 2 for sizes in HUE_SIZES[:k]], b)
    typical = np.where(usable.any(1), np.nanmedian(np.where(usable.any(1)[:, None], areas, 1.0), axis=1), legal)
    radius = np.clip(np.sqrt(typical / np.pi) / side, HUE_SIZES[k - 1][0], HUE_SIZES[0][1])
    last = np.array([(size - 1) / side for size in tracks.size[::-1]])  # the picture's edge, x and y

    flight = _flight(path, usable, radius, last)
    bend = path[:, 2:] - 2 * path[:, 1:-1] + path[:, :-2]
    measured = np.nanmean(bend[..., 1][flight[..., 1]]) if flight[..., 1].any() else 0.0
    pull = (gravity * stride**2) if gravity is not None else float(measured)
    pulls = np.array([0.0, pull])
    residual = np.where(flight, bend - pulls, np.nan)

    missing = ~present
    distance = _nearest(path, usable, radius, last, pull, stride)
    counted = usable | missing
    squared = np.where(usable, np.nan_to_num(distance) ** 2, MISSING**2)
    error = np.sqrt((squared * counted).sum(1) / np.maximum(counted.sum(1), 1))
    error = np.where(counted.sum(1) >= FEWEST, error, np.nan)

    def clips(values, of=b):
        return _mean(values.reshape(of, -1))

    return {
        "motion_error": 100 * clips(error),
        "acceleration": 100 * np.sqrt(clips(residual**2)),
        "gravity": clips(np.where(flight[..., 1], bend[..., 1], np.nan)) / (GRAVITY * stride**2),
        "energy": 100 * np.sqrt(clips(_energy(path, usable, radius, last, max(pull, 1e-6)) ** 2)),
        "open_turns": 100 * clips(_open_turns(path, usable, radius, last)),
        "vanished": 100 * clips(missing.astype(float)),
        "flicker": 100 * clips((missing[:, 1:] != missing[:, :-1]).astype(float)),
        "extra": 100 * tracks.extra.reshape(b, -1).mean(1),
    }


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean of each row over what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.where(known, values, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def _near_wall(path, radius, last, reach):
    """Whether an object may touch a wall while it moves `reach` [n, t, 2] from where it is, by axis."""
    margin = CORNER * radius[:, None, None] + AT_WALL + reach
    return (path < margin) | (path > last - margin)


def _flight(path, usable, radius, last) -> np.ndarray:
    """Triples of frames [n, t-2, 2] whose object surely flies free along an axis: no wall, nothing over it."""
    steps = np.abs(np.diff(path, axis=1))
    whole = usable[:, 2:] & usable[:, 1:-1] & usable[:, :-2]
    near = _near_wall(path[:, 1:-1], radius, last, np.maximum(steps[:, 1:], steps[:, :-1]))
    return whole[..., None] & ~near


def _energy(path, usable, radius, last, pull) -> np.ndarray:
    """Energy of each step without a wall [n, t-1], over the weight, less the object's median: a height in sides.

    Between two frames the mean velocity is that of the middle in time, whose height is pull/8 above their mean.
    """
    step = np.diff(path, axis=1)
    free = (usable[:, 1:] & usable[:, :-1])[..., None] & ~_near_wall(path[:, 1:], radius, last, 0 * step)
    free &= ~_near_wall(path[:, :-1], radius, last, 0 * step)
    height = -(path[:, 1:, 1] + path[:, :-1, 1]) / 2 + pull / 8
    energy = np.where(free.all(-1), (step**2).sum(-1) / (2 * pull) + height, np.nan)
    enough = (~np.isnan(energy)).sum(1) >= 2
    energy[~enough] = np.nan
    return energy - np.where(enough, np.nanmedian(np.where(enough[:, None], energy, 0.0), axis=1), 0.0)[:, None]


def _open_turns(path, usable, radius, last) -> np.ndarray:
    """How often each object [n] turns about where nothing turns it: sideways off the walls, or upwards off the floor.

    A step counts as a direction from 1.5 % of the side on; below it is the tracker's noise.
    """
    step = np.diff(path, axis=1)
    way = np.where(np.abs(step) > 0.015, np.sign(step), 0.0)
    turned = way[:, 1:] * way[:, :-1] < 0
    turned[..., 1] &= way[:, 1:, 1] < 0  # the top of an arc is lawful
    whole = (usable[:, 2:] & usable[:, 1:-1] & usable[:, :-2])[..., None]
    most = np.maximum(np.abs(step[:, 1:]), np.abs(step[:, :-1]))
    open_ = ~_near_wall(path[:, 1:-1], radius, last, most)
    turns = (turned & whole & open_).sum((1, 2)).astype(float)
    return np.where(whole.any((1, 2)), turns, np.nan)


# ---- The nearest lawful path: of all speeds and places, walls at the object's reach


def _nearest(path, usable, radius, last, pull: float, stride: int) -> np.ndarray:
    """Distance [n, t] of each object to the lawful path nearest to it; whether it is a disc or a square is open."""
    found = []
    for reach in (radius, CORNER * radius):
        x = _fit(path[..., 0], usable, reach, last[0] - reach, 0.0, FASTEST[0] * stride)
        y = _fit(path[..., 1], usable, reach, last[1] - reach, pull, FASTEST[1] * stride)
        found.append(np.hypot(x, y))
    total = [(np.where(usable, one, 0.0) ** 2).sum(1) for one in found]
    return np.where((total[0] <= total[1])[:, None], found[0], found[1])


def _fit(track, usable, low, high, pull: float, fastest: float) -> np.ndarray:
    """What is left [n, t] of one coordinate beside its best lawful path: a grid of starts, then finer grids."""
    track = np.where(usable, track, 0.0)
    # The grid is made for a few walls and shared; positions are told relative to them.
    place, speed = (one.ravel() for one in np.meshgrid(np.linspace(0, 1, 33), np.linspace(-1, 1, 41), indexing="ij"))
    start, velocity = np.zeros(len(track)), np.zeros(len(track))
    for walls in np.unique(np.round(low, 2)):
        rows = np.flatnonzero(np.round(low, 2) == walls)
        room = float(np.mean(high[rows]) - walls)
        paths = _lawful_grid(round(room, 2), pull, fastest, track.shape[1])
        offset = low[rows, None, None] + paths[None] - track[rows, None]
        best = ((offset**2) * usable[rows, None]).sum(-1).argmin(1)
        start[rows], velocity[rows] = low[rows] + place[best] * room, speed[best] * fastest
    width, rate = (high - low) / 32, np.full(len(track), fastest / 20)
    near = np.linspace(-1, 1, 7)
    dp, dv = (one.ravel() for one in np.meshgrid(near, near, indexing="ij"))
    many = len(dp)
    for _ in range(7):
        p = np.clip(start[:, None] + dp * width[:, None], low[:, None], high[:, None]).ravel()
        v = np.clip(velocity[:, None] + dv * rate[:, None], -fastest, fastest).ravel()
        walls = np.repeat(low, many), np.repeat(high, many)
        left = lawful(p, v, pull, *walls, track.shape[1]).reshape(len(track), many, -1) - track[:, None]
        best = ((left**2) * usable[:, None]).sum(-1).argmin(1)
        rows = np.arange(len(track))
        start, velocity = p.reshape(-1, many)[rows, best], v.reshape(-1, many)[rows, best]
        left, width, rate = left[rows, best], width / 2.5, rate / 2.5
    return left


@functools.lru_cache(maxsize=64)
def _lawful_grid(room: float, pull: float, fastest: float, frames: int) -> np.ndarray:
    """The lawful paths [33·41, t] between walls at 0 and `room`."""
    place, speed = (one.ravel() for one in np.meshgrid(np.linspace(0, 1, 33), np.linspace(-1, 1, 41), indexing="ij"))
    zero = np.zeros(len(place))
    return lawful(place * room, speed * fastest, pull, zero, zero + room, frames)


def lawful(
    position: Float[np.ndarray, " n"],
    velocity: Float[np.ndarray, " n"],
    pull: float,
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
    frames: int,
) -> Float[np.ndarray, "n t"]:
    """Positions of n bodies at frames 0, 1, ... between elastic walls under `pull` >= 0 towards `high`.

    data/synthetic.py's `bounce` for many at once, up to six walls a frame.
    """
    p, v = position.astype(float), velocity.astype(float)
    found = [p.copy()]
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(frames - 1):
            left = np.ones_like(p)
            for _ in range(6):
                below, above = np.maximum(high - p, 0), np.maximum(p - low, 0)
                root = np.sqrt(v**2 + 2 * pull * below)
                # Of two equal forms of a root the one that does not cancel.
                floor = np.where(v > 0, 2 * below / (v + root), (root - v) / pull if pull else np.inf)
                inside = v**2 - 2 * pull * above
                ceiling = np.where((v < 0) & (inside >= 0), 2 * above / (np.sqrt(np.maximum(inside, 0)) - v), np.inf)
                # At rest on the floor: it stays there.
                time = np.where((below <= 0) & (v == 0), np.inf, np.minimum(floor, ceiling))
                hits = time < left
                if not hits.any():
                    break
                wall = np.where(floor <= ceiling, high, low)
                v = np.where(hits, -(v + pull * np.where(hits, time, 0)), v)
                p = np.where(hits, wall, p)
                left = np.where(hits, left - time, left)
            resting = (high - p <= 0) & (v == 0)
            p = np.where(resting, p, p + v * left + 0.5 * pull * left**2)
            v = np.where(resting, v, v + pull * left)
            p = np.clip(p, low, high)
            found.append(p.copy())
    return np.stack(found, -1)
