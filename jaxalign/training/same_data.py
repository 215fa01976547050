"""Whether a run that goes on sees the data that it saw: its checkpoints say what that was."""

from collections.abc import Mapping
from typing import Any

from jaxalign.data.pipeline import Batches
from jaxalign.training import processes

SHOWN = 3


def facts(data: Batches, seed: int) -> dict[str, Any]:
    """What a checkpoint keeps of its data, as JSON: how many videos and windows, their order's digest, the classes."""
    told = {name.removeprefix("data: "): value for name, value in processes.data_facts(data, seed).items()}
    return told | {"classes": list(data.source.classes)}


def changes(stored: Mapping[str, Any] | None, now: Mapping[str, Any], *, by_label: bool, where: str) -> list[str]:
    """Lines that say how the data differs from that of a checkpoint in `where`; a checkpoint of before knows nothing.

    by_label: the student is told the number of a clip's class. Raises ValueError, one line, where that number would
    name another class than it did.
    """
    if not stored or stored == now:
        return []
    lines, before, after = [], stored["classes"], now["classes"]
    if before != after:
        differing = _differing(before, after)
        if by_label:
            raise ValueError(
                f"{where} was trained on {len(before)} classes and data.source has {len(after)} now ({differing}), so "
                "labels would mean other things: put the folders back as they were, or give another --workdir"
            )
        lines.append(f"{len(before)} -> {len(after)} classes ({differing})")
    lines += [f"{stored[name]} -> {now[name]} {name}" for name in ("videos", "windows") if stored[name] != now[name]]
    if not lines:
        lines.append(
            "other captions" if stored["order"] == now["order"] else "videos of other names, lengths, labels or splits"
        )
    return [f"warning: the data is not what it was when the checkpoint was written: {', '.join(lines)}"]


def _differing(before: list[str], after: list[str]) -> str:
    found = []
    for word, one, other in (("gone", before, after), ("new", after, before)):
        if names := [name for name in one if name not in other]:
            found.append(f"{word}: {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}")
    return "; ".join(found) or "in another order"
