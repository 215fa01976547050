"""Makes golden/latte_*.npz and golden/latte_sizes.json from the public PyTorch Latte, which test_vdit.py is held to.

    git clone https://github.com/Vchitect/Latte && python tests/models/make_latte_golden.py Latte tests/models/golden

Needs torch, timm and einops; made with Latte b27c24a, torch 2.13.0, timm 1.0.31. Weights, inputs and probes are drawn
by name from fixed NumPy streams (`draw`), here and in the test, so the files hold results only. Every weight is
non-zero, those that Latte initialises with zeros too.
"""

import hashlib
import importlib.util
import json
import sys
import zlib
from pathlib import Path

import numpy as np

# name -> settings of the config, batch size is 2
CASES = {
    "unconditional": dict(
        input_size=(8, 8),
        num_frames=3,
        patch_size=2,
        in_channels=4,
        width=32,
        depth=4,
        num_heads=4,
        learn_sigma=True,
    ),
    "class_conditional": dict(
        input_size=(12, 12),
        num_frames=2,
        patch_size=4,
        in_channels=3,
        width=24,
        depth=6,
        num_heads=3,
        num_classes=5,
        learn_sigma=False,
    ),
}
TIMESTEPS = (3.25, 871.0)
LABELS = (5, 2)  # the first is the null label
WHOLE_GRADIENTS = (  # of these leaves the gradient is stored as it is, of all others its norm and one projection
    "x_embedder.proj.weight",
    "t_embedder.mlp.2.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.1.attn.proj.weight",
    "blocks.3.mlp.fc1.bias",
    "blocks.2.adaLN_modulation.1.bias",
    "final_layer.linear.weight",
)
# Latte-L/2 and XL/2 as trained on 16 frames of 32x32x4 latents: unconditional, and with UCF-101's labels.
SIZES = {
    f"{name}{suffix}": dict(name=name, num_classes=num_classes)
    for name in ("L", "XL")
    for suffix, num_classes in (("", 0), ("_ucf101", 101))
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array that depends on nothing but its name and shape."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight in PyTorch's layout: 0.8 / sqrt(fan in) for matrices, 0.3 for biases and labels."""
    matrix = len(shape) > 1 and "embedding_table" not in name
    return draw(name, shape) * np.float32(0.8 / np.sqrt(np.prod(shape[1:])) if matrix else 0.3)


def key_digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """Digest of all names with their shapes."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_latte(checkout: Path):
    """The module models/latte.py of a checkout, without its package."""
    spec = importlib.util.spec_from_file_location("latte", checkout / "models" / "latte.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_case(latte, name: str, case: dict) -> dict[str, np.ndarray]:
    """Output, tapped tokens and gradients of Latte for one case, channels last where they are videos or tokens."""
    import torch

    case = dict(case)
    (size, _), num_classes = case.pop("input_size"), case.get("num_classes", 0)
    network = latte.Latte(
        input_size=size,
        hidden_size=case["width"],
        extras=2 if num_classes else 1,
        **{key: case[key] for key in case if key != "width"},
    ).eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(draw_weight(key, tuple(parameter.shape))))
    frames, channels = case["num_frames"], case["in_channels"]
    video = draw("video", (2, frames, size, size, channels))
    x = torch.from_numpy(video).permute(0, 1, 4, 2, 3).requires_grad_()
    blocks = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: blocks.append(output.detach()))
    labels = torch.tensor(LABELS) if num_classes else None
    out = network(x, torch.tensor(TIMESTEPS), labels).permute(0, 1, 3, 4, 2)
    (out * torch.from_numpy(draw("probe", tuple(out.shape)))).sum().backward()

    grid, width = size // case["patch_size"], case["width"]
    found = {
        "out": out.detach().numpy(),
        "grad_input": x.grad.permute(0, 1, 3, 4, 2).numpy(),
        "pos_embed": network.pos_embed.detach().numpy(),
        "temp_embed": network.temp_embed.detach().numpy(),
    }
    for index, tokens in enumerate(blocks):
        tokens = tokens.reshape(2, -1, *tokens.shape[1:])  # [b, t, n, d], after a temporal block [b, n, t, d]
        tokens = tokens if index % 2 == 0 else tokens.transpose(1, 2)
        found[f"tap_{index}"] = tokens.reshape(2, frames, grid, grid, width)[..., ::3].numpy()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad.numpy()
            projection = np.vdot(gradient.astype(np.float64), draw("projection " + key, gradient.shape))
            found[f"grad_of {key}"] = np.array([np.linalg.norm(gradient), projection])
            if key in WHOLE_GRADIENTS:
                found[f"grad {key}"] = gradient
    return found


def make_sizes(latte) -> dict[str, dict]:
    """Parameter count (position tables not counted) and digest of the state dict's names and shapes at real sizes."""
    import torch

    latte.Latte.initialize_weights = lambda self: None  # needs arrays with content, and sizes need none
    found = {}
    for name, size in SIZES.items():
        build = {"L": latte.Latte_L_2, "XL": latte.Latte_XL_2}[size["name"]]
        with torch.device("meta"):
            network = build(num_classes=size["num_classes"] or 1, extras=2 if size["num_classes"] else 1)
        state = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        count = sum(p.numel() for p in network.parameters() if p.requires_grad)
        found[name] = dict(parameters=count, keys=len(state), digest=key_digest(state))
    return found


def main(checkout: str, folder: str) -> None:
    latte, folder = load_latte(Path(checkout)), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        np.savez_compressed(folder / f"latte_{name}.npz", **make_case(latte, name, case))
    (folder / "latte_sizes.json").write_text(json.dumps(make_sizes(latte), indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
