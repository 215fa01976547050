"""Does a weights file fit a model? Everything is compared before a leaf is filled, and told in one line."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence

import ml_dtypes
import numpy as np

from jaxalign.interop.dtypes import is_floating
from jaxalign.interop.rules import Fixed, Ignored, Rule


def check(
    wanted: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    fixed: Mapping[str, Fixed],
    tied: Mapping[str, str],
    weights: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
) -> None:
    """Compares keys, shapes, kinds of numbers, fixed tables and ties of `weights` with what a model wants.

    `wanted`: (shape, dtype) by upstream's name. Raises ValueError that counts the keys that differ and names the
    first of each kind.
    """
    extra = unknown_keys(weights, wanted.keys() | fixed.keys() | tied.keys(), rules)
    missing = [name for name in wanted if name not in weights]
    wrong = []
    for name, (shape, dtype) in wanted.items():
        if name in weights:
            array = weights[name]
            if tuple(array.shape) != shape:
                wrong.append(f"{name} (file {tuple(array.shape)}, model {shape})")
            elif is_floating(array.dtype) != is_floating(dtype):
                wrong.append(f"{name} (file {array.dtype}, model {dtype})")
    for name, rule in fixed.items():
        if name in weights:
            array, table = np.asarray(weights[name]), rule.array()
            if array.shape != table.shape:
                wrong.append(f"{name} (file {array.shape}, model {table.shape})")
            elif is_floating(array.dtype) != is_floating(table.dtype):
                wrong.append(f"{name} (file {array.dtype}, model {table.dtype})")
            elif rule.check and not _agree(array, table, rule.atol):
                wrong.append(f"{name} (its values differ from the table that the model computes)")
    for name, source in tied.items():
        if name in weights and source in weights and not np.array_equal(weights[name], weights[source]):
            wrong.append(f"{name} (differs from {source}, with which it is tied)")
    if problems := [
        f"{len(names)} {what if len(names) > 1 else _one(what)}: {_few(names)}"
        for names, what in (
            (extra, "keys of the file that the model has no place for"),
            (missing, "keys that the model needs and the file lacks"),
            (wrong, "keys that do not fit"),
        )
        if names
    ]:
        # Bigger networks put a prefix before the names of their parts; say so instead of listing them all.
        prefixed = (name for name in extra if missing and name.endswith("." + missing[0]))
        stem = next(prefixed, "").removesuffix(missing[0] if missing else "")
        if stem and all(stem + name in weights for name in missing):
            problems.append(f"all of these are there behind {stem!r}: save a file without that before the names")
        source = getattr(weights, "source", None)
        where = f"{source}: " if source else ""
        raise ValueError(f"{where}these weights do not fit the model ({len(wanted)} keys): {'; '.join(problems)}")


def unknown_keys(weights: Iterable[str], known: Container[str], rules: Sequence[Rule]) -> list[str]:
    """Keys of a file that a model neither wants nor, by its table, leaves out."""
    ignored = [re.compile(rule.pattern) for rule in rules if isinstance(rule, Ignored)]
    return [name for name in weights if name not in known and not any(p.fullmatch(name) for p in ignored)]


def _one(what: str) -> str:
    return what.replace("keys", "key", 1).replace("do not", "does not")


def _agree(array: np.ndarray, table: np.ndarray, atol: float) -> bool:
    """Whether a stored table is the computed one, as far as the file's number format can tell."""
    if is_floating(array.dtype) and array.dtype.itemsize < 4:
        atol = max(atol, float(ml_dtypes.finfo(array.dtype).eps) * float(np.abs(table).max(initial=0)))
    return np.allclose(array.astype(table.dtype), table, rtol=0, atol=atol)


def _few(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
