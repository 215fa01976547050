"""Frozen teachers: networks that turn a video into tokens (or flow), found by name in one plain dict.

    teacher = teachers.load("dinov2_b", "dinov2_vitb14_pretrain.pth", size=224)
    tokens = teacher(video)  # [b, t, h, w, 3] in [-1, 1] -> [b, *teacher.grid((t, h, w)), teacher.width]

Weights are upstream's own file, or a folder that `python -m jaxalign.convert` made of it; `third_party/*.toml` says
where a person finds each file, and `python -m jaxalign.convert --list` prints that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from jaxalign.interop import manifests, presets
from jaxalign.interop.presets import Entry, Loaded, family
from jaxalign.teachers import dinov2, efficientnet, hiera, raft, sea_raft, videomae, vjepa2

TEACHERS: dict[str, Entry] = (
    family(
        {"efficientnet_lite0": {}},
        efficientnet.EfficientNetLite0,
        efficientnet.EfficientNetConfig,
        efficientnet.RULES,
    )
    | family(dinov2.PRESETS, dinov2.DINOv2, dinov2.DINOv2Config, dinov2.RULES)
    | family(videomae.PRESETS, videomae.VideoMAE, videomae.VideoMAEConfig, videomae.RULES)
    | family(vjepa2.PRESETS, vjepa2.VJEPA2, vjepa2.VJEPA2Config, vjepa2.RULES)
    | family(hiera.PRESETS, hiera.Hiera, hiera.HieraConfig, hiera.RULES)
    # flow networks: tokens are flow [b, t - 1, h, w, 2] in pixels
    | {name: Entry(raft.RAFT, raft.RAFTConfig, raft.RULES[p["variant"]], p) for name, p in raft.PRESETS.items()}
    | family(sea_raft.PRESETS, sea_raft.SEARAFT, sea_raft.SEARAFTConfig, sea_raft.RULES)
)


def load(name: str, weights: str | Path | Mapping[str, Any] | None = None, **options: Any) -> nnx.Module:
    """A teacher with its pretrained weights; `options`, among them the fields of its config, as `presets.load`.

    Raises ValueError (unknown name or setting; a file that does not fit, with the first keys that differ and the preset
    that it would fit) and FileNotFoundError (says which file, where it is found, and what to do with it).
    """
    return presets.load(_presets(), name, weights, **options)


def load_upstream(name: str, module: nnx.Module, weights: str | Path | Mapping[str, Any], **options: Any) -> Loaded:
    """The abstract `module` of teacher `name` with the weights of upstream's file: `presets.load_upstream`."""
    return presets.load_upstream(_presets(), name, module, weights, **options)


def abstract(name: str, **settings: Any) -> nnx.Module:
    """The teacher with shapes for leaves: its `grid` and `width` without memory. Raises as `load`."""
    return presets.abstract(_presets(), name, **settings)


def files(name: str) -> list[manifests.File]:
    """What third_party/ says of a teacher's files; the first is the one that is asked for."""
    return presets.files(name)


def find_file(name: str, given: str | Path | None) -> Path:
    """The file of a teacher: `presets.find_file`."""
    return presets.find_file(_presets(), name, given)


def _presets() -> presets.Presets:
    return presets.Presets("teacher", TEACHERS, "--config.teacher.weights=FILE, or weights=FILE")
