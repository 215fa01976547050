"""REPA: every projected student token is drawn to its teacher token by cosine similarity (methods §1).

python -m jaxalign.main --config configs/repa.py                # demo: minutes on 2 CPU cores
python -m jaxalign.main --config configs/repa.py:vdit_l --config.data.source=FOLDER --config.codec.weights=FOLDER
"""

from configs import base


def get_config(scale: str = "demo"):
    return base.get_config(scale, align=dict(method="repa", weight=0.5))
