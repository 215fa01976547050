"""Words on their way to a student that is told by text: captions of a source, prompts of a person, both as token ids.

Tokens are made here, on the host and once; the frozen encoder turns them into embeddings inside the training step.
"""

import dataclasses
from collections.abc import Sequence

import ml_collections
import numpy as np
from jaxtyping import Int

from jaxalign import codecs
from jaxalign.data import captions
from jaxalign.data.clips import Clip, Source, windows
from jaxalign.data.sources import open_source
from jaxalign.training import contents, flow_data
from jaxalign.training.data_settings import clip_settings, source_settings
from jaxalign.training.setup import is_told_by_text, text_weights
from jaxalign.training.subspaces import is_subspace

AT_ONCE = 10_000  # captions that are tokenised together: what the tokenizer makes of a million takes gigabytes


def open_told(config: ml_collections.ConfigDict) -> Source:
    """The source of config.data.source, with the captions of its videos as tokens where the student is told by text.

    A precomputed one gives all that the run need not compute (`contents.bind`), the task motion_subspace has flow
    beside the clips (`flow_data`). Raises ValueError or OSError, one line,
    also for videos without captions.
    """
    d = config.data
    if is_subspace(config):
        return flow_data.open_with_flow(config)
    source = open_source(d.source, **source_settings(config))
    if source.recall is not None:
        return contents.bind(config, source.name)
    if not is_told_by_text(config):
        return source
    source = captions.captioned(source, d.source, d.captions, d.video_column, d.caption_column)
    different = {caption: k for k, caption in enumerate(dict.fromkeys(source.captions))}  # '' where a video is not used
    ids, cut = tokenize(config, list(different))
    tokens = ids.astype(np.uint16 if ids.max(initial=0) < 2**16 else np.int32)
    rows = np.array([different[caption] for caption in source.captions])
    notes = source.notes
    if cut:
        notes += (f"{cut} of {len(different):,} captions are longer than {config.text.tokens} tokens and are cut",)
    return dataclasses.replace(source, tokens=tokens[rows], cut_prompts=cut, notes=notes)


def of_run(config: ml_collections.ConfigDict, most: int = 8) -> list[str]:
    """What a run is sampled with when nobody says: config.sample.prompts, else captions of its held-out videos.

    Raises as `open_told`.
    """
    if config.sample.prompts:
        return list(config.sample.prompts)
    d = config.data
    source = open_source(d.source, **source_settings(config))
    if source.recall is not None:
        unaligned = ml_collections.ConfigDict(config.to_dict())
        unaligned.align.method = "none"  # sampling asks no teacher
        source = contents.bind(unaligned, source.name)
    else:
        source = captions.captioned(source, d.source, d.captions, d.video_column, d.caption_column)
    held_out = windows(source, "held_out", Clip(**clip_settings(config)))
    return list(dict.fromkeys(source.captions[window.item] for window in held_out))[:most]


def tokenize(config: ml_collections.ConfigDict, prompts: Sequence[str]) -> tuple[Int[np.ndarray, "b n"], int]:
    """(token ids of prompts for the run's text encoder, how many were too long and are cut)."""
    parts = [
        codecs.tokenize(config.text.encoder, text_weights(config), prompts[k : k + AT_ONCE], config.text.tokens)
        for k in range(0, len(prompts), AT_ONCE)
    ]
    return np.concatenate([ids for ids, _ in parts]), sum(cut for _, cut in parts)


def for_samples(
    config: ml_collections.ConfigDict, held_out: Sequence[dict], source: Source | None = None
) -> Int[np.ndarray, "k n"] | np.ndarray | None:
    """Token ids of config.sample.prompts, else of the held-out clips' captions; None where nobody is told by text.

    Embeddings [k, n, d] in their place where the `source` or the clips have them.
    """
    if not is_told_by_text(config):
        return None
    if config.sample.prompts and source is not None and source.embedded is not None:
        return np.stack([source.embedded(prompt) for prompt in config.sample.prompts])
    if config.sample.prompts:
        return tokenize(config, list(config.sample.prompts))[0]
    if "prompt" in held_out[0]:
        rows = [row for batch in held_out for row in batch["prompt"]]
        return np.stack(list({row.tobytes(): row for row in rows}.values()))
    tokens = np.concatenate([batch["tokens"] for batch in held_out])
    _, first = np.unique(tokens, axis=0, return_index=True)  # a caption once, in the order of the clips
    return tokens[np.sort(first)]
