"""REPA: every projected student token is drawn to its teacher token by cosine similarity (methods §1).

python -m jaxalign.main --config configs/repa.py                # demo: minutes on 2 CPU cores
python -m jaxalign.main --config configs/repa.py:vdit_l --config.data.source=FOLDER --config.codec.weights=FOLDER
python -m jaxalign.main --config configs/repa.py:cogvideox_2b … --config.teacher.weights=dinov2_vitb14_pretrain.pth
"""

from configs import base


def get_config(scale: str = "demo"):
    align, teacher = dict(method="repa", weight=0.5), {}
    if base.is_cogvideox(scale):
        # 30 x 45 patches of 14 pixels, and four frames to one after the first: the student's own 13 x 30 x 45.
        teacher = dict(name="dinov2_b", size=(420, 630))
        align.update(pool_time=4, projector=dict(hidden=2048))
    return base.get_config(scale, align=align, teacher=teacher)
