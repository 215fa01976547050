"""Codecs, video <-> latents, and text encoders, found by name in two plain dicts.

codec = codecs.load("cogvideox_2b", "CogVideoX-2b")  # the published folder, its vae/, or the weights file
latents = codec.encode(video, key)  # [b, t, h, w, 3] in [-1, 1] -> [b, *codec.latent_shape((t, h, w))], scaled
video = codec.decode(latents)
moments = codec.moments(video)  # to keep; later codec.sample(moments, key) is what encode would have given

encoder = codecs.load("t5_xxl", "CogVideoX-2b")  # text_encoder/
ids, cut = codecs.tokenize("t5_xxl", "CogVideoX-2b", prompts, 226)
embeddings = encoder(ids)
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Int
from numpy import ndarray

from jaxalign.codecs import cogvideox, folder, hashed, kl, t5
from jaxalign.codecs.pixels import Pixels
from jaxalign.interop import mapping
from jaxalign.interop.rules import Rule


@dataclasses.dataclass(frozen=True)
class Entry:
    """What `load` must know of a network with weights."""

    module: Callable[..., nnx.Module]  # module(config, rngs=rngs)
    config: type  # frozen dataclass of its settings
    layouts: Mapping[str, Sequence[Rule]]  # upstream's names of its leaves, by one that only this layout has
    settings: Mapping[str, Any]  # the preset's
    settings_from: Callable[[Mapping[str, Any]], dict[str, Any]]  # upstream's config.json -> settings
    part: str  # of the published folder
    kinds: tuple[str, ...]  # upstream's classes


def _vae(source, module, config, layouts, kind) -> dict[str, Entry]:
    return {
        name: Entry(module, config, layouts, settings, source.settings_from, "vae", (kind,))
        for name, settings in source.PRESETS.items()
    }


CODECS: dict[str, type[Pixels] | Entry] = (
    {"pixels": Pixels}
    | _vae(
        cogvideox,
        cogvideox.CogVideoXVAE,
        cogvideox.CogVideoXVAEConfig,
        {"": cogvideox.RULES},
        "AutoencoderKLCogVideoX",
    )
    | _vae(kl, kl.KL, kl.KLConfig, kl.RULES, "AutoencoderKL")
)
TEXT_ENCODERS: dict[str, type[hashed.HashedWords] | Entry] = {"hash": hashed.HashedWords} | {
    name: Entry(
        t5.T5Encoder,
        t5.T5Config,
        {"": t5.RULES},
        settings,
        t5.settings_from,
        "text_encoder",
        ("T5EncoderModel", "T5ForConditionalGeneration"),
    )
    for name, settings in t5.PRESETS.items()
}


def load(
    name: str, weights: str | Path | None = None, *, dtype: Any = None, sharding: Any = None, **settings: Any
) -> Any:
    """The codec or text encoder called `name` with the weights of upstream's folder or file.

    What the folder's config.json says comes before the preset, `settings` (fields of its config) before both. `dtype`
    (also 'keep': the file's) and `sharding` as in `mapping.load_state_dict`. Raises ValueError for an unknown name or
    setting, for weights given to a codec without any, a folder of another model and weights that do not fit;
    FileNotFoundError for weights that are not there.
    """
    entry = _entry(name)
    if isinstance(entry, type):
        if weights is not None or settings:
            raise ValueError(f"config.codec: {name!r} has no weights; leave out {str(weights or settings)!r}")
        return entry()
    if weights is None:
        section = "text" if name in TEXT_ENCODERS else "codec"
        raise FileNotFoundError(
            f"config.{section}: {name!r} needs weights; give the published folder, which has {entry.part}/ in it "
            f"({entry.kinds[0]}), with --config.{section}.weights=FOLDER"
        )
    upstream, arrays = folder.read(weights, entry.part, entry.kinds)
    module = abstract(name, **((entry.settings_from(upstream) if upstream else {}) | settings))
    arrays = arrays.fitting(lambda: mapping.upstream_shapes(module, layout(name, arrays)))
    try:
        return mapping.load_state_dict(module, arrays, layout(name, arrays), dtype=dtype, sharding=sharding)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def abstract(name: str, weights: str | Path | None = None, **settings: Any) -> Any:
    """The codec or text encoder with shapes for leaves: its `latent_shape` without memory. Raises as `load`.

    `weights`: a published folder, of which only the sizes are read.
    """
    entry = _entry(name)
    if isinstance(entry, type):
        return entry()
    if weights is not None:
        upstream, _ = folder.read(weights, entry.part, entry.kinds)
        settings = (entry.settings_from(upstream) if upstream else {}) | settings
    known = [field.name for field in dataclasses.fields(entry.config)]
    if unknown := [setting for setting in settings if setting not in known]:
        raise ValueError(f"{name}: no setting {unknown[0]!r}; it has {', '.join(known)}")
    config = entry.config(**(dict(entry.settings) | settings))
    return jax.eval_shape(lambda: entry.module(config, rngs=nnx.Rngs(0)))


def tokenize(
    name: str, weights: str | Path | None, prompts: Sequence[str], length: int
) -> tuple[Int[ndarray, "b n"], int]:
    """(token ids [b, length] for the text encoder `name`, how many prompts were longer and are cut).

    Raises ValueError or FileNotFoundError, one line, for an encoder or a tokenizer that is not there.
    """
    if _entry(name) is hashed.HashedWords:
        return hashed.tokenize(prompts, length)
    if weights is None:
        raise FileNotFoundError(f"config.text: {name!r} needs the published folder: write --config.text.weights=FOLDER")
    return t5.tokenize(weights, prompts, length)


def layout(name: str, keys: Sequence[str] | Mapping[str, Any]) -> Sequence[Rule]:
    """The table of names for a file with these keys; the network's newest where none is recognised."""
    layouts = _entry(name).layouts
    found = (rules for mark, rules in layouts.items() if any(f".{mark}." in key for key in keys))
    return next(found, next(iter(layouts.values())))


def _entry(name: str) -> Any:
    known = CODECS | TEXT_ENCODERS
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"write one of {sorted(known)}"
        raise ValueError(f"config.codec or config.text.encoder: {name!r} is not known; {hint}")
    return known[name]
