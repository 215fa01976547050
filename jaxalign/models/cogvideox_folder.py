"""CogVideoX's transformer/config.json, as diffusers writes it, to the settings of `CogVideoXConfig` and back."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxalign.models.cogvideox import CogVideoXConfig

CLASS = "CogVideoXTransformer3DModel"
TABLE = (300, 300)  # sample_height, sample_width of 1.5

# What the module is built as, whatever is trained; a folder that says otherwise is another network.
_SAME = dict(
    flip_sin_to_cos=True,
    freq_shift=0,
    dropout=0.0,
    attention_bias=True,
    activation_fn="gelu-approximate",
    timestep_activation_fn="silu",
    norm_elementwise_affine=True,
    norm_eps=1e-5,
)
# Fields of CogVideoXConfig that a run chooses for itself: its clips, its machine, the length of its prompts.
_FREE = ("input_size", "num_frames", "sample_size", "text_tokens", "remat", "attention")


def settings_from(upstream: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `CogVideoXConfig` but `input_size` and `num_frames`, from diffusers' transformer/config.json.

    What it leaves out is diffusers' default. Raises ValueError for a transformer that this module is not.
    Source: diffusers models/transformers/cogvideox_transformer_3d.py.
    """
    for name, ours in _SAME.items():
        if upstream.get(name, ours) != ours:
            raise ValueError(f"transformer/config.json: {name} is {upstream[name]!r}; only {ours!r} is read here")
    if upstream.get("patch_size_t") is None and not upstream.get("patch_bias", True):
        raise ValueError("transformer/config.json: patch_bias is false without patch_size_t, which is not read here")
    heads = upstream.get("num_attention_heads", 30)
    out_channels = upstream.get("out_channels") or upstream.get("in_channels", 16)
    rotary = upstream.get("use_rotary_positional_embeddings", False)
    learned = upstream.get("use_learned_positional_embeddings", False)
    return dict(
        width=heads * upstream.get("attention_head_dim", 64),
        depth=upstream.get("num_layers", 30),
        num_heads=heads,
        patch_size=upstream.get("patch_size", 2),
        patch_size_t=upstream.get("patch_size_t"),
        in_channels=out_channels,
        image_channels=upstream.get("in_channels", 16) - out_channels,
        positions=("rotary+learned" if learned else "rotary") if rotary else "sincos",
        spatial_scale=upstream.get("spatial_interpolation_scale", 1.875),
        temporal_scale=upstream.get("temporal_interpolation_scale", 1.0),
        sample_size=(upstream.get("sample_height", 60), upstream.get("sample_width", 90)),
        text_tokens=upstream.get("max_text_seq_length", 226),
        text_width=upstream.get("text_embed_dim", 4096),
        time_width=upstream.get("time_embed_dim", 512),
        ofs_width=upstream.get("ofs_embed_dim") or 0,
    )


def usual_size(upstream: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in latents of the videos that a folder draws where nobody says.

    The 300x300 of 1.5 is the size of a table that positions are cut from, and no video's.
    """
    size = upstream.get("sample_height", 60), upstream.get("sample_width", 90)
    return (96, 170) if upstream.get("patch_size_t") is not None and size == TABLE else size


def upstream_from(config: CogVideoXConfig, published: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """diffusers' transformer/config.json, every field, of a model; `published` is that of the folder it started from.

    From there come what the model does not know: the size that diffusers samples by default, and of 1.5's positions
    the table they are cut from. A learned table of positions fits one size only, which is the model's own.
    """
    sizes = dict(sample_height=60, sample_width=90, sample_frames=49, temporal_compression_ratio=4, patch_bias=True)
    if config.patch_size_t is not None:
        sizes |= dict(sample_height=TABLE[0], sample_width=TABLE[1], sample_frames=81, patch_bias=False)
    sizes |= {name: value for name, value in (published or {}).items() if name in sizes}
    if config.patch_size_t is None and config.positions == "rotary":
        sizes |= dict(sample_height=config.sample_size[0], sample_width=config.sample_size[1])
    if config.positions == "rotary+learned":
        frames = (config.num_frames - 1) * int(sizes["temporal_compression_ratio"]) + 1
        sizes |= dict(sample_height=config.input_size[0], sample_width=config.input_size[1], sample_frames=frames)
    return {
        "_class_name": CLASS,
        "_diffusers_version": (published or {}).get("_diffusers_version", "0.42.1"),
        **_SAME,
        **sizes,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels + config.image_channels,
        "out_channels": config.out_channels,
        "time_embed_dim": config.time_width,
        "ofs_embed_dim": config.ofs_width or None,
        "text_embed_dim": config.text_width,
        "num_layers": config.depth,
        "patch_size": config.patch_size,
        "patch_size_t": config.patch_size_t,
        "max_text_seq_length": config.text_tokens,
        "spatial_interpolation_scale": config.spatial_scale,
        "temporal_interpolation_scale": config.temporal_scale,
        "use_rotary_positional_embeddings": config.positions != "sincos",
        "use_learned_positional_embeddings": config.positions == "rotary+learned",
    }


def check(upstream: Mapping[str, Any], config: CogVideoXConfig, presets: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError, with the preset that fits if one does, unless a folder's transformer is the one of the config.

    The size and length of clips and prompts may differ, and how rotary positions of 1.0 are stretched to it; a learned
    table that does not fit shows when it is read.
    """
    there = {name: value for name, value in settings_from(upstream).items() if name not in _FREE}
    here = {name: getattr(config, name) for name in there}
    if there == here:
        return
    differing = [name for name in there if there[name] != here[name]]
    if differing == ["patch_size"]:
        hint = f"write --config.model.patch_size={there['patch_size']}"
    elif fits := [name for name, preset in presets.items() if _of(preset, config, there) == there]:
        hint = f"write --config.model.preset={fits[0]}"
    else:
        hint = f"it is none of the presets {', '.join(presets)}; model.preset=folder takes its sizes"
    some = ", ".join(f"{name} {there[name]!r} (here {here[name]!r})" for name in differing)
    raise ValueError(f"its transformer/config.json says {some}: {hint}")


def _of(preset: Mapping[str, Any], config: CogVideoXConfig, names: Iterable[str]) -> dict[str, Any]:
    """The fields of a model of that preset in this run: latents and patches are the run's where it does not say."""
    plain = {field.name: field.default for field in dataclasses.fields(CogVideoXConfig)}
    own = dict(in_channels=config.in_channels, patch_size=config.patch_size)
    return {name: (plain | own | dict(preset))[name] for name in names}
