"""How the loss falls with compute: plain V-DiTs from S to XL at several numbers of tokens (launch/sweep.py, evaluate).

python launch/sweep.py --config configs/scaling.py --grid model.width=64,96,128,192 --grid seed=0,1,2 --root runs/ladder
python -m jaxalign.evaluate scaling --root runs/ladder          # the demo's ladder: ten minutes on 2 CPU cores

python launch/sweep.py --config configs/scaling.py:s_1024 --config configs/scaling.py:b_1024 … --root runs/vdit \\
    --run slurm --config.data.source=FOLDER --config.codec.weights=FOLDER

A scale is SIZE_TOKENS. SIZE: s, b, l, xl on Align4Gen's clips (16 frames of 256², latents of 32²), or demo on synthetic
clips (4 frames of 32², pixels). TOKENS: of a clip, so the patch size; clips and what is predicted stay the same, and
losses can be compared, as in DiT's own ladder (Peebles & Xie 2023, figure 8). Any size between the presets is
--config.model.width=…, a multiple of the size of a head, and --config.model.depth=… A width below the numbers that a
token holds (demo_256: 48) is a bottleneck of its own: its loss lies high above the others' line (measured at 32).
"""

from configs import base
from jaxalign.models.vdit import PRESETS

# The rate is constant: every evaluation on the way is then a run of its own that ended there, seen through the average
# of the weights (Hägele et al. 2024), where a cosine would give one point a run.
_LADDER = dict(optimizer=dict(schedule="constant"))
_LATENTS = dict(steps=200_000, eval_every=2_000, optimizer=dict(warmup_steps=1_000))
_DEMO = dict(
    steps=300,
    batch_size=4,
    model=dict(preset="demo"),
    optimizer=dict(warmup_steps=20),
    data=dict(source="synthetic", num_frames=4, height=32, width=32, stride=2),
    ema_decay=0.99,
    sample=dict(steps=10, count=2),
    sample_every=10_000,
    eval_every=20,
)
# SIZE -> (scale of base.py, preset, tokens of a clip -> patch size)
_DEMO_TOKENS, _TOKENS = {256: 4, 1024: 2}, {256: 8, 1024: 4, 4096: 2}
_SIZES = {"demo": ("demo", "demo", _DEMO_TOKENS)} | {n: ("vdit_xl", n.upper(), _TOKENS) for n in ("s", "b", "l", "xl")}
SCALES = {f"{size}_{n}": (size, patch) for size, (_, _, patches) in _SIZES.items() for n, patch in patches.items()}


def get_config(scale: str = "demo"):
    if (found := SCALES.get("demo_256" if scale == "demo" else scale)) is None:
        raise ValueError(f"scale {scale!r}: no such scale; write one of {', '.join(SCALES)} after the colon")
    size, patch_size = found
    of_base, preset, _ = _SIZES[size]
    config = base.get_config(of_base)
    tuned_at, tuned = PRESETS[config.model.preset]["width"], config.optimizer.learning_rate
    for layer in (_LADDER, _DEMO if size == "demo" else _LATENTS):
        config.update(layer)
    config.scale = scale
    config.model.update(preset=preset, patch_size=patch_size)
    sizes = PRESETS[preset]
    # References: what depends on width or depth follows the one that the command line gives.
    with config.unlocked():
        config.model.width, config.model.depth = sizes["width"], 4 if size == "demo" else sizes["depth"]
        width, depth = config.model.get_ref("width"), config.model.get_ref("depth")
        config.model.num_heads = width // (sizes["width"] // sizes["num_heads"])
        # Adam's rate for hidden matrices goes with 1 / width (Yang et al. 2022, Tensor Programs V, table 3). They hold
        # nearly all parameters, so the one rate of a run follows them from base.py's: 1e-3 at 128, 1e-4 at XL's 1152.
        del config.optimizer.learning_rate, config.align.depth
        config.optimizer.learning_rate = tuned * tuned_at / width
        config.align.depth = depth // 2  # where something is aligned: in the middle, near the paper's 12 of XL's 28
    return config
