"""What accelerators can do at most, by their makers' published figures: for MFU, and for plans made without them."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Rates are peaks in one direction, a second; sizes are in bytes."""

    name: str
    device_kind: str  # regex for jax.Device.device_kind
    flops: float  # bf16 products accumulated in fp32, dense
    memory: float
    memory_rate: float
    link_rate: float  # to chips of its own domain, all its links together
    domain: int  # chips that such links join
    far_rate: float | None  # to chips of other domains: a chip's share of the network; None: the maker does not say


# NVIDIA's figures as commonly quoted, not compared with its data sheets. H100 SXM: 1,979 TFLOP/s of bf16 with sparsity
# are 989 dense; 80 GB at 3.35 TB/s; NVLink 900 GB/s in both directions together. H200: 141 GB at 4.8 TB/s.
# DGX H100: 8 GPUs on NVSwitch and a 400 Gb/s network adapter for each.
# The PCIe cards are slower and have other device kinds. Google's figures, looked up:
# docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB at 2,765 GB/s, links of 1,200 GB/s both ways in a 3-D torus of
# at most 6,144 chips; .../v6e: 918 TFLOP/s, 32 GB at 1,638 GB/s, links of 800 GB/s both ways in a 2-D torus of 256.
# The rate of a torus is that of all its links together, as when an axis of the mesh lies along all its dimensions.
# Between slices of v5p, same page: 50 Gb/s a chip.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h100", r"H100 80GB HBM3", 989e12, 80e9, 3.35e12, 450e9, 8, 50e9),
        Chip("h200", r"H200$", 989e12, 141e9, 4.8e12, 450e9, 8, 50e9),
        Chip("v5p", r"TPU v5(p|$)", 459e12, 95e9, 2.765e12, 600e9, 6144, 6.25e9),
        Chip("v6e", r"TPU v6( lite|e)", 918e12, 32e9, 1.638e12, 400e9, 256, None),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that is not in the table."""
    return next((chip for chip in CHIPS.values() if re.search(chip.device_kind, device_kind)), None)
