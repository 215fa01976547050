"""The prompts of a precomputed folder: embeddings of the captions, of the empty prompt and of those to sample from."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from jaxalign.convert import Progress
from jaxalign.data import precomputed, precomputed_source
from jaxalign.data.clips import SPLITS, Source, Window
from jaxalign.data.precomputed import Folder, Series
from jaxalign.training import contents, prompts, setup
from jaxalign.training.makers import DTYPES, Options, about
from jaxalign.training.mesh import batch_sharding

NAME = "prompts"  # of the series
AT_ONCE = 8  # times the clips: a prompt is much smaller


def captions(source: Source, found: Mapping[str, Sequence[Window]]) -> tuple[list[str], list[int]]:
    """The name of each item, and the number of its caption among the different ones; -1 where there is none."""
    used = dict.fromkeys(w.item for split in SPLITS for w in found[split])
    different: dict[str, int] = {}
    for item in used:
        if source.captions and source.captions[item]:
            different.setdefault(source.captions[item], len(different))
    said = source.captions or [""] * len(source.items)
    return [item.name for item in source.items], [different.get(caption, -1) for caption in said]


def claim(folder: Folder, run: setup.Run, listed, config: ml_collections.ConfigDict, options: Options) -> Series:
    """The series of the embeddings of the captions `listed`, as `makers.claim`."""
    dtype, shape = _dtype(run, options), (config.text.tokens, run.frozen["text"].width)
    per_shard = max(1, int(options.shard_mb * 2**20) // (shape[0] * shape[1] * dtype.itemsize))
    counts = {"captions": max(listed[1], default=-1) + 1}
    made = Series(NAME, contents.of_prompts(config), dtype.name, shape, counts, per_shard, about())
    return precomputed.claim_series(folder, made)


def _dtype(run: setup.Run, options: Options) -> np.dtype:
    return np.dtype(DTYPES[options.dtype] or run.task.dtype)


def make(
    folder: Folder,
    series: Series,
    run: setup.Run,
    source: Source,
    listed: tuple[list[str], list[int]],
    whole: Collection[Path],
    config: ml_collections.ConfigDict,
    options: Options,
    mesh: jax.sharding.Mesh,
) -> None:
    """The shards that are this process's and not `whole`, and the empty and the sampled prompts."""
    encoder, dtype = run.frozen["text"], _dtype(run, options)
    at_once = AT_ONCE * options.at_once * mesh.size
    embed = jax.jit(lambda encoder, ids: encoder(ids).astype(run.task.dtype).astype(dtype))

    def write_all(path: Path, ids: np.ndarray, said: Sequence[str], progress) -> None:
        with precomputed.new_shard(path) as (write, listing):
            for first in range(0, len(ids), at_once):
                rows = ids[np.minimum(np.arange(first, first + at_once), len(ids) - 1)]
                embedded = jax.device_get(embed(encoder, jax.device_put(rows, batch_sharding(mesh))))
                for row in embedded[: len(ids) - first]:
                    # Zeros at the end need no room. T5 has none: CogVideoX attends to its embeddings of the padding.
                    used = np.flatnonzero(row.astype(np.float32).any(axis=-1))
                    write(np.ascontiguousarray(row[: used[-1] + 1 if len(used) else 0]).tobytes())
                progress(len(embedded[: len(ids) - first]))
            listing["prompts"] = list(said)

    first_items: dict[int, int] = {}
    for item, number in enumerate(listed[1]):
        first_items.setdefault(number, item)
    paths = [folder.path / name for name in series.shards("captions")]
    todo = [k for k, path in enumerate(paths) if options.mine(k) and path not in whole]
    with Progress("prompts", max(1, sum(len(series.units("captions", k)) for k in todo))) as progress:
        for k in todo:
            chosen = [first_items[number] for number in series.units("captions", k)]
            write_all(paths[k], source.tokens[chosen].astype(np.int32), [source.captions[i] for i in chosen], progress)
    there = precomputed_source.asked(folder)
    wanted = list(dict.fromkeys(["", *config.sample.prompts, *there]))
    if options.mine(0) and set(wanted) != set(there):
        ids, _ = prompts.tokenize(config, wanted)
        write_all(folder.path / precomputed_source.ASKED, ids, wanted, lambda count: None)
