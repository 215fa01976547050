"""Frozen teachers: networks that turn a video into tokens (or flow), found by name in one plain dict.

    teacher = teachers.load("dinov2_b", "dinov2_vitb14_pretrain.pth", size=224)
    tokens = teacher(video)  # [b, t, h, w, 3] in [-1, 1] -> [b, *teacher.grid((t, h, w)), teacher.width]

Weights are upstream's own file, or a folder that `python -m jaxalign.convert` made of it; `third_party/*.toml` says
where a person finds each file, and `python -m jaxalign.convert --list` prints that.
"""

import functools

from jaxalign.interop import presets
from jaxalign.interop.presets import Entry, family
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

# The functions of interop/presets.py, where each is described, for the teachers above.
_PRESETS = presets.Presets("teacher", TEACHERS, "--config.teacher.weights=FILE, or weights=FILE")
load = functools.partial(presets.load, _PRESETS)
load_upstream = functools.partial(presets.load_upstream, _PRESETS)
abstract = functools.partial(presets.abstract, _PRESETS)
find_file = functools.partial(presets.find_file, _PRESETS)
files = presets.files
