"""Align4Gen: each projected token is drawn to DINOv2's and SAM 2.1's, normalised and side by side (methods §5).

python -m jaxalign.main --config configs/align4gen.py           # demo: real clips, minutes on 2 CPU cores
python -m jaxalign.main --config configs/align4gen.py:ucf101_l --config.data.source=UCF-101 \\
    --config.codec.weights=FOLDER --config.teacher.weights=dinov2_vitb14_pretrain.pth \\
    --config.teacher.beside.sam21_hiera_bplus.weights=sam2.1_hiera_base_plus.pt

| scale | clips | run | FVD of the paper (VideoMAE features), without and with |
|---|---|---|---|
| ucf101_l | UCF-101, 101 classes, train lists | 1M steps of 24 | 221.63, 187.46 (400K: 262.77, 206.73) |
| ucf101_xl | likewise | 200K steps of 16 | ddpm 379.90, 298.76; flow 369.30, 295.63 |
| sky_l | SkyTimelapse, sky_train | 200K steps of 24 | 200.51, 196.01 |
| ffs_l | FaceForensics, train | 200K steps of 24 | 45.77, 39.86 |

16 frames of 256x256, every third of the video, as latents of Stable Diffusion's VAE (codec.weights: its folder, as
diffusers has it). UCF-101 lies as it is published, with ucfTrainTestlist in it or beside it (--config.data.split=2: the
second lists); SkyTimelapse as sky_train/ and sky_test/, FaceForensics as train/ and test/, folders of frames or videos.
The paper measures UCF-101 on its test split, the other two on what they were trained on:

python -m jaxalign.evaluate fvd --workdir RUN --network videomaev2_g --weights vit_g_hybrid_pt_1200e_ssv2_ft.pth
python -m jaxalign.evaluate fvd … --split=train                 # sky_l, ffs_l
python -m jaxalign.evaluate fvd … --network i3d --weights i3d_torchscript.pt     # its table 7 alone: 180.06, 154.21

`python -m jaxalign.precompute` with the same config stores what is frozen once: latents and tokens. SAM 2.1's tokens of
1024 pixels are 33 MB a clip in bf16; `--what=latents,video` leaves the teachers in the run.

Every ablation is one value:

    teachers          align4gen.py:ucf101_xl,teachers=dinov2_b      | sam21_hiera_bplus | videomae_v1_b | any + any
    one MLP each      --config.align.fusion=heads                   the paper's 2-MLP: 307.63 beside 295.63,
                                                                    both with --config.objective=flow
    depth             --config.align.depth=8                        0-based: 12 is the spatial block of the seventh pair
    temporal tap      --config.align.depth=13                       the temporal block of that pair
    γ                 --config.align.weight=0.5                     0: no alignment at all
    objective         --config.objective=flow                       or ddpm, which learns the variance too
    SAM's pixels      --config.teacher.beside.sam21_hiera_bplus.size=256     a sixteenth of the work, no resize

After `teachers=` stand names of `python -m jaxalign.convert --list`, joined by +. The first is config.teacher, the
others config.teacher.beside.NAME, where weights and settings are given. Of the paper's teachers DUSt3R, SD3 and
InternVL are not there.
"""

import difflib

from configs import base
from jaxalign.teachers import TEACHERS

PAPER = ("dinov2_b", "sam21_hiera_bplus")
# What brings a teacher of 256x256x16 near the student's 16 x 16 tokens a frame; tokens on another grid are resized, and
# those of two frames (VideoMAE, V-JEPA 2) are spread over both [O]. SAM 2.1 sees the pixels that it was trained on [O].
SETTINGS = {
    "dinov2": dict(size=224),
    "sam21": dict(size=1024),
    "videomae": dict(size=224),
    "vjepa2": dict(size=256),
}
# One network, and two that differ as the paper's do: an early stage, which is about edges and textures, and the last
# one, which is about what is there and hardly about where (its spectrum is lower: `evaluate teachers`).
DEMO = [dict(name="efficientnet_lite0", size=128, stride=8), dict(name="efficientnet_lite0", size=256, stride=32)]

_SMALL_SETS = dict(steps=200_000, optimizer=dict(grad_clip_from=20_000))
_UCF101 = dict(model=dict(num_classes=101, class_dropout=0.1))
# scale -> (scale of base.py, what differs)
SCALES = {
    "demo": ("demo", dict(objective="flow")),
    "ucf101_l": ("vdit_l", _UCF101),
    "ucf101_xl": ("vdit_xl", _UCF101),
    "sky_l": ("vdit_l", _SMALL_SETS | dict(data=dict(hflip=False))),
    "ffs_l": ("vdit_l", _SMALL_SETS),
}


def get_config(point: str = "demo"):
    scale, names = _read(point)
    of_base, layer = SCALES[scale]
    # γ is stated for text-to-video only [O].
    config = base.get_config(of_base, align=dict(method="align4gen", weight=0.5, resize=True, fusion="concat"))
    if scale != "demo":
        config.update(objective="ddpm", learn_sigma=True)
    config.update(layer)
    config.scale = scale
    first, *others = DEMO if scale == "demo" and not names else [_teacher(name) for name in names or PAPER]
    config.teacher.update(first)
    for other in others:
        section = base.get_config().teacher  # with a place for every setting, so that a command line may give it
        with section.unlocked():
            del section.beside
        section.update(other)
        config.teacher.beside[other["name"]] = section
    return config


def _teacher(name: str) -> dict:
    """The section of a teacher, by its name."""
    return dict(name=name, **next((s for family, s in SETTINGS.items() if name.startswith(family)), {}))


def _read(point: str) -> tuple[str, list[str]]:
    """(scale, teachers; none if none are named) of what stands after the colon. ValueError says what to write."""
    scale, *options = point.split(",")
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: no such scale; write one of {', '.join(SCALES)} after the colon")
    names: list[str] = []
    for option in options:
        key, _, value = option.partition("=")
        if key != "teachers" or not value:
            raise ValueError(
                f"{option!r}: after the scale stands teachers=NAME or teachers=NAME+NAME; others are fields"
            )
        names = value.split("+")
    for name in names:
        if name not in TEACHERS:
            near = difflib.get_close_matches(name, TEACHERS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TEACHERS)}"
            raise ValueError(f"no teacher {name!r}; {hint}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"teacher {twice[0]} is there twice")
    return scale, names
