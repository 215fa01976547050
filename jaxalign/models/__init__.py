"""The students: video diffusion transformers, found by name in one plain dict."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from jaxalign.models import cogvideox, vdit


class Student(NamedTuple):
    """What the rest of the package must know of a model."""

    config: type  # frozen dataclass of its settings
    model: Callable  # model(config, rngs=rngs)
    sharding_rules: list[tuple[str, PartitionSpec]]
    weight_rules: Callable  # weight_rules(config) -> rules for interop.mapping
    presets: dict[str, dict[str, Any]]  # sizes by name, for the config


MODELS = {
    "vdit": Student(vdit.VDiTConfig, vdit.VDiT, vdit.SHARDING_RULES, vdit.weight_rules, vdit.PRESETS),
    "cogvideox": Student(
        cogvideox.CogVideoXConfig,
        cogvideox.CogVideoX,
        cogvideox.SHARDING_RULES,
        cogvideox.weight_rules,
        cogvideox.PRESETS,
    ),
}
