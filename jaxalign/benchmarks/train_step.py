"""The training step of a config: what it costs as compiled, or how fast it is here.

    python -m jaxalign.benchmarks.train_step --config configs/tsa.py:cogvideox_2b --abstract --devices 8
    python -m jaxalign.benchmarks.train_step --config configs/tsa.py
    python -m jaxalign.benchmarks.train_step --config configs/baseline.py:cogvideox_2b --torch
    python -m jaxalign.benchmarks.train_step --config configs/baseline.py:cogvideox_2b --torch \\
        --config.precision=fp32 --config.remat=False --student=width=512,depth=6,num_heads=8 --latents=7x32x32

--abstract allocates nothing and needs no accelerator, weights or data: the real step is compiled for so many forced CPU
devices (jaxalign/benchmarks/lowering.py says what that tells of an accelerator) and parameters, flops, memory and
communication are printed. Without it the step runs with made-up weights on all devices here: ms a step, tokens/s, MFU.
--torch: forward and backward pass of the student alone, and of diffusers' module of the same size in the same run, the
two in turn; eager on a CPU, with torch.compile on a GPU. Ratio above 1: ours is faster.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags

from jaxalign.benchmarks import lowering, torchvision_ops
from jaxalign.models import MODELS, cogvideox
from jaxalign.tasks.aligning import cast
from jaxalign.training import chips, flops, setup
from jaxalign.training import config as config_lib
from jaxalign.training.mesh import make_mesh

GB = 1e9


def table(*columns: str) -> None:
    """The head of a Markdown table."""
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


# ---- as compiled -----------------------------------------------------------------------------------------------------


def show_lowered(found: dict[str, Any], precision: str) -> None:
    """Print what `lowering.lower` found."""
    count = found["devices"]
    mesh = " · ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    print(f"{count} devices ({mesh}), batch {found['batch_size']}, {found['tokens']:,} tokens a clip, {precision}")
    kinds = found["attention"]
    print(
        f"attention of the student: {kinds['cpu']!r} as compiled here; 'auto' takes {kinds['gpu']!r} on GPUs and "
        f"{kinds['tpu']!r} on TPUs\n"
    )
    table("parameters", "")
    for name, number in found["parameters"].items():
        if number:
            row(name, f"{number:,}")
    print()
    f = found["flops"]
    table("flops of a step, all devices", "TFLOP", "share")
    for name in ("student", "codec", "text", "teachers", "alignment"):
        if f[name]:
            row(name, f"{f[name] / 1e12:,.3f}", f"{f[name] / f['model']:.2%}")
    row("together", f"{f['model'] / 1e12:,.3f}", "100 %")
    row("computed again (remat)", f"{(f['step'] - f['model']) / 1e12:,.3f}", "")
    row("one device computes", f"{found['device_flops'] / 1e12:,.3f}", f"1/{f['step'] / found['device_flops']:.2f}")
    print()
    m = found["memory"]
    table("memory of one device", "GB")
    for name, size in found["held"].items():
        if size >= 1e5:
            row(name, f"{size / GB:.3f}")
    row("arguments of the step (what it reads of these)", f"{m['arguments'] / GB:.3f}")
    row("results beside them", f"{(m['results'] - m['results_in_place']) / GB:.3f}")
    row("temporary", f"{m['temporary'] / GB:.3f}")
    row("together", f"{lowering.memory_of(found) / GB:.3f}")
    if precision == "bf16":
        print("An upper bound for accelerators: a CPU computes bf16 in fp32, and flash attention needs less.", end=" ")
    fits = [name for name, chip in chips.CHIPS.items() if lowering.memory_of(found) <= chip.memory]
    print(f"Fits: {', '.join(fits) or 'none of ' + ', '.join(chips.CHIPS)}.\n")
    table("sent by one device in a step", "axes", "GB")
    for (kind, axes), size in lowering.wire_by(found, "kind", "axes").items():
        row(kind, axes, f"{size / GB:.4f}")
    row("together", "", f"{sum(lowering.wire_by(found, 'kind').values()) / GB:.4f}")


# ---- as measured -----------------------------------------------------------------------------------------------------


def numbers(tree: Any) -> Any:
    """Small positive numbers in the place of shapes, each made where it belongs; integers are zero.

    A wave along the last axis: random draws of some hundred arrays would take a minute to compile.
    """

    def fill(x):
        if not x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        wave = 0.02 + 0.01 * jnp.sin(jnp.arange(x.shape[-1], dtype=jnp.float32))
        return jnp.broadcast_to(wave, x.shape).astype(x.dtype)

    return jax.jit(lambda: jax.tree.map(fill, tree), out_shardings=jax.tree.map(lambda x: x.sharding, tree))()


def measure(config: ml_collections.ConfigDict, repeats: int) -> None:
    """Print the speed of the step on the devices that are here, the student as it starts, all else made up."""
    mesh = make_mesh(**config.mesh)
    run, _, fresh, batch, traced = lowering.trace(config, mesh)
    work = flops.count(traced.jaxpr)
    start = time.perf_counter()
    step = traced.lower().compile()
    compiled = time.perf_counter() - start
    state, frozen, batch = fresh(jax.random.key(0)), numbers(run.frozen), numbers(batch)

    def once(state):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, frozen, batch, jax.random.key(1)))
        return state, time.perf_counter() - start

    state, _ = once(state)
    seconds = []
    for _ in range(repeats):
        state, took = once(state)
        seconds.append(took)
    median = statistics.median(seconds)
    tokens = config.batch_size * int(np.prod(run.student_grid))
    print(f"{mesh.size} × {jax.devices()[0].device_kind}, batch {config.batch_size}, {config.precision}")
    print(
        f"{1000 * median:,.1f} ms a step, best {1000 * min(seconds):,.1f} of {repeats}; {tokens / median:,.0f} tokens/s"
    )
    print(f"compiled in {compiled:.1f} s; {work.model / 1e12:,.3f} TFLOP a step, {work.total / 1e12:,.3f} with remat")
    show_rate("the step", work.model / median, mesh.size)
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    if known := [peak for peak in peaks if peak]:
        print(f"peak memory of a device: {max(known) / GB:.2f} GB")


def show_rate(what: str, rate: float, devices: int) -> None:
    """Print flops a second and, on a known chip, MFU."""
    chip = chips.chip_of(jax.devices()[0].device_kind)
    mfu = f", MFU {rate / devices / chip.flops:.1%} of {chip.name}'s bf16 peak" if chip else ""
    print(f"{what}: {rate / 1e12:,.3f} TFLOP/s{mfu}")


def student_config(config: ml_collections.ConfigDict, changes: dict[str, int], latents: tuple[int, ...] | None):
    """The student of a config, with other sizes where they are given: latents are frames, height, width."""
    student = setup.build(config, abstract=True).model_config
    shape = dict(num_frames=latents[0], input_size=latents[1:]) if latents else {}
    return type(student)(**({name: getattr(student, name) for name in student.__dataclass_fields__} | shape | changes))


def beside_torch(student: Any, dtype: str, batch: int, repeats: int) -> None:
    """Print the time of forward and backward pass of CogVideoX's transformer, ours and diffusers', in turn.

    Raises ValueError for another student, ImportError where diffusers is not installed.
    """
    if not isinstance(student, cogvideox.CogVideoXConfig) or student.positions != "sincos":
        raise ValueError("--torch compares CogVideoX with sin-cos positions: --config configs/baseline.py:cogvideox_2b")
    shapes = (
        (batch, student.num_frames, *student.input_size, student.in_channels),
        (batch, student.text_tokens, student.text_width),
    )
    latents, text = (np.random.default_rng(k).standard_normal(shape, np.float32) for k, shape in enumerate(shapes))
    ours, count = _ours(student, dtype, latents, text)
    theirs, device = _theirs(student, dtype, latents, text)
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for timed in range(repeats + 1):
        for way, call in (("ours", ours), ("torch", theirs)):
            start = time.perf_counter()
            call()
            if timed:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
    best = {way: min(values) for way, values in seconds.items()}
    print(f"{student.depth} blocks of width {student.width}, {student.num_tokens:,} tokens, batch {batch}, {dtype}")
    table("", "ms", "TFLOP/s")
    for way, where in (("ours", jax.devices()[0].device_kind), ("torch", device)):
        row(f"{way} ({where})", f"{1000 * best[way]:,.1f}", f"{count / best[way] / 1e12:,.3f}")
    print(f"ratio {best['torch'] / best['ours']:.2f}")
    show_rate("ours", count / best["ours"], 1)


def _ours(student, dtype: str, latents, text) -> tuple[Callable[[], Any], int]:
    """(a call of forward and backward pass, its flops) of our module at random weights."""
    model = jax.jit(lambda: cast(MODELS["cogvideox"].model(student, rngs=nnx.Rngs(0)), jnp.dtype(dtype)))()
    inputs = jnp.asarray(latents, dtype), jnp.full(len(latents), 500.0), jnp.asarray(text, dtype)

    def objective(model, *inputs):
        return jnp.square(model(*inputs)[0]).mean()

    traced = jax.jit(jax.value_and_grad(objective)).trace(model, *inputs)
    compiled = traced.lower().compile()
    return lambda: jax.block_until_ready(compiled(model, *inputs)), flops.count(traced.jaxpr).model


def _theirs(student, dtype: str, latents, text) -> tuple[Callable[[], Any], str]:
    """(a call of forward and backward pass, the device) of diffusers' module at random weights."""
    import torch

    kept = torchvision_ops.define()  # noqa: F841
    import diffusers

    cuda = torch.cuda.is_available()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    where = dict(device="cuda" if cuda else "cpu", dtype=getattr(torch, dtype))
    module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=student.num_heads,
        attention_head_dim=student.head_dim,
        in_channels=student.in_channels,
        out_channels=student.out_channels,
        time_embed_dim=student.time_width,
        text_embed_dim=student.text_width,
        num_layers=student.depth,
        sample_height=student.input_size[0],
        sample_width=student.input_size[1],
        sample_frames=4 * (student.num_frames - 1) + 1,
        patch_size=student.patch_size,
        max_text_seq_length=student.text_tokens,
    ).to(**where)
    if student.remat:
        module.enable_gradient_checkpointing()
    network = torch.compile(module) if cuda else module
    video = torch.tensor(latents).permute(0, 1, 4, 2, 3).to(**where)
    told, timesteps = torch.tensor(text).to(**where), torch.full((len(latents),), 500, device=where["device"])

    def call():
        module.zero_grad(set_to_none=True)
        network(video, told, timesteps, return_dict=False)[0].float().square().mean().backward()
        if cuda:
            torch.cuda.synchronize()

    return call, f"{where['device']}, torch {torch.__version__}"


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"{argv[1]!r}: not understood; everything here is a --flag")
    values = flags.FLAGS
    if values.config is None:
        raise ValueError("--config is missing; write for example --config configs/tsa.py:cogvideox_2b")
    if values.torch:
        changes = {k: int(v) for k, v in (pair.split("=") for pair in values.student)}
        latents = tuple(int(x) for x in values.latents.split("x")) if values.latents else None
        config = lowering.planned(values.config, 1, data=1)
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.precision]
        beside_torch(student_config(config, changes, latents), dtype, values.clips, values.repeats)
    elif values.abstract:
        config = lowering.planned(values.config, values.devices or 8, values.clips)
        for found in lowering.lower_all([config]):
            show_lowered(found, config.precision)
    else:
        config_lib.remember_compilations()
        measure(lowering.planned(values.config, jax.device_count(), values.clips), values.repeats)
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, with a scale after a colon.", lock_config=True)
    flags.DEFINE_bool("abstract", False, "Compile for --devices forced CPU devices; allocate and run nothing.")
    flags.DEFINE_integer("devices", None, "Devices of --abstract; default 8.")
    flags.DEFINE_integer("clips", 1, "Clips of a batch on each row of the mesh (data × fsdp).")
    flags.DEFINE_integer("repeats", 5, "Timed runs.")
    flags.DEFINE_bool("torch", False, "The student's forward and backward pass beside diffusers'.")
    flags.DEFINE_list("student", [], "--torch: other sizes of the student, e.g. width=512,depth=6,num_heads=8.")
    flags.DEFINE_string("latents", "", "--torch: frames, height and width of the latents, e.g. 7x32x32.")
    config_lib.run_verb(main)
