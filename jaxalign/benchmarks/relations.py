"""Speed and memory of the relation losses, value and gradient: ours, the plain definition, PyTorch.

    python -m jaxalign.benchmarks.relations                                   # all sizes; minutes on 2 cores
    python -m jaxalign.benchmarks.relations --tokens=24x150 --repeats=5       # seconds
    python -m jaxalign.benchmarks.relations --devices=1,8 --tokens=13x1350    # and shared among 8 devices

One row a size, dtype, loss and way of computing it. `ours` is jaxalign.alignment.relations, `plain` the
definition under jit, `torch` the same mathematics as VideoREPA's code has it: two full similarity matrices
and autograd (where PyTorch is installed). Seconds are the best of --repeats. Memory is what a call needs
beyond its arguments and results: the compiler's figure for JAX, the growth of a process of its own for
PyTorch. A row whose matrices would not fit into the memory that is free says so. `rate` is the share of the
rate that a 2048³ product reaches on the device, for the flops that `ours` needs: 4N²d, and 8·(queries)·N·d
for M-TSA. On several forced CPU devices the seconds mean nothing, memory and flops (counted on the jaxpr, one
device's share) do.
"""

import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from jaxalign.alignment import definitions, relations
from jaxalign.training.flops import matmul_flops

FLAGS = flags.FLAGS
TEMPERATURE, MARGIN, MASK_RATIO = 0.1, 0.1, 0.2


def losses(module):
    """The three losses from `relations` or from `definitions`, as functions of (student, teacher, queries)."""
    return {
        "TRD": lambda s, r, q: module.relation_l1(s, r, margin=MARGIN),
        "TSA": lambda s, r, q: module.tempered_kl(s, r, temperature=TEMPERATURE),
        "M-TSA": lambda s, r, q: module.tempered_kl(s, r, temperature=TEMPERATURE, queries=q),
    }


def torch_losses(torch):
    """TRD and TSA in PyTorch, for tokens [b, t, n, d]."""

    def similarities(tokens):
        unit = torch.nn.functional.normalize(tokens, dim=-1).flatten(1, 2)
        return torch.bmm(unit, unit.transpose(1, 2))

    def trd(s, r):
        return torch.relu((similarities(s) - similarities(r)).abs() - MARGIN).mean()

    def tsa(s, r):
        log_s, log_r = (
            torch.log_softmax(similarities(x).unflatten(2, x.shape[1:3]) / TEMPERATURE, dim=-1) for x in (s, r)
        )
        return torch.nn.functional.kl_div(log_s, log_r, log_target=True, reduction="none").sum(-1).mean()

    return {"TRD": trd, "TSA": tsa}


def best_time(run, repeats: int) -> float:
    """Seconds of the fastest of so many calls; one before them is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_rate(dtype: str, repeats: int) -> float:
    """Flops a second of a 2048³ product of this dtype, accumulated in fp32."""
    a = jnp.ones((2048, 2048), dtype)
    precision = "highest" if dtype == "float32" else "default"
    product = jax.jit(functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32))
    return 2 * 2048**3 / best_time(lambda: product(a, a).block_until_ready(), repeats)


def free_memory() -> int:
    """Bytes that the default device, or for a CPU the machine, has left."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def time_jax(loss, tokens, devices: int, repeats: int):
    """Seconds, bytes of temporary memory and one device's flops of value and gradient."""
    mesh = jax.make_mesh(
        (1, 1, devices, 1),
        ("data", "fsdp", "context", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
        devices=jax.devices()[:devices],
    )

    def step(student, teacher, queries):
        return jax.value_and_grad(lambda s: loss(s, teacher, queries).sum())(student)

    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        compiled = jax.jit(step).lower(*tokens).compile()
        seconds = best_time(lambda: jax.block_until_ready(compiled(*tokens)), repeats)
        return seconds, compiled.memory_analysis().temp_size_in_bytes, matmul_flops(step, *tokens)


def time_torch(name, shape, dtype, cuda, repeats):
    """Seconds and bytes of value and gradient. Called in a process of its own: its peak memory tells the bytes."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device, dtype = "cuda" if cuda else "cpu", getattr(torch, dtype)
    student, teacher = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    student.requires_grad_()
    loss = torch_losses(torch)[name]

    def run():
        student.grad = None
        loss(student, teacher).backward()
        if cuda:
            torch.cuda.synchronize()

    def peak():
        if cuda:
            return torch.cuda.max_memory_allocated()
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])

    if not cuda:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from what is resident now
    before = peak()
    return best_time(run, repeats), peak() - before


def cogvideox_2b_step_flops() -> float:
    """A CogVideoX-2B training step at 49×480×720 with batch 1, from the published layer sizes.

    30 blocks of width d = 1920 on S = 226 + 13·30·45 tokens: 4d² for attention's and 8d² for the MLP's
    weights, 2S·d for the attention itself, each 2 flops a token; the backward pass costs twice the forward
    pass.
    """
    tokens, width = 226 + 13 * 30 * 45, 1920
    return 3 * 30 * 2 * tokens * (12 * width**2 + 2 * tokens * width)


def row(size, dtype, devices, name, way, seconds=None, memory=None, rate=None, flops=None):
    cells = [
        f"{size:6d}",
        f"{dtype:8s}",
        f"{devices}",
        f"{name:5s}",
        f"{way:5s}",
        "does not fit" if seconds is None else f"{seconds:8.3f} s",
        "" if memory is None else f"{memory / 2**30:7.3f} GiB",
        "" if rate is None else f"{rate:5.0%}",
        "" if flops is None else f"{flops / 1e9:8.1f}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def bench(t: int, n: int, dtype: str, counts: list[int], torch: bool) -> None:
    """All rows of one size and dtype."""
    size, k = t * n, max(1, round(MASK_RATIO * n))
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, t, n, FLAGS.width)
    student, teacher = (jax.random.normal(key, shape).astype(dtype) for key in keys[:2])
    order = jnp.argsort(jax.random.uniform(keys[2], (1, t, n)), axis=-1)
    inputs = student, teacher, order[..., :k].astype(jnp.int32)
    full_rate = matmul_rate(dtype, FLAGS.repeats)
    # Values, gradients and exponentials of two N×N matrices, which the other two hold at once.
    others_fit = 6 * 4 * size**2 < free_memory()
    cuda = jax.default_backend() == "gpu"
    for name, products in (("TRD", 2 * size**2), ("TSA", 2 * size**2), ("M-TSA", 4 * k * t * size)):
        for devices in counts if "ours" in FLAGS.ways else ():
            seconds, memory, flops = time_jax(losses(relations)[name], inputs, devices, FLAGS.repeats)
            rate = 2 * products * FLAGS.width / seconds / full_rate / devices
            row(size, dtype, devices, name, "ours", seconds, memory, rate, flops)
        if name == "M-TSA":
            continue  # the others have no way to save work with queries: compare with their TSA
        if "plain" in FLAGS.ways:
            found = time_jax(losses(definitions)[name], inputs, 1, FLAGS.repeats) if others_fit else ()
            row(size, dtype, 1, name, "plain", *found[:2])
        if torch:
            found = ()
            if others_fit:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(time_torch, (name, shape, dtype, cuda, FLAGS.repeats))
            row(size, dtype, 1, name, "torch", *found)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; everything here is a --flag")
    counts = [int(count) for count in FLAGS.devices]
    if max(counts) > 1:
        jax.config.update("jax_num_cpu_devices", max(counts))
    if max(counts) > len(jax.devices()):
        raise app.UsageError(f"--devices={max(counts)}, but there are {len(jax.devices())}")
    torch = "torch" in FLAGS.ways and importlib.util.find_spec("torch") is not None
    versions = [f"jax {jax.__version__}", f"torch {importlib.metadata.version('torch')}" if torch else "no torch"]
    print(jax.devices()[0].device_kind, f"{len(os.sched_getaffinity(0))} CPU cores", *versions, sep=", ", end=", ")
    print(f"width {FLAGS.width}")
    print("| N | dtype | devices | loss | way | seconds | memory | rate | GFLOP a device |")
    print("|---|---|---|---|---|---|---|---|---|")
    for tokens in FLAGS.tokens:
        for dtype in FLAGS.dtypes:
            bench(*map(int, tokens.split("x")), dtype, counts, torch)
    n = 13 * 30 * 45
    share = 8 * MASK_RATIO * n**2 * 768 / cogvideox_2b_step_flops()
    print(f"\nM-TSA at N = {n} adds {share:.2%} to the flops of a CogVideoX-2B training step.")


if __name__ == "__main__":  # flags live here, so that importing this module defines none
    flags.DEFINE_list("tokens", ["24x150", "13x1350", "24x1350"], "Sizes as FRAMESxPOSITIONS: N = 3600, 17550, 32400.")
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Dtypes of the tokens.")
    flags.DEFINE_list("devices", ["1"], "Numbers of devices that share one clip; on a CPU they are forced.")
    flags.DEFINE_list("ways", ["ours", "plain", "torch"], "What to time.")
    flags.DEFINE_integer("width", 768, "Width of the tokens.")
    flags.DEFINE_integer("repeats", 3, "Timed runs, of which the best counts.")
    app.run(main)
