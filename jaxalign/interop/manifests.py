"""What `third_party/*.toml` says of upstream's weight files: project, licence, name, where a person finds it, counts.

One manifest a family of networks. What stands above its `[[files]]` holds for all of them; a file's own line
overrides it. The first file of a preset is the one that it wants; the others are read as well.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class File:
    """One published file. `keys`, `parameters` and `elements` count what is read of it with `settings`."""

    preset: str  # whom it is for: jaxalign.teachers.load(preset, FILE)
    name: str  # upstream's own file name
    where: str  # URL, page or package where a person finds it
    project: str
    authors: str
    source: str  # upstream's repository
    license: str
    keys: int
    parameters: int  # trained numbers
    elements: int = 0  # with BatchNorm's statistics and step counts; 0: the same as `parameters`
    trained_on: str = ""
    port: str = ""  # repository of the PyTorch version, if it is another one
    format: str = ""  # as interop/sniff.py names it, where it is known
    key: str = ""  # the part of the file that holds the weights; '': the whole
    layout: str = ""  # which of the network's tables of names it follows; '': there is only one
    settings: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # with these the teacher has all that is in it
    beside: str = ""  # a second file, read with it where it lies in the same folder
    package: str = ""  # installed distribution that carries it
    bytes: int = 0  # 0: not known
    sha256: str = ""
    note: str = ""

    @property
    def numbers(self) -> int:
        """All numbers that are read, counters too."""
        return self.elements or self.parameters


@functools.cache
def files() -> tuple[File, ...]:
    """All files of all manifests, in the order of the manifests' names. Raises ValueError for a manifest's mistake."""
    found = []
    for path in sorted(folder().glob("*.toml")):
        try:
            family = tomllib.loads(path.read_text(encoding="utf-8"))
            found += [File(**(family | entry)) for entry in family.pop("files")]
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a manifest ({error})") from error
    return tuple(found)


def folder() -> Path:
    """Where the manifests are: in the installed package; in a checkout a link leads from there to third_party/."""
    package = Path(__file__).parents[1]
    for path in (package / "third_party", package.parent / "third_party"):  # not every copy of a checkout keeps links
        if path.is_dir():
            return path
    raise FileNotFoundError(f"{package} came without third_party/, the list of weight files; install jaxalign again")
