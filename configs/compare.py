"""The table that anybody can make: every method at equal steps, clips and seeds (launch/sweep.py, evaluate compare).

python -m jaxalign.main --config configs/compare.py:motion_head,gravity --workdir runs/compare-heads/gravity,size=1
python -m jaxalign.main --config configs/compare.py:motion_head,real --workdir runs/compare-heads/real,size=1
python launch/sweep.py --grid seed=0,1,2 --root runs/compare --jobs 2 \\
    --config=configs/compare.py:{baseline,repa,trd,tsa,m_tsa,moalign,align4gen},{gravity,real}
python -m jaxalign.evaluate compare --root runs/compare

What stands after the colon is METHOD,DATA[,size=N][,heads=FOLDER]. DATA: gravity (textured shapes that fall and
bounce, each told by its colour; the law of every clip is known) or real (the demo's clips). `size` is the one number: 1
is two CPU cores (`--jobs 2`: a run on each), 4 one GPU for about an hour by its FLOPs; it sets pixels, width, depth and
batch. The first two commands train MoAlign's motion heads, where `heads` (runs/compare-heads) expects them; without
MoAlign leave them and it out. Fewer or more seeds are `--grid seed=`; the same commands go on where they stopped.

A method's weight is that of its own config at the scale demo; the teacher is EfficientNet-Lite0 on the student's grid
for all, the block is the same, and so are, seed by seed, the order of the clips, their times and their noise.
"""

from configs import align4gen, base, moalign, moalign_subspace, repa, trd, tsa

DATA = {
    "gravity": dict(steps=2_400, data=dict(source="synthetic:gravity", stride=2, hflip=False)),
    "real": dict(steps=1_000, data=dict(source="demo", stride=2)),
}
METHODS = {
    "baseline": lambda: base.get_config("demo"),
    "repa": lambda: repa.get_config("demo"),
    "trd": lambda: trd.get_config("demo"),
    "tsa": lambda: _changed(tsa.get_config("demo"), align=dict(method="tsa")),
    "m_tsa": lambda: tsa.get_config("demo"),
    "moalign": lambda: moalign.get_config("demo"),
    "align4gen": lambda: base.get_config("demo", align=align4gen.get_config("demo").align.to_dict()),
    "motion_head": lambda: moalign_subspace.get_config("demo"),
}


def layer(size: int) -> dict:
    """What the one number decides: patches stay 4 pixels, so there are more of them; the rate falls as width grows."""
    width = 96 * size
    return dict(
        batch_size=4 * size,
        precision="bf16" if size >= 3 else "fp32",
        model=dict(preset="demo", patch_size=4, width=width, depth=2 + 2 * size, num_heads=width // 32),
        data=dict(num_frames=8, height=16 * size, width=16 * size, workers=0 if size < 2 else 8),
        teacher=dict(name="efficientnet_lite0", size=32 * size, stride=8),
        # A spatial block in the middle; heads about as wide as the student, as the papers' are.
        align=dict(depth=2 * ((1 + size) // 2), projector=dict(hidden=width)),
        optimizer=dict(learning_rate=2e-3 / size, schedule="cosine", warmup_steps=50, b2=0.99),
        ema_decay=0.99,
        sample=dict(steps=25, count=4),
        # Nothing is looked at on the way: `evaluate compare` does it, alike for all.
        checkpoint=dict(every=10_000_000, keep=1),
        log_every=100,
        sample_every=10_000_000,
        eval_every=10_000_000,
    )


def get_config(point: str = "baseline,gravity"):
    method, data, size, heads = _read(point)
    config = METHODS[method]()
    with config.unlocked():  # sizes between the presets, as in configs/scaling.py
        config.model.update(width=0, depth=0, num_heads=0)
    parts = layer(size) | DATA[data] | dict(data=layer(size)["data"] | DATA[data]["data"])
    if method == "motion_head":  # how it is trained is its own config's
        parts = {name: parts[name] for name in ("precision", "data", "teacher", "sample_every", "eval_every")}
    config.update(parts)
    config.scale = f"{method},{data},size={size}"
    if method == "align4gen":  # a coarser stage of the same network, as the paper's two differ in what they are about
        config.teacher.beside = dict(coarse=dict(name="efficientnet_lite0", size=config.teacher.size, stride=16))
    if method == "moalign":
        config.teacher.motion_head = f"{heads}/{data},size={size}/motion_head"
    if method == "motion_head" and data == "gravity":
        config.motion.flow.name = "exact"
    elif method == "motion_head":  # on the host each flow costs more than a step of this small a head
        config.motion.flow.name, config.steps, config.batch_size = "dis", config.steps // 2, 4
    return config


def _read(point: str) -> tuple[str, str, int, str]:
    """(method, data, size, heads) of what stands after the colon; ValueError says what to write."""
    names = [part for part in point.split(",") if "=" not in part]
    options = dict(part.split("=", 1) for part in point.split(",") if "=" in part)
    method, data = [*names, "gravity"][:2] if names else ("", "")
    if len(names) > 2 or method not in METHODS or data not in DATA or set(options) - {"size", "heads"}:
        raise ValueError(
            "after the colon write METHOD,DATA[,size=N][,heads=FOLDER] with METHOD one of "
            f"{', '.join(METHODS)} and DATA one of {', '.join(DATA)}"
        )
    size = options.get("size", "1")
    if not size.isdecimal() or not 1 <= int(size) <= 16:
        raise ValueError(f"size={size}: write a whole number from 1 (two cores) to 16")
    return method, data, int(size), options.get("heads", "runs/compare-heads")


def _changed(config, **sections):
    config.update(sections)
    return config
