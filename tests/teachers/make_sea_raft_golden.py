"""Makes golden/sea_raft.npz and golden/sea_raft_sizes.json from the public SEA-RAFT, which test_sea_raft.py is held to.

    git clone https://github.com/princeton-vl/SEA-RAFT
    python tests/teachers/make_sea_raft_golden.py SEA-RAFT tests/teachers/golden

Needs torch, torchvision and huggingface_hub; made with SEA-RAFT f41d0a7, torch 2.13.0. Weights and frames are drawn by
name from fixed NumPy streams, here and in the test, so the files hold results only, a part of the pixels of each.
"""

import json
import sys
import types
from pathlib import Path

import flow_streams as streams
import numpy as np

# name -> upstream's config, iterations, frames [b, h, w]; the first case's frames are padded at all four sides
CASES = {"s": ("S", 2, (1, 131, 150)), "m": ("M", 1, (1, 128, 128))}
ROWS, COLUMNS = slice(2, None, 9), slice(1, None, 8)  # of the pixels that are stored


def load_raft(checkout: Path):
    """The module core/raft.py of a checkout; its ResNets are not downloaded."""
    import torch
    import torchvision

    sys.path.insert(0, str(checkout / "core"))
    for name in ("resnet18", "resnet34"):
        plain = getattr(torchvision.models, name)
        setattr(torchvision.models, name, lambda weights=None, plain=plain: plain())
    import raft

    def build(size: str):
        config = json.loads((checkout / "config" / "eval" / f"sintel-{size}.json").read_text())
        with torch.no_grad():
            return raft.RAFT(types.SimpleNamespace(**config))

    return build


def make_case(build, name: str) -> dict[str, np.ndarray]:
    """Flow, mixture and negative log likelihood after every iteration, and gradients with respect to the frames."""
    import torch

    size, iterations, (b, h, w) = CASES[name]
    network = build(size)
    # both names of the shortcut's BatchNorm
    streams.fill(network, lambda key: key.replace("downsample.1.", "bn3."))
    first, second = (
        torch.from_numpy(streams.frames(f"{name} {which}", (b, h, w, 3))).permute(0, 3, 1, 2).requires_grad_()
        for which in ("first", "second")
    )
    truth = torch.from_numpy(5 * streams.draw(f"{name} truth", (b, h, w, 2))).permute(0, 3, 1, 2)
    out = network((first + 1) * 127.5, (second + 1) * 127.5, iters=iterations, flow_gt=truth)
    found = {key: torch.stack(out[key]).permute(0, 1, 3, 4, 2) for key in ("flow", "info", "nf")}
    probe = torch.from_numpy(streams.draw(f"{name} probe", (b, h, w, 6)))
    last = torch.cat([found["flow"][-1], found["info"][-1]], dim=-1)
    (last * probe).sum().backward()
    found |= {"grad_first": first.grad.permute(0, 2, 3, 1), "grad_second": second.grad.permute(0, 2, 3, 1)}
    print(name, {key: float(value.detach().abs().max()) for key, value in found.items()})
    return {f"{name} {key}": value.detach().numpy()[..., ROWS, COLUMNS, :] for key, value in found.items()}


def main(checkout: str, folder: str) -> None:
    build, folder = load_raft(Path(checkout)), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {key: value for name in CASES for key, value in make_case(build, name).items()}
    np.savez_compressed(folder / "sea_raft.npz", **arrays)
    sizes = {f"sea_raft_{size.lower()}": streams.sizes(build(size)) for size in "SML"}
    (folder / "sea_raft_sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
