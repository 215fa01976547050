"""Makes golden/raft.npz and golden/raft_sizes.json from the original RAFT, which test_raft.py is held to.

    git clone https://github.com/princeton-vl/RAFT
    python tests/teachers/make_raft_golden.py RAFT tests/teachers/golden

Needs torch and scipy; made with RAFT 2888e15, torch 2.13.0. Weights and frames are drawn by name from fixed NumPy
streams, here and in the test, so the files hold results only, a part of the pixels of each. torchvision's version,
which the test runs itself, covers the network; these cover the original's names, and frames that have to be padded.
"""

import argparse
import json
import sys
from pathlib import Path

import flow_streams as streams
import numpy as np

ITERATIONS = 2
SHAPE = (1, 132, 141)  # frames [b, h, w]; upstream's InputPadder brings them to 136x144
ROWS, COLUMNS = slice(2, None, 9), slice(1, None, 8)  # of the pixels that are stored


def make_case(raft, padder, variant: str) -> tuple[np.ndarray, dict]:
    """Flow after every iteration and the sizes of the state dict, as it is saved by upstream's train.py."""
    import torch

    network = raft.RAFT(argparse.Namespace(small=variant == "small", mixed_precision=False))
    saved = torch.nn.DataParallel(network)
    streams.fill(saved, lambda key: key.replace("downsample.1.", "norm3."))
    first, second = (
        (torch.from_numpy(streams.frames(f"{variant} {which}", (*SHAPE, 3))).permute(0, 3, 1, 2) + 1) * 127.5
        for which in ("first", "second")
    )
    pad = padder(first.shape)
    with torch.no_grad():
        flows = [pad.unpad(flow) for flow in network(*pad.pad(first, second), iters=ITERATIONS)]
    found = torch.stack(flows).permute(0, 1, 3, 4, 2).numpy()
    print(variant, [float(np.abs(flow).max()) for flow in found])
    return found[..., ROWS, COLUMNS, :], streams.sizes(saved)


def main(checkout: str, folder: str) -> None:
    sys.path.insert(0, str(Path(checkout) / "core"))
    import raft
    from utils.utils import InputPadder

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cases = {variant: make_case(raft, InputPadder, variant) for variant in ("small", "large")}
    np.savez_compressed(folder / "raft.npz", **{variant: flows for variant, (flows, _) in cases.items()})
    sizes = {f"raft_{variant}": size for variant, (_, size) in cases.items()}
    (folder / "raft_sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
