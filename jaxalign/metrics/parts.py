"""Work on disk that goes on where it was stopped: a folder of sealed parts, and statistics of what was measured.

A folder says in about.json what it holds, so nothing of another protocol is taken for one's own; every part has a
manifest with digests (interop/sealed.py), so a flipped bit is noticed and half a part is none. Several calls may work
in one folder at once (two runs that share the statistics of their real clips): whoever is first with a part has made
it, and the others take that one.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.interop import sealed
from jaxalign.metrics.frechet import Moments

ABOUT = "about.json"
VERSION = 1  # of what the numbers in these folders mean; raised when an older folder must not be mixed with new ones
# Fields that older folders lack; what they hold is taken to be of the codec and the text encoder that the run names.
_LATER = re.compile(r"(clips\.)?(latents|prompts)\.")
MOMENTS = "moments"  # where a folder of statistics has them; older ones have them beside about.json

About = Mapping[str, Any]
Arrays = dict[str, np.ndarray]


def claim(folder: Path, about: About, *, what: str, remedy: str) -> None:
    """Make `folder` one that holds `about`, or check that it is.

    Raises ValueError that names the first field that differs, with both values, and the `remedy`.
    """
    about = _plain(about)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ABOUT).exists():
        # What begins with a dot is another call's that is just being written, or was left by one that was killed.
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if found and ABOUT not in found:
            raise ValueError(f"{folder} is no folder of {what}: it has files but no {ABOUT}; {remedy}")
        if not found:
            sealed.write_atomic(folder / ABOUT, json.dumps(about, indent=1) + "\n")
            return
    check(folder, about, what=what, remedy=remedy)


def check(folder: Path, about: About, *, what: str, remedy: str) -> None:
    """Raises ValueError, as `claim`, unless `folder` holds `about`."""
    try:
        there = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / ABOUT} cannot be read ({type(error).__name__}); {remedy}") from None
    there, about = _flat(there), _flat(_plain(about))
    unknown = {k for k in about if k not in there and _LATER.match(k)}
    if names := [k for k in dict.fromkeys([*about, *there]) if there.get(k) != about.get(k) and k not in unknown]:
        differ = ", ".join(f"{k} = {there.get(k)!r} there and {about.get(k)!r} here" for k in names[:3])
        raise ValueError(f"{folder} holds {what} of another protocol: {differ}; {remedy}")


def _flat(about: Any, prefix: str = "") -> dict[str, Any]:
    """Dicts inside dicts as one, with dotted names."""
    if not isinstance(about, dict):
        return {prefix: about}
    return {k: v for name, inner in about.items() for k, v in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


def _plain(about: About) -> dict[str, Any]:
    return json.loads(json.dumps({"version": VERSION, **about}))


def spans(count: int, size: int) -> list[range]:
    """Which rows each part holds: `size` of them, the last one what is left."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def part(
    folder: Path,
    number: int,
    make: Callable[[], Arrays],
    *,
    keep: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = print,
) -> Arrays:
    """The arrays of part `number`: from disk where it is whole, else made, written whole and sealed.

    A part that is damaged is said to be and made again; one that another call has made meanwhile is taken. `keep` is
    asked once it is made: whether it is to be written. Large arrays are mapped, not read.
    """
    path = folder / f"part_{number:05d}"
    if path.exists():
        damage = sealed.find_damage(path)
        if damage is None and (found := _mapped(path)):
            return found
        if damage is not None:
            say(f"{path} is damaged and made again: {damage}")
            shutil.rmtree(path, ignore_errors=True)
    arrays = make()
    if not keep():
        return arrays

    def write(fresh: Path) -> None:
        for name, array in arrays.items():
            np.save(fresh / f"{name}.npy", array)

    return arrays if _sealed(path, write) else _mapped(path) or arrays


def _sealed(path: Path, write: Callable[[Path], None]) -> bool:
    """Whether this call has written the folder `path`, whole and sealed; False where another one was faster.

    Raises OSError if it cannot be written.
    """
    try:
        with sealed.whole_folder(path) as fresh:
            write(fresh)
            sealed.write_manifest(fresh)
    except OSError:
        if sealed.find_damage(path) is not None:
            raise
        return False
    return True


def _mapped(path: Path) -> Arrays:
    """The arrays of a part; none of one that another call has removed, since its statistics are whole."""
    try:
        return {file.stem: np.load(file, mmap_mode="r") for file in sorted(path.glob("*.npy"))}
    except FileNotFoundError:
        return {}


def there(folder: Path, numbers: Sequence[int]) -> int:
    """How many of these parts are on disk; whether they are whole shows when they are read."""
    return sum((folder / f"part_{number:05d}" / sealed.NAME).is_file() for number in numbers)


# ---- statistics ----------------------------------------------------------------------------------------------------


def write_moments(folder: Path, moments: Moments, about: About) -> None:
    """Mean and covariance, sealed, in `folder`, which `claim` made; its parts are no longer needed and go then."""
    check(folder, about, what="statistics", remedy="give another --cache")

    def write(fresh: Path) -> None:
        for name in ("mean", "covariance"):
            np.save(fresh / f"{name}.npy", getattr(moments, name))
        (fresh / "count.json").write_text(json.dumps(moments.count) + "\n", encoding="utf-8")

    _sealed(folder / MOMENTS, write)
    for old in folder.glob("part_*"):
        shutil.rmtree(old, ignore_errors=True)  # another call may remove them as well


def read_moments(folder: Path, about: About) -> Moments | None:
    """The statistics in `folder`; None where there are none yet.

    Raises ValueError for those of another protocol, naming both values, and for changed bytes.
    """
    place = next((place for place in (folder / MOMENTS, folder) if (place / sealed.NAME).exists()), None)
    if place is None:
        return None
    remedy = "give another --cache, or remove the folder"
    if damage := sealed.find_damage(place):
        raise ValueError(f"{folder}: these statistics are damaged ({damage}); {remedy}")
    check(folder, about, what="statistics", remedy=remedy)
    count = json.loads((place / "count.json").read_text(encoding="utf-8"))
    return Moments(count, np.load(place / "mean.npy"), np.load(place / "covariance.npy"))
