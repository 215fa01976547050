"""Which videos of a folder are drawn already, and of what: index*.jsonl beside them, a line a video.

A line is written after its video: {file, …, of, checkpoint, settings}. A file that no line vouches for is drawn again,
one that was drawn from something else is refused.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.interop import sealed
from jaxalign.training.trained import workdir_of

Rows = Mapping[str, Mapping[str, Any]]  # by the name of the file
_ANOTHER = "give another --out"


def of_checkpoint(checkpoint: Path, weights: str) -> dict[str, str]:
    """What a line says of videos of a run, `checkpoint` being one step's folder: which run and step, and its digest."""
    name = f"{weights} of {workdir_of(checkpoint).resolve()}, step {checkpoint.name}"
    return {"of": name, "checkpoint": sealed.identity(checkpoint)}  # trained again, the same step is another


def index(out: Path, share: tuple[int, int] = (0, 1)) -> Path:
    """A process's index; one file a process, for a shared folder need not append from two machines in order."""
    several = f"-{share[0]:05d}-of-{share[1]:05d}" if share[1] > 1 else ""
    return out / f"index{several}.jsonl"


def append(path: Path, row: Mapping[str, Any]) -> None:
    """A line at the end of an index; the half one of a process that was killed, or whose disk was full, ends first."""
    with open(path, "a+b") as file:
        torn = b""
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = b"" if file.read() == b"\n" else b"\n"
        file.write(torn + json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def known(out: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each file, of all indices."""
    found = {}
    for path in sorted(out.glob("index*.jsonl"), key=lambda path: path.stat().st_mtime_ns):  # the last word counts
        for line in path.read_bytes().split(b"\n"):  # a torn line may end inside of a character
            try:
                row = json.loads(line)
                found[row["file"]] = row
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a process that was killed
    return found


def missing(out: Path, rows: Rows) -> set[str]:
    """The files that are still to be drawn: those that are not there, or that no line of the index vouches for.

    Raises ValueError, one line, for a file that was drawn from something else than its row says.
    """
    lines, left = known(out), set()
    for file, row in rows.items():
        if not (out / file).is_file() or file not in lines:
            left.add(file)
            continue
        here, there = json.loads(json.dumps(row)), lines[file]
        different = [k for k in here | there if k not in here or k not in there or here[k] != there[k]]
        if "checkpoint" in here and "checkpoint" not in different and _weights(here) == _weights(there):
            different = [k for k in different if k != "of"]  # the run was moved, or is seen from another machine
        if "checkpoint" not in there:  # of a run before that was written down: its step has to do
            different = [k for k in different if k != "checkpoint"]
        if different:
            raise ValueError(f"{out / file} was drawn {_otherwise(different[0], here, there)}")
    return left


def _weights(row: Mapping) -> str:
    return str(row.get("of")).partition(" of ")[0]


def _otherwise(name: str, here: Mapping, there: Mapping) -> str:
    if name not in there:
        return f"by a version that did not write down its {name}: {_ANOTHER}"
    if name not in here:
        return f"with {name} = {there[name]!r}, which is not asked: {_ANOTHER}"
    remedy = _ANOTHER
    if name == "of" and (run := re.fullmatch(r"(ema|raw) of (.*), step (\d+)", str(there[name]))):
        weights, workdir, step = run.groups()
        checkpoint = Path(workdir) / "checkpoints" / step
        if checkpoint.is_dir():
            remedy += f", or go on with that one: --workdir={checkpoint} --weights={weights}"
    return f"with {name} = {there[name]!r}, not {here[name]!r}: {remedy}"
