"""Speed of the teachers beside their PyTorch originals, in one run on one machine, at random weights.

    python -m jaxalign.benchmarks.teachers                                  # minutes on 2 cores
    python -m jaxalign.benchmarks.teachers --teachers=dinov2_b --size=420x630 --frames=49 --dtype=bfloat16
    python -m jaxalign.benchmarks.teachers --teachers=sea_raft_m --sea_raft_source=SEA-RAFT

One row a teacher: frames (for flow networks: pairs of frames) a second of ours and of the PyTorch network, their
ratio (above 1: ours is faster), and the seconds that ours took to compile. Runs of the two alternate and the best of
--repeats counts for each, so that another program's load hits both alike. The PyTorch side is transformers' (DINOv2,
VideoMAE, V-JEPA 2, SAM 2.1) and torchvision's (RAFT) with their own fast attention; on a GPU it runs there too. It
gets pixels that are already resized and normalised, ours does that inside. SEA-RAFT has no PyTorch package: its
authors' code is timed where --sea_raft_source names a checkout of https://github.com/princeton-vl/SEA-RAFT (it needs
huggingface_hub, scipy and torchvision); it brings every iteration's flow to full size, ours the last one's.
"""

import functools
import importlib.metadata
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from jaxalign import teachers
from jaxalign.benchmarks import torchvision_ops
from jaxalign.tasks.aligning import cast

FLAGS = flags.FLAGS
# Teacher -> (frames of the clip, frame size): what fits into a minute on two CPU cores.
DEFAULTS = {
    "efficientnet_lite0": (16, (256, 256)),
    "dinov2_b": (4, (224, 224)),
    "videomaev2_b": (16, (160, 240)),
    "vjepa2_l": (4, (256, 256)),
    "sam21_hiera_bplus": (1, (512, 512)),
    "raft_large": (2, (256, 384)),
    "sea_raft_m": (2, (256, 384)),
}


def original(name: str, config, frames: int, size: tuple[int, int]) -> Callable | None:
    """A function that makes PyTorch's network and an input of the same work, or None where no package has it."""
    import torch
    import transformers

    height, width = size
    if name.startswith("dinov2"):
        make = transformers.Dinov2WithRegistersModel if config.registers else transformers.Dinov2Model
        kind = transformers.Dinov2WithRegistersConfig if config.registers else transformers.Dinov2Config
        model = make(
            kind(
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                use_swiglu_ffn=config.mlp == "swiglu",
                image_size=518,
                patch_size=14,
            )
        )
        return model, torch.randn(frames, 3, height, width)
    if name.startswith("videomae"):
        model = transformers.VideoMAEModel(
            transformers.VideoMAEConfig(
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                intermediate_size=config.hidden,
                patch_size=config.patch_size,
                image_size=list(size),
                num_frames=frames,
                layer_norm_eps=1e-6,
                use_mean_pooling=True,
            )
        )
        return model, torch.randn(1, frames, 3, height, width)
    if name.startswith("vjepa2"):
        kind = transformers.VJEPA2Config(crop_size=height, frames_per_clip=frames)
        return functools.partial(transformers.VJEPA2Model(kind), skip_predictor=True), torch.randn(
            1, frames, 3, height, width
        )
    if name.startswith("sam21"):
        backbone = transformers.Sam2HieraDetConfig(
            hidden_size=config.width,
            num_attention_heads=config.num_heads,
            blocks_per_stage=list(config.stages),
            embed_dim_per_stage=[config.width * 2**i for i in range(4)],
            num_attention_heads_per_stage=[config.num_heads * 2**i for i in range(4)],
            window_size_per_stage=list(config.windows),
            global_attention_blocks=list(config.global_blocks),
            window_positional_embedding_background_size=[config.background] * 2,
            image_size=list(size),
        )
        kind = transformers.Sam2VisionConfig(
            backbone_config=backbone, backbone_channel_list=[config.width * 2**i for i in (3, 2, 1, 0)]
        )
        return transformers.Sam2VisionModel(kind), torch.randn(frames, 3, height, width)
    if name.startswith("raft"):
        from torchvision.models import optical_flow

        network = on_pairs(getattr(optical_flow, name)(), num_flow_updates=config.iterations)
        return network, torch.rand(frames, 3, height, width) * 2 - 1
    if name.startswith("sea_raft") and FLAGS.sea_raft_source:
        network = authors_sea_raft(Path(FLAGS.sea_raft_source), name[-1].upper())
        return on_pairs(network, test_mode=True), torch.rand(frames, 3, height, width) * 255
    if name.startswith("efficientnet"):
        import timm

        model = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3,)).eval()
        return model, torch.randn(frames, 3, height, width)
    return None


def on_pairs(network, **settings):
    """A PyTorch module that takes a clip [t, c, h, w] and runs `network` on every two consecutive frames of it."""
    import torch

    class Pairs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, clip):
            return self.network(clip[:-1], clip[1:], **settings)

    return Pairs()


def authors_sea_raft(checkout: Path, size: str):
    """SEA-RAFT's own network of `size` (S, M, L) at random weights, from the code and the config of a checkout.

    Raises FileNotFoundError where the folder is no checkout.
    """
    import torchvision

    config = checkout / "config" / "eval" / f"sintel-{size}.json"
    if not config.is_file() or not (checkout / "core" / "raft.py").is_file():
        raise FileNotFoundError(f"--sea_raft_source={checkout}: no {config.name} and core/raft.py below it")
    sys.path.insert(0, str(checkout / "core"))  # its modules import each other by their bare names
    plain = {name: getattr(torchvision.models, name) for name in ("resnet18", "resnet34")}
    try:
        for name, build in plain.items():  # it would download ImageNet's weights for its trunks
            setattr(torchvision.models, name, lambda weights=None, build=build: build())
        from raft import RAFT

        return RAFT(types.SimpleNamespace(**json.loads(config.read_text(encoding="utf-8"))))
    finally:
        for name, build in plain.items():
            setattr(torchvision.models, name, build)
        sys.path.remove(str(checkout / "core"))


def bench(name: str, frames: int, size: tuple[int, int], dtype: str, repeats: int) -> None:
    """One row of the table."""
    shape = dict(size=size)
    if name in ("raft_small", "raft_large") or name.startswith("sea_raft"):
        shape = {}  # flow is wanted of the pixels that there are
    module = teachers.abstract(name, **shape)
    entry = teachers.TEACHERS[name]
    teacher = jax.jit(lambda: cast(entry.module(module.config, rngs=nnx.Rngs(0)), jnp.dtype(dtype)))()
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, frames, *size, 3)), dtype)
    start = time.perf_counter()
    compiled = jax.jit(lambda teacher, video: teacher(video)).lower(teacher, video).compile()
    compile_seconds = time.perf_counter() - start
    ours, theirs = functools.partial(compiled, teacher, video), None
    if FLAGS.torch and (found := original(name, module.config, frames, size)):
        theirs = torch_call(*found, dtype)
    units = frames - 1 if module.grid((frames, *size))[0] == frames - 1 else frames
    seconds = {"ours": [], "torch": []}
    for timed in range(repeats + 1):
        for way, call in (("ours", lambda: jax.block_until_ready(ours())), ("torch", theirs)):
            if call is not None:
                start = time.perf_counter()
                call()
                if timed:  # the first round warms up
                    seconds[way].append(time.perf_counter() - start)
    rate = {way: units / min(values) for way, values in seconds.items() if values}
    ratio = f"{rate['ours'] / rate['torch']:.2f}" if "torch" in rate else "-"
    shown = f"{rate['torch']:.2f}" if "torch" in rate else "-"
    clip = f"{frames}×{size[0]}×{size[1]}"
    print(
        f"| {name} | {clip} | {dtype} | {rate['ours']:.2f} | {shown} | {ratio} | {compile_seconds:.1f} s |", flush=True
    )


def torch_call(model, clip, dtype: str) -> Callable:
    """A call of the PyTorch network without gradients, on the GPU if JAX computes there."""
    import torch

    gpu, kind = jax.default_backend() == "gpu", getattr(torch, dtype)
    module = model.func if isinstance(model, functools.partial) else model
    if isinstance(module, torch.nn.Module):
        module.eval().to(kind)
        module.to("cuda" if gpu else "cpu")
    clip = clip.to(kind).to("cuda" if gpu else "cpu")

    def call():
        with torch.no_grad():
            model(clip)
        if gpu:
            torch.cuda.synchronize()

    return call


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; everything here is a --flag")
    versions = [f"jax {jax.__version__}"]
    if FLAGS.torch:
        kept = torchvision_ops.define()  # noqa: F841
        versions += [f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torchvision", "transformers")]
    print(jax.devices()[0].device_kind, f"{len(os.sched_getaffinity(0))} CPU cores", *versions, sep=", ")
    print("| teacher | clip | dtype | ours, frames/s | PyTorch | ratio | compile |")
    print("|---|---|---|---|---|---|---|")
    for name in FLAGS.teachers:
        frames, size = DEFAULTS.get(name, (4, (224, 224)))
        if FLAGS.size:
            size = tuple(map(int, FLAGS.size.split("x")))
        bench(name, FLAGS.frames or frames, size, FLAGS.dtype, FLAGS.repeats)


if __name__ == "__main__":  # flags live here, so that importing this module defines none
    flags.DEFINE_list("teachers", list(DEFAULTS), "Names of teachers (python -m jaxalign.convert --list).")
    flags.DEFINE_integer("frames", 0, "Frames of the clip; 0: what suits the teacher.")
    flags.DEFINE_string("size", "", "Frame size as HEIGHTxWIDTH; empty: what suits the teacher.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and tokens.")
    flags.DEFINE_integer("repeats", 3, "Timed rounds, of which the best counts.")
    flags.DEFINE_bool("torch", True, "Time PyTorch's networks too.")
    flags.DEFINE_string("sea_raft_source", "", "A checkout of princeton-vl/SEA-RAFT, whose network is then timed too.")
    app.run(main)
