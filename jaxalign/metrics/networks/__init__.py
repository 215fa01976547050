"""Frozen networks whose features the scores compare, found by name in one plain dict.

    network = networks.load("i3d", "i3d_torchscript.pt")
    features = network(video)  # [b, t, h, w, 3] in [-1, 1] -> [b, network.width]; image networks take [b, h, w, 3]

Weights are upstream's own file, or a folder that `python -m jaxalign.convert` made of it; `third_party/*.toml` says
where a person finds each file, and `python -m jaxalign.convert --list` prints that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from jaxalign.interop import manifests, presets
from jaxalign.interop.presets import Entry, Loaded, family
from jaxalign.metrics.networks import c3d, clip, i3d, inception

NETWORKS: dict[str, Entry] = (
    family(i3d.PRESETS, i3d.I3D, i3d.I3DConfig, i3d.RULES)
    | family(c3d.PRESETS, c3d.C3D, c3d.C3DConfig, c3d.RULES)
    | family(inception.PRESETS, inception.Inception, inception.InceptionConfig, inception.RULES)
    # image and text towers: metrics/clip_scores.py
    | family(clip.PRESETS, clip.CLIP, clip.CLIPConfig, clip.RULES)
)


def load(name: str, weights: str | Path | Mapping[str, Any] | None = None, **options: Any) -> nnx.Module:
    """A network with its pretrained weights; `options`, among them the fields of its config, as `presets.load`.

    Raises ValueError (unknown name or setting; a file that does not fit, with the first keys that differ and the preset
    that it would fit) and FileNotFoundError (says which file, where it is found, and what to do with it).
    """
    return presets.load(_presets(), name, weights, **options)


def load_upstream(name: str, module: nnx.Module, weights: str | Path | Mapping[str, Any], **options: Any) -> Loaded:
    """The abstract `module` of network `name` with the weights of upstream's file: `presets.load_upstream`."""
    return presets.load_upstream(_presets(), name, module, weights, **options)


def abstract(name: str, **settings: Any) -> nnx.Module:
    """The network with shapes for leaves: its `width` without memory. Raises as `load`."""
    return presets.abstract(_presets(), name, **settings)


def files(name: str) -> list[manifests.File]:
    """What third_party/ says of a network's files; the first is the one that is asked for."""
    return presets.files(name)


def find_file(name: str, given: str | Path | None) -> Path:
    """The file of a network: `presets.find_file`."""
    return presets.find_file(_presets(), name, given)


def _presets() -> presets.Presets:
    return presets.Presets("feature network", NETWORKS)
