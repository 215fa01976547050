"""Writes a published folder of diffusers anew: one part of ours, the other parts as they were.

OUT/model_index.json, scheduler/, text_encoder/, tokenizer/, vae/, LICENSE, ...   copied, or linked
OUT/transformer/config.json, diffusion_pytorch_model[-0000K-of-0000N].safetensors[.index.json]   new
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.interop import converted, safetensors_file, sealed

STEM = "diffusion_pytorch_model"
SHARD = 10_000_000_000  # bytes; what diffusers' save_pretrained cuts at
INDEX = "model_index.json"


def check(published: str | Path, part: str, kind: str) -> Path:
    """The path of a whole published pipeline that has `part` of class `kind`.

    Raises FileNotFoundError for a folder that lacks the index or a part that it names, ValueError for another one.
    """
    folder = Path(published)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder}: no {INDEX}; give the published folder, the one with {part}/ and vae/ in it")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX}: not a pipeline's index ({error})") from error
    if parts.get(part, ["", ""])[1] != kind:
        raise ValueError(f"{folder}: a {index.get('_class_name')} whose {part} is {parts.get(part)}, not a {kind}")
    if missing := [name for name in parts if name != part and not (folder / name).is_dir()]:
        raise FileNotFoundError(f"{folder}: {INDEX} names {', '.join(missing)}, which is not there; download it too")
    return folder


def write(
    out: str | Path,
    published: str | Path,
    part: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    link: bool = False,
    shard: int = SHARD,
) -> Path:
    """The folder `out`: `part` of these arrays, all else from `published` (see `check`); returns it.

    arrays: as in `safetensors_file.write_stream`, but in the order of `shapes`. `link`: symbolic links to the other
    parts in place of copies. Nothing is overwritten, and the folder has its name when it is whole. Raises
    FileExistsError, OSError.
    """
    out, published = converted.check_free(out), Path(published).absolute()
    with sealed.whole_folder(out) as temporary:
        (temporary / part).mkdir()
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (temporary / part / "config.json").write_text(text, encoding="utf-8")
        write_weights(temporary / part, shapes, arrays, shard=shard)
        for entry in published.iterdir():
            if entry.name == part or entry.name.startswith("."):
                continue
            if link and entry.name != INDEX:
                (temporary / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
            elif entry.is_dir():
                shutil.copytree(entry, temporary / entry.name)  # what links lead to, as in a download cache
            else:
                shutil.copy2(entry, temporary / entry.name)
    return out


def write_weights(
    folder: Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    shard: int = SHARD,
) -> None:
    """One safetensors file, or shards of at most `shard` bytes (a larger array is alone in one) and their index.

    Tensors go into the shards in the order in which they come, so that one array is in memory at a time. diffusers'
    own order is another one; a reader follows the index.
    """
    groups = _groups(shapes, shard)
    stream = iter(arrays)
    table = {}
    for number, names in enumerate(groups, start=1):
        name = f"{STEM}-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else f"{STEM}.safetensors"
        some = itertools.islice(stream, len(names))
        safetensors_file.write_stream(folder / name, {key: shapes[key] for key in names}, some)
        table |= dict.fromkeys(names, name)
    if (more := next(stream, None)) is not None:
        raise ValueError(f"{folder}: {more[0]!r} was not announced")
    if len(groups) > 1:
        total = sum(_bytes(spec) for spec in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{STEM}.safetensors.index.json").write_text(text, encoding="utf-8")


def _groups(shapes: Mapping[str, jax.ShapeDtypeStruct], shard: int) -> list[list[str]]:
    groups, size = [[]], 0
    for name, spec in shapes.items():
        size += _bytes(spec)
        if size > shard and groups[-1]:
            groups.append([])
            size = _bytes(spec)
        groups[-1].append(name)
    return groups


def _bytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
