"""MoAlign's stage 1: the part of a video teacher's tokens that tells how things move (methods §4).

python -m jaxalign.main --config configs/moalign_subspace.py    # demo: synthetic clips with exact flow, 2 CPU cores
python -m jaxalign.main --config configs/moalign_subspace.py:real   # demo on the real clips, flow by OpenCV's DIS
python -m jaxalign.main --config configs/moalign_subspace.py:videomae2_b --config.data.source=VIDEOS \\
    --config.teacher.weights=vit_b_k710_dl_from_giant.pth --config.motion.flow.weights=RAFT
python -m jaxalign.main --config configs/moalign_subspace.py:vdit --config.data.source=VIDEOS \\
    --config.motion.flow.weights=RAFT                           # the head for configs/moalign.py:vdit_l
python -m jaxalign.evaluate motion --workdir RUN                # is it about motion, and not about colour?

A finished run leaves RUN/motion_head, which configs/moalign.py takes. The paper's: 50K steps of 128 clips.
"""

from configs import base

# An image teacher, since no video teacher comes with the package: its tokens know one frame each, so all motion has to
# be found by the subspace's own first kernel. It shows the way and is no match for VideoMAE V2.
IMAGES = dict(name="efficientnet_lite0", size=128, stride=8)
# What such a teacher asks (measured, benchmarks/RESULTS.md): a kernel of 3 x 3 positions, for one position's tokens
# tell hardly any direction, and a decoder that is one matrix and counts in a typical flow, so that flow is learnt fast
# and nowhere but in the subspace; tokens of unit variance add a little. Video teachers keep configs/base.py's defaults.
OF_IMAGES = dict(kernel=3, norm=True, decoder=0, unit=0.02)
# Most of the demo's pictures stand still, so the median of flow, which L1 seeks, is zero; `smooth` squares errors
# below this fraction of the frame.
DEMO = OF_IMAGES | dict(hidden=128, smooth=0.05)
SCALES = {
    "demo": dict(
        steps=600,
        batch_size=8,
        data=dict(source="synthetic", num_frames=8, height=64, width=64, stride=2, hflip=False),
        teacher=IMAGES,
        motion=DEMO,
        optimizer=dict(learning_rate=3e-3),
    ),
    "videomae2_b": dict(
        steps=50_000,
        batch_size=128,
        precision="bf16",
        ema_decay=0.9999,
        data=dict(source="", num_frames=49, height=480, width=720, stride=0, short="pad", workers=8),
        teacher=dict(name="videomaev2_b", size=(160, 240), drop_first=True),
        motion=dict(flow=dict(name="raft_large")),
        # AdamW as PyTorch has it when nothing but the rate is said, as here [O].
        optimizer=dict(learning_rate=1e-4, schedule="constant", weight_decay=0.01),
        checkpoint=dict(every=1_000),
        log_every=100,
        sample_every=5_000,
        eval_every=1_000,
    ),
}
SCALES["real"] = SCALES["demo"] | dict(
    data=dict(source="demo", num_frames=8, height=64, width=64, stride=2),
    motion=DEMO | dict(flow=dict(name="dis")),
)
# On the clips of configs/moalign.py:vdit_l and :vdit_xl.
SCALES["vdit"] = SCALES["videomae2_b"] | dict(
    data=dict(source="", num_frames=16, height=256, width=256, stride=3, workers=8),
    teacher=IMAGES,
    motion=SCALES["videomae2_b"]["motion"] | OF_IMAGES,
)


def get_config(scale: str = "demo"):
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: no such scale; write one of {', '.join(SCALES)} after the colon")
    config = base.get_config("demo", task="motion_subspace", **SCALES[scale])
    config.scale = scale
    return config
