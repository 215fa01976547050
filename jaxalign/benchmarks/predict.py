"""How long a step would take on a chip: arithmetic on what `lowering` counted and what the chip's maker states.

    compute        = a device's flops / (peak × efficiency)
    memory         = bytes of the arguments, the results and twice the temporaries / memory bandwidth
    communication  = for each collective the slower of the links inside a domain (a node, a slice) and those between
    step           between  max(compute, memory, communication)  and  max(compute, memory) + communication

The efficiency is assumed, not measured: the share of the peak that matrix products and what stands between them reach
where nothing is waited for. Everything held is written and read once at least, so `memory` is a lower bound. Latencies
are left out: with very small pieces a device the truth lies above both bounds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.training.chips import Chip

EFFICIENCY = 0.6


class Prediction(NamedTuple):
    """Seconds of a step on a chip, and whether the step fits its memory."""

    compute: float
    memory: float
    communication: float
    fits: bool

    @property
    def overlapped(self) -> float:
        """Communication hidden behind computation as far as it goes: the lower bound."""
        return max(self.compute, self.memory, self.communication)

    @property
    def exposed(self) -> float:
        """Communication while nothing is computed: the upper bound."""
        return max(self.compute, self.memory) + self.communication


def predict(found: Mapping[str, Any], chip: Chip, *, efficiency: float = EFFICIENCY) -> Prediction:
    """The prediction for what `lowering.lower` found."""
    m = found["memory"]
    new = m["results"] - m["results_in_place"]
    return Prediction(
        compute=found["device_flops"] / (chip.flops * efficiency),
        memory=(m["arguments"] + m["results"] + 2 * m["temporary"]) / chip.memory_rate,
        communication=sum(c["times"] * seconds(c["kind"], c["size"], c["group"], chip) for c in found["communication"]),
        fits=m["arguments"] + m["temporary"] + new <= chip.memory,
    )


def seconds(kind: str, size: int, group: Sequence[int], chip: Chip) -> float:
    """One collective of `size` bytes (hlo.Collective) among these devices, numbered so that domains are contiguous.

    A ring inside a domain sends (n - 1)/n of the bytes over a device's links. Between k domains, of which each has m
    devices of the group, what the others lack comes in over the m devices' shares of the network.
    Raises ValueError where the network between domains would be used and its rate is not known.
    """
    domains = {device // chip.domain for device in group}
    n, k = len(group), len(domains)
    m = n // k
    far = 0.0
    if kind == "collective-permute":
        near, far = (float(size), 0.0) if k == 1 else (0.0, float(size))
    elif kind == "all-to-all":  # every device has other bytes for every other one
        near, far = size * (m - 1) / n, size * (n - m) / n
    else:
        passes = 2 if kind == "all-reduce" else 1
        near = passes * size * (n - 1) / n if m > 1 else 0.0
        far = passes * size * (k - 1) / k / m
    if far and chip.far_rate is None:
        raise ValueError(f"{n} devices are more than one domain of {chip.name} ({chip.domain}): no rate is known")
    return max(near / chip.link_rate, far / chip.far_rate if far else 0.0)
