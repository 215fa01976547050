"""VideoREPA's token relation distillation: L1 between the pairwise cosines of student and teacher (methods §2).

python -m jaxalign.main --config configs/trd.py                 # demo: minutes on 2 CPU cores
python -m jaxalign.main --config configs/trd.py:vdit_l --config.data.source=FOLDER --config.codec.weights=FOLDER
python -m jaxalign.main --config configs/trd.py:cogvideox_2b …  # VideoREPA-2B, 5b: with LoRA; see configs/tsa.py
"""

from configs import base


def get_config(scale: str = "demo"):
    # 0.45 is what the authors' published command has for 5B.
    weight = 0.45 if scale == "cogvideox_5b" else 0.5
    return base.get_config(scale, **base.towards_videomae(scale, "trd", method="trd", weight=weight, margin=0.1))
