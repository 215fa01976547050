"""Plain denoising, no alignment: the run that every other is compared with.

python -m jaxalign.main --config configs/baseline.py            # demo: minutes on 2 CPU cores
python -m jaxalign.main --config configs/baseline.py:vdit_l --config.data.source=FOLDER --config.codec.weights=FOLDER
python -m jaxalign.main --config configs/baseline.py:cogvideox_2b …    # plain fine-tuning; see configs/tsa.py
"""

from configs import base


def get_config(scale: str = "demo"):
    return base.get_config(scale)
