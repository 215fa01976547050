"""VideoREPA's token relation distillation: L1 between the pairwise cosines of student and teacher (methods §2).

python -m jaxalign.main --config configs/trd.py                 # demo: minutes on 2 CPU cores
python -m jaxalign.main --config configs/trd.py:vdit_l --config.data.source=FOLDER --config.codec.weights=FOLDER
"""

from configs import base


def get_config(scale: str = "demo"):
    return base.get_config(scale, align=dict(method="trd", weight=0.5, margin=0.1))
