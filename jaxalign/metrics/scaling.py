"""How loss falls with compute, size and data: power laws through the points of a sweep, with intervals.

L(C) = E + A (C / C0)^-α through the lower envelope, the best loss at each compute (Hoffmann et al. 2022, approach 1;
Kaplan et al. 2020 with E = 0), and L(N, D) = E + A (N / N0)^-α + B (D / D0)^-β through all points (approach 3, eq. 2).
C0, N0, D0 are geometric means of what was measured, so that A and B are losses in the middle of the data.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares
from scipy.special import logsumexp

DELTA = 0.01  # a residual beyond 1 % of the loss counts linearly, not squared (Huber)
PER_DECADE = 10  # points of the envelope in a decade of compute at most
REPLICATES = 200  # of the bootstrap
BEYOND = 2  # more points than a law has numbers are asked for
LARGEST_EXPONENT = 3.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A loss and what it took; `tokens` is all that the run had seen by then, `compute` in FLOPs."""

    run: str
    group: str  # runs that differ in nothing but the seed
    parameters: int
    clip_tokens: int
    tokens: float
    compute: float
    loss: float
    seeds: int = 1  # how many runs it is the mean of


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted law; `scales` and `exponents` have one value a variable, `variables` their names and centres."""

    floor: float  # E; 0 where it is not fitted or the data want none
    scales: tuple[float, ...]
    exponents: tuple[float, ...]
    variables: dict[str, float]
    residual: float  # root mean square of log(fit / loss)

    def __call__(self, *values: Any) -> np.ndarray:
        """The loss at values of the variables, in the order of `variables`."""
        terms = zip(self.scales, values, self.variables.values(), self.exponents, strict=True)
        return np.asarray(self.floor + sum(a * (np.asarray(x) / x0) ** -power for a, x, x0, power in terms))


# ---- points


def mean_over_seeds(points: Sequence[Point]) -> list[Point]:
    """One point for all seeds of a group after the same tokens; `run` is then the group."""
    together: dict[tuple, list[Point]] = {}
    for point in points:
        together.setdefault((point.group, point.tokens), []).append(point)
    return [
        dataclasses.replace(same[0], run=same[0].group, loss=float(np.mean([p.loss for p in same])), seeds=len(same))
        for same in together.values()
    ]


def envelope(points: Sequence[Point], per_decade: int = PER_DECADE) -> list[Point]:
    """The best loss at each compute, ascending: one point a bin, each better than all that cost less."""
    best: dict[int, Point] = {}
    for point in points:
        cell = int(np.floor(per_decade * np.log10(point.compute)))
        if cell not in best or point.loss < best[cell].loss:
            best[cell] = point
    front: list[Point] = []
    for point in sorted(best.values(), key=lambda p: p.compute):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


# ---- laws


def fit(
    variables: dict[str, Float[np.ndarray, "n"]],
    loss: Float[np.ndarray, "n"],
    *,
    floor: bool = True,
    start: Law | None = None,
) -> Law:
    """The law of `variables` (name -> positive values) that fits the losses; without `floor`, E = 0.

    Huber's loss on log(fit / loss), minimised from a grid of starts, or from the law `start` alone, whose centres are
    then kept. Raises ValueError for fewer distinct points than the law has numbers, or values that are not positive.
    """
    x = np.stack(list(variables.values()), axis=-1).astype(float)
    if not (np.isfinite(x).all() and np.isfinite(loss).all() and (x > 0).all() and (loss > 0).all()):
        raise ValueError("a power law needs positive, finite losses and sizes")
    terms = x.shape[1]
    if len(np.unique(np.column_stack([x, loss]), axis=0)) < 2 * terms + floor:
        raise ValueError(f"a law of {2 * terms + floor} numbers needs as many different points at least")
    centres = np.asarray(list(start.variables.values())) if start else np.exp(np.log(x).mean(axis=0))
    u, y = np.log(x / centres), np.log(loss)

    def logs(theta):  # of each term: E, then A_k (x_k / x0_k)^-α_k
        powers = theta[terms : 2 * terms] - theta[:terms] * u
        return np.column_stack([powers, np.full(len(u), theta[-1])]) if floor else powers

    def residuals(theta):
        return logsumexp(logs(theta), axis=1) - y

    def jacobian(theta):
        parts = logs(theta)
        share = np.exp(parts - logsumexp(parts, axis=1, keepdims=True))
        return np.column_stack([-share[:, :terms] * u, share])

    lowest, spread = y.min(), 12.0
    lower = [1e-3] * terms + [lowest - spread] * terms + [lowest - spread] * floor
    upper = [LARGEST_EXPONENT] * terms + [y.max() + 5] * terms + [lowest] * floor
    if start:
        starts = [[*start.exponents, *np.log(start.scales), *[np.log(max(start.floor, 1e-300))] * floor]]
    else:
        starts = []
        for *powers, share in itertools.product(*[(0.1, 0.4, 1.0)] * terms, (0.1, 0.8) if floor else (0.0,)):
            height = np.log((np.median(loss) - share * loss.min()) / terms)
            starts.append([*powers, *[height] * terms, *[np.log(share) + lowest for _ in range(floor)]])
    found = [
        least_squares(
            residuals, np.clip(s, np.add(lower, 1e-6), np.subtract(upper, 1e-6)), jacobian, (lower, upper),
            loss="huber", f_scale=DELTA, x_scale="jac", max_nfev=100,
        )
        for s in starts
    ]  # fmt: skip
    theta = min(found, key=lambda r: r.cost).x
    base = float(np.exp(theta[-1])) if floor else 0.0
    return Law(
        floor=base if base > 1e-4 * loss.min() else 0.0,
        scales=tuple(float(v) for v in np.exp(theta[terms : 2 * terms])),
        exponents=tuple(float(v) for v in theta[:terms]),
        variables=dict(zip(variables, centres.tolist(), strict=True)),
        residual=float(np.sqrt(np.mean(residuals(theta) ** 2))),
    )


def fit_compute(points: Sequence[Point], *, floor: bool = True, start: Law | None = None) -> Law:
    """L(C) through an envelope."""
    compute, loss = (np.asarray([getattr(p, name) for p in points]) for name in ("compute", "loss"))
    return fit({"C": compute}, loss, floor=floor, start=start)


def fit_size_and_data(points: Sequence[Point], *, start: Law | None = None) -> Law:
    """L(N, D) through all points; N parameters, D tokens."""
    columns = (np.asarray([getattr(p, name) for p in points], float) for name in ("parameters", "tokens", "loss"))
    parameters, tokens, loss = columns
    return fit({"N": parameters, "D": tokens}, loss, start=start)


def bootstrap(
    points: Sequence[Point],
    choose: Callable[[list[Point]], list[Point]],
    fit_law: Callable[..., Law],
    best: Law,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> list[Law]:
    """Laws of resampled data: of each group the seeds, then of what `choose` takes of their means the points.

    Points of one run follow each other, so the intervals are rather too narrow than too wide. A draw with too few
    different points is replaced by another, five times as many draws as replicates at most.
    """
    rng, laws = np.random.default_rng(seed), []
    groups: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        groups.setdefault(point.group, {}).setdefault(point.run, []).append(point)
    for _ in range(5 * replicates):
        drawn = []
        for runs in groups.values():
            names = list(runs)
            for k in rng.integers(len(names), size=len(names)):
                drawn += runs[names[k]]
        chosen = choose(mean_over_seeds(drawn))
        again = [chosen[k] for k in rng.integers(len(chosen), size=len(chosen))]
        try:
            laws.append(fit_law(again, start=best))
        except ValueError:  # too few different points
            continue
        if len(laws) == replicates:
            break
    return laws


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the values."""
    low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---- everything


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A law, its replicates, and the points it went through."""

    title: str
    law: Law
    replicates: list[Law]
    points: list[Point]

    def numbers(self) -> dict[str, tuple[float, float, float]]:
        """Name -> (value, low, high) of E, scales, exponents, and of L(N, D) how the best N grows with compute."""

        def of(law: Law) -> dict[str, float]:
            found = {"E": law.floor} if self.title.startswith("E") else {}
            for letter, greek, scale, power in zip("AB", "αβ", law.scales, law.exponents, strict=False):
                found |= {letter: scale, greek: power}
            if len(law.exponents) == 2:  # Hoffmann et al. 2022, eq. 4
                found["a (best N ∝ C^a)"] = found["β"] / (found["α"] + found["β"])
            return found

        all_of = [of(law) for law in self.replicates]
        nothing = (float("nan"), float("nan"))
        return {k: (v, *(interval([o[k] for o in all_of]) if all_of else nothing)) for k, v in of(self.law).items()}


def analyse(points: Sequence[Point], *, replicates: int = REPLICATES) -> tuple[list[Point], list[Fitted], list[str]]:
    """(the envelope, the laws that the points allow, remarks on what they do not allow)."""
    means = mean_over_seeds(points)
    front, laws, remarks = envelope(means), [], []
    for floor, title in ((True, "E + A (C/C0)^-α"), (False, "A (C/C0)^-α")):
        needed = 2 + floor + BEYOND
        if len(front) < needed:
            remarks.append(
                f"{title}: needs at least {needed} points on the lower envelope, there are {len(front)}; more sizes, "
                "or a constant learning rate and a smaller eval_every"
            )
            continue

        def fit_law(chosen: list[Point], start: Law | None = None, floor: bool = floor) -> Law:
            return fit_compute(chosen, floor=floor, start=start)

        law = fit_law(front)
        title = title.replace("C0", f"{law.variables['C']:.3g}")
        laws.append(Fitted(title, law, bootstrap(points, envelope, fit_law, law, replicates=replicates), front))
    of_one, group = max((sum(p.group == g for p in front), g) for g in {p.group for p in front})
    if laws and 2 * of_one > len(front):
        remarks.append(
            f"{of_one} of the {len(front)} points on the envelope are those of {group}: the law of compute is that "
            "run's own curve rather than the ladder's; train longer, or add sizes"
        )
    for clip_tokens in sorted({p.clip_tokens for p in means}):
        same = [p for p in means if p.clip_tokens == clip_tokens]
        sizes, amounts = len({p.parameters for p in same}), len({p.tokens for p in same})
        title = f"E + A (N/N0)^-α + B (D/D0)^-β, {clip_tokens} tokens a clip"
        if sizes < 3 or amounts < 3 or len(same) < 5 + BEYOND:
            remarks.append(
                f"{title}: needs at least 3 sizes, 3 amounts of data and {5 + BEYOND} points, there are {sizes}, "
                f"{amounts} and {len(same)}"
            )
            continue
        kept = [p for p in points if p.clip_tokens == clip_tokens]
        law = fit_size_and_data(same)
        title = title.replace("N0", f"{law.variables['N']:.3g}").replace("D0", f"{law.variables['D']:.3g}")
        replicas = bootstrap(kept, list, fit_size_and_data, law, replicates=replicates)
        laws.append(Fitted(title, law, replicas, same))
    return front, laws, remarks
