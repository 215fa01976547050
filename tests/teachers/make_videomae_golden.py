"""Makes golden/videomae.npz, golden/vjepa2.npz and golden/videomae_sizes.json from the public PyTorch code.

    git clone https://github.com/OpenGVLab/VideoMAEv2
    git clone https://github.com/aHapBean/VideoREPA
    git clone https://github.com/songweige/content-debiased-fvd
    git clone https://github.com/facebookresearch/vjepa2
    cd tests/teachers && python make_videomae_golden.py FOLDER_OF_THE_CLONES golden

Needs torch, torchvision, timm, einops, tqdm and requests; made with VideoMAEv2 29eab1e, VideoREPA 8002687,
content-debiased-fvd a1e037a, vjepa2 c2963a4, torch 2.13.0, timm 1.0.31. Weights and videos are drawn by name from fixed
NumPy streams (`draw`), here and in the tests, so the files hold results only.
"""

import hashlib
import importlib
import importlib.util
import json
import sys
import zlib
from pathlib import Path

import numpy as np

# One tiny network in the three files' layouts; upstream's MLP is 4 wide.
TINY = dict(width=32, depth=3, num_heads=4, hidden=128, image_size=48, frames=8)
NUM_CLASSES = 7
CLIP = (2, 8, 48, 48, 3)
# VideoREPA's way in: 49 frames, a third of their size. Its positions are those of 16 frames of 224².
REPA = dict(width=32, depth=2, num_heads=2, hidden=128)
REPA_CLIP, REPA_SIZE = (1, 49, 96, 144, 3), (32, 48)
# content-debiased FVD: patch 14, and more frames than the 16 that its positions are made for.
FVD = dict(width=16, depth=1, num_heads=2, hidden=64, patch_size=14)
FVD_CLIP = (1, 20, 40, 60, 3)
# V-JEPA 2 with 26 channels a head, 2 of which are not turned, on frames that are not square.
VJEPA2 = dict(width=52, depth=2, num_heads=2, hidden=208)
VJEPA2_CLIP, VJEPA2_SIZE = (2, 7, 64, 96, 3), (32, 48)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array that depends on nothing but its name and shape."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight in PyTorch's layout: 1 / sqrt(fan in) for matrices, about 1 for norms, 0.3 for biases."""
    if len(shape) > 1:
        return draw(name, shape) / np.float32(np.sqrt(np.prod(shape[1:])))
    return draw(name, shape) * np.float32(0.3) + np.float32("norm" in name and name.endswith("weight"))


def draw_video(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A video of bytes, which content-debiased-fvd wants."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, shape, np.uint8)


def in_range(video: np.ndarray) -> np.ndarray:
    """Bytes as the teachers take them, -1..1."""
    return (video.astype(np.float32) / np.float32(127.5) - 1).astype(np.float32)


def key_digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """Digest of all names with their shapes."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---- results ------------------------------------------------------------------------------------------------------


def filled(network, prefix: str = ""):
    """The network with drawn weights; `prefix` is what its names have in the file."""
    import torch

    with torch.no_grad():
        for key, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(draw_weight(prefix + key, tuple(parameter.shape))))
    return network.eval()


def normalised(video: np.ndarray):
    """-1..1, channels last -> what the networks see, [b, c, t, h, w]."""
    import torch

    x = (torch.from_numpy(video) + 1) / 2
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x - mean) / std).permute(0, 4, 1, 2, 3)


def shrunk(x, size: tuple[int, int]):
    """Frames after the first, resized one by one as VideoREPA does."""
    import torch

    x = x[:, :, 1:]
    b, c, t = x.shape[:3]
    x = torch.nn.functional.interpolate(x.transpose(1, 2).flatten(0, 1), size, mode="bicubic")
    return x.reshape(b, t, c, *size).transpose(1, 2)


def tapped(blocks) -> list:
    """A list that the blocks' outputs will be in, in turn."""
    found = []
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, output: found.append(output.detach().numpy()))
    return found


def settings_of(case: dict) -> dict:
    """Our settings under upstream's names."""
    names = dict(width="embed_dim", depth="depth", num_heads="num_heads", image_size="img_size", frames="all_frames")
    names["patch_size"] = "patch_size"
    return {names[key]: value for key, value in case.items() if key in names} | dict(mlp_ratio=4, qkv_bias=True)


def norm_layer():
    import functools

    import torch

    return functools.partial(torch.nn.LayerNorm, eps=1e-6)


def make_videomae(folder: Path) -> dict[str, np.ndarray]:
    """VideoMAE V2 in both layouts, VideoREPA's tokens and positions, content-debiased FVD's features."""
    import torch

    sys.path.insert(0, str(folder / "VideoMAEv2"))
    finetune, pretrain = (importlib.import_module(f"models.modeling_{name}") for name in ("finetune", "pretrain"))
    found = {}
    x = normalised(in_range(draw_video("clip", CLIP)))
    extra = dict(norm_layer=norm_layer(), init_values=0.0)
    network = filled(finetune.VisionTransformer(**settings_of(TINY), num_classes=NUM_CLASSES, **extra))
    taps = tapped(network.blocks)
    network.forward_features(x)
    found |= {f"finetuned_block_{i}": tokens for i, tokens in enumerate(taps)}
    encoder = filled(pretrain.PretrainVisionTransformerEncoder(**settings_of(TINY), **extra), "encoder.")
    tokens = TINY["frames"] // 2 * (TINY["image_size"] // 16) ** 2
    nothing = torch.zeros((x.shape[0], tokens), dtype=torch.bool)
    found["pretrained_normed"] = encoder(x, nothing).detach().numpy()

    ssl = folder / "VideoREPA" / "finetune/models/cogvideox_t2v_align/models/ssl/VideoMAEv2.py"
    spec = importlib.util.spec_from_file_location("videorepa", ssl)
    videorepa = importlib.util.module_from_spec(spec)
    sys.modules["videorepa"] = videorepa  # timm looks it up
    spec.loader.exec_module(videorepa)
    network = filled(videorepa.VisionTransformer(**settings_of(REPA), **extra))
    network.interpolate_pos_embed(16, 224, 16, REPA["width"], REPA_SIZE)
    x = shrunk(normalised(in_range(draw_video("repa", REPA_CLIP))), REPA_SIZE)
    found["videorepa_positions"] = network.pos_embed.numpy()
    found["videorepa_tokens"] = network.forward_features(x).detach().numpy()

    sys.path.insert(0, str(folder / "content-debiased-fvd" / "cdfvd" / "third_party"))
    fvd = importlib.import_module("VideoMAEv2.utils")
    model = importlib.import_module("VideoMAEv2.videomaev2_finetune")
    network = filled(model.VisionTransformer(**settings_of(FVD), norm_layer=norm_layer(), init_values=0.0))
    x = fvd.preprocess_videomae(draw_video("fvd", FVD_CLIP))
    found["fvd_features"] = network.forward_features(x).detach().numpy()
    return found


def make_vjepa2(folder: Path) -> dict[str, np.ndarray]:
    """Blocks and normed tokens of V-JEPA 2."""
    sys.path.insert(0, str(folder / "vjepa2"))
    upstream = importlib.import_module("src.models.vision_transformer")
    network = upstream.VisionTransformer(
        **settings_of(VJEPA2), num_frames=64, use_rope=True, use_sdpa=False, norm_layer=norm_layer()
    )
    filled(network, "module.backbone.")
    taps = tapped(network.blocks)
    x = shrunk(normalised(in_range(draw_video("vjepa2", VJEPA2_CLIP))), VJEPA2_SIZE)
    normed = network(x).detach().numpy()
    return {"normed": normed} | {f"block_{i}": tokens for i, tokens in enumerate(taps)}


# ---- real sizes ---------------------------------------------------------------------------------------------------


def make_sizes() -> dict[str, dict]:
    """Number of keys and of parameters, and the digest of names and shapes, of the files' networks."""
    import torch

    finetune, pretrain = (sys.modules[f"models.modeling_{name}"] for name in ("finetune", "pretrain"))
    upstream = sys.modules["src.models.vision_transformer"]
    for module in (finetune, pretrain):  # tables and initial values cost time and no size depends on them
        module.get_sinusoid_encoding_table = lambda length, width: torch.zeros(1, 1, 1)
        module.trunc_normal_ = lambda *_, **__: None
    upstream.trunc_normal_ = lambda *_, **__: None
    linspace = torch.linspace
    torch.linspace = lambda *arguments: linspace(*arguments, device="cpu")  # its values are read

    found = {}

    def add(name, state):
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        count = int(sum(np.prod(shape) for shape in shapes.values()))
        found[name] = dict(keys=len(shapes), parameters=count, digest=key_digest(shapes))

    with torch.device("meta"):
        sizes = dict(s="small_patch16", b="base_patch16", l="large_patch16", h="huge_patch16", g="giant_patch14")
        for letter, size in sizes.items():
            network = getattr(finetune, f"vit_{size}_224")(num_classes=710)
            add(f"videomaev2_{letter} finetuned", network.state_dict())
            network = getattr(pretrain, f"pretrain_videomae_{size}_224")(decoder_depth=4)
            state = {key: value for key, value in network.state_dict().items() if key.startswith("encoder.")}
            add(f"videomaev2_{letter} pretrained", state)
        network = upstream.vit_large(num_frames=64, img_size=(256, 256), use_rope=True)
        add("vjepa2_l upstream", {f"module.backbone.{key}": value for key, value in network.state_dict().items()})
    return found


def main(clones: str, folder: str) -> None:
    clones, folder = Path(clones), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "videomae.npz", **make_videomae(clones))
    np.savez_compressed(folder / "vjepa2.npz", **make_vjepa2(clones))
    (folder / "videomae_sizes.json").write_text(json.dumps(make_sizes(), indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
