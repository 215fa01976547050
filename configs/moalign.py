"""MoAlign: token relations follow those of a motion subspace, near frames more than far ones (methods §4).

python -m jaxalign.main --config configs/moalign_subspace.py --workdir runs/subspace    # first: stage 1
python -m jaxalign.main --config configs/moalign.py --config.teacher.motion_head=runs/subspace/motion_head   # demo
python -m jaxalign.main --config configs/moalign.py:vdit_l --config.data.source=FOLDER --config.codec.weights=FOLDER \\
    --config.teacher.motion_head=RUN/motion_head                # of moalign_subspace.py:vdit
python -m jaxalign.main --config configs/moalign.py:cogvideox_2b … --config.teacher.weights=FILE \\
    --config.teacher.motion_head=RUN/motion_head                # of moalign_subspace.py:videomae2_b; see configs/tsa.py
The paper's run: 4000 steps of 32 clips; VideoPhy2 joint 24.9 (fine-tuned alone 22.8, VideoREPA 23.0). Its ablation
without the motion subspace: --config.teacher.motion_head=None
"""

from configs import base, moalign_subspace


def get_config(scale: str = "demo"):
    sections = base.towards_videomae(scale, "trd", method="moalign", weight=0.5, tau=10.0)
    teacher = sections.get("teacher", moalign_subspace.IMAGES)
    return base.get_config(scale, **sections | dict(teacher=teacher | dict(motion_head="")))
