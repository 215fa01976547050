"""From a config's data section to the arguments and shapes that the data functions take."""

import ml_collections
import numpy as np


def clip_settings(config: ml_collections.ConfigDict) -> dict[str, int]:
    """What a clip looks like, as the data functions take it."""
    return {name: config.data[name] for name in ("num_frames", "height", "width", "stride")}


def split_batch(batch: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """A batch in parts of `size` rows; the last part takes rows of the first again, so that all shapes are equal."""
    count = len(batch["video"])
    parts = [np.arange(k, k + size) % count for k in range(0, count, size)]
    return [{name: values[rows] for name, values in batch.items()} for rows in parts]
