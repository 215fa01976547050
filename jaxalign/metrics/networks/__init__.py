"""Frozen networks whose features the scores compare, found by name in one plain dict.

    network = networks.load("i3d", "i3d_torchscript.pt")
    features = network(video)  # [b, t, h, w, 3] in [-1, 1] -> [b, network.width]; image networks take [b, h, w, 3]

They compute in the precision of their caller: scores ask them through metrics/features.py, which takes the full one.

Weights are upstream's own file, or a folder that `python -m jaxalign.convert` made of it; `third_party/*.toml` says
where a person finds each file, and `python -m jaxalign.convert --list` prints that.
"""

import functools

from jaxalign.interop import presets
from jaxalign.interop.presets import Entry, family
from jaxalign.metrics.networks import c3d, clip, i3d, inception

NETWORKS: dict[str, Entry] = (
    family(i3d.PRESETS, i3d.I3D, i3d.I3DConfig, i3d.RULES)
    | family(c3d.PRESETS, c3d.C3D, c3d.C3DConfig, c3d.RULES)
    | family(inception.PRESETS, inception.Inception, inception.InceptionConfig, inception.RULES)
    # image and text towers: metrics/clip_scores.py
    | family(clip.PRESETS, clip.CLIP, clip.CLIPConfig, clip.RULES)
)

# The functions of interop/presets.py, where each is described, for the networks above.
_PRESETS = presets.Presets("feature network", NETWORKS)
load = functools.partial(presets.load, _PRESETS)
load_upstream = functools.partial(presets.load_upstream, _PRESETS)
abstract = functools.partial(presets.abstract, _PRESETS)
find_file = functools.partial(presets.find_file, _PRESETS)
files = presets.files
