"""Codecs, video <-> latents: `encode(video, key)`, `decode(latents)`, `latent_shape((t, h, w))`."""

import difflib
from pathlib import Path

from jaxalign.codecs.pixels import Pixels

CODECS = {"pixels": Pixels}


def load(name: str, weights: str | Path | None = None) -> Pixels:
    """The codec called `name`, with the weights in the file or folder `weights` where it has any.

    Raises ValueError for an unknown name, and for weights given to a codec without any.
    """
    if name not in CODECS:
        close = difflib.get_close_matches(name, CODECS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"write one of {sorted(CODECS)}"
        raise ValueError(f"config.codec: {name!r} is not known; {hint}")
    if weights is not None:
        raise ValueError(f"config.codec: {name!r} has no weights; leave out {str(weights)!r}")
    return CODECS[name]()
