"""The training step of a config, compiled for devices that need not be there: its memory, flops and communication.

Nothing is allocated: the run is built of shapes, and the step that training would run (prepare.compiled_step) is
compiled for as many CPU devices as are asked for, which XLA is told to pretend; in a process of its own where this one
has too few. What that says of an accelerator:

- Flops are counted on the jaxpr and do not depend on the backend.
- Communication and a device's own flops are read from the program behind XLA's partitioner, which all backends share.
- Memory is what the CPU's compiler lays out. It computes bf16 in fp32 and has no flash attention, so its temporaries
  are an upper bound for GPUs and TPUs; arguments and results are exact.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxalign.benchmarks import hlo
from jaxalign.models import attention
from jaxalign.tasks import aligning, denoising
from jaxalign.training import config as config_lib
from jaxalign.training import flops as flops_lib
from jaxalign.training import prepare, setup
from jaxalign.training.data_settings import abstract_batch
from jaxalign.training.environment import count_parameters
from jaxalign.training.flops import Flops
from jaxalign.training.mesh import AXES, BATCH_AXES, check_batch, make_mesh
from jaxalign.training.optimizer import make_optimizer

FORCED = "--xla_force_host_platform_device_count"


def planned(config: ml_collections.ConfigDict, devices: int, clips: int = 1, **mesh: int) -> ml_collections.ConfigDict:
    """The resolved config on a mesh of so many devices, `clips` to each of its rows (data × fsdp).

    `mesh`: sizes of axes instead of the config's. Raises ValueError for a mesh that does not fit the devices.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    if mesh:
        config.mesh.update(dict.fromkeys(AXES, 1) | mesh)
    sizes = {axis: config.mesh[axis] for axis in AXES}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [axis for axis, size in sizes.items() if size == -1]
    if devices % fixed or (not free and fixed != devices):
        raise ValueError(f"mesh {sizes} does not fit {devices} devices; write -1 for the axis that takes what is left")
    sizes |= dict.fromkeys(free, devices // fixed)
    config.mesh.update(sizes)
    config.batch_size = clips * int(np.prod([sizes[axis] for axis in BATCH_AXES])) * config.optimizer.grad_accum
    config.data.source = config.data.source or "demo"  # nothing is read of it
    return config_lib.resolve(config)


def num_devices(config: ml_collections.ConfigDict) -> int:
    """How many devices the mesh of a `planned` config has."""
    return int(np.prod([config.mesh[axis] for axis in AXES]))


def lower(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Compile the step of a `planned` config here; plain numbers and lists, as JSON has them.

    Raises ValueError where this process has fewer devices than the mesh.
    """
    count = num_devices(config)
    if count > len(jax.devices()):
        raise ValueError(f"{count} devices are asked for and {len(jax.devices())} are here")
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:count])
    run, state, _, batch, traced = trace(config, mesh)
    step = flops_lib.count(traced.jaxpr)
    with tempfile.TemporaryDirectory() as folder:
        # Without optimisation LLVM takes a third of the time; what is measured stays the same to the byte.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = traced.lower().compile(options | {"xla_backend_optimization_level": 0})
        dumped = [path for path in Path(folder).iterdir() if "after_spmd-partitioning" in path.name]
        done = hlo.Work(step.total, [])
        if count > 1:
            if len(dumped) != 1:
                raise ValueError(f"XLA left {len(dumped)} dumps of the partitioned step; is the compilation cache on?")
            done = hlo.work(dumped[0].read_text(), dict(mesh.shape))
    memory = compiled.memory_analysis()
    parts = {"parameters": state.trainable, "optimizer": state.opt_state, "average": state.ema}
    parts |= {name: tree for name, tree in run.frozen.items()} | {"batch": batch}
    return {
        "devices": count,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "tokens": int(np.prod(run.student_grid)),
        "attention": attention_of(config, run),
        "parameters": {"student": count_parameters(state.trainable["model"])}
        | {"heads": count_parameters(state.trainable["heads"])}
        | {name: count_parameters(tree) for name, tree in run.frozen.items() if name != "null_prompt"},
        "flops": parts_of_flops(config, run, batch, mesh, step),
        "device_flops": done.flops,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes,
            "results_in_place": memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
        "held": {name: device_bytes(tree) for name, tree in parts.items()},
        "communication": [c._asdict() | {"wire": c.wire} for c in done.collectives],
    }


def trace(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh):
    """(run, state, key -> state, batch, traced step) of a config on a mesh, all of shapes."""
    check_batch(mesh, config.batch_size, config.optimizer.grad_accum)
    optimizer = make_optimizer(config)
    run, state, fresh = prepare.lay_out(setup.build(config, mesh=mesh, abstract=True), optimizer, mesh)
    batch = abstract_batch(config, mesh, text=run.task.text)
    step = prepare.compiled_step(config, run, optimizer, state)
    return run, state, fresh, batch, step.trace(state, run.frozen, batch, jax.random.key(0))


def parts_of_flops(config: ml_collections.ConfigDict, run: setup.Run, batch, mesh, step: Flops) -> dict[str, int]:
    """The flops of a step on all devices, and what of them is whose.

    step: all that is computed; model: without what remat computes again. Of the latter: codec, text, teachers: frozen
    forward passes; alignment: what the step costs more than one without any, teachers apart; student: the rest.
    """

    def of(function, *args) -> int:
        return flops_lib.count(jax.make_jaxpr(function)(*args)).model

    codec = of(lambda frozen, batch: denoising.encode(frozen, batch, jax.random.key(0)), run.frozen, batch)
    text = of(lambda encoder, ids: encoder(ids), run.frozen["text"], batch["tokens"]) if "text" in run.frozen else 0
    teachers, plain = 0, step
    if run.task.alignments:
        video = jax.ShapeDtypeStruct(batch["video"].shape, jnp.float32)
        ask = lambda teachers, video: aligning.ask_teachers(run.task.alignments, teachers, video)  # noqa: E731
        teachers = of(ask, run.frozen["teachers"], video)
        without = ml_collections.ConfigDict(config.to_dict())
        without.align.method = "none"
        plain = flops_lib.count(trace(config_lib.resolve(without), mesh)[-1].jaxpr)
    parts = {"student": plain.model - codec - text, "codec": codec, "text": text, "teachers": teachers}
    return {
        "step": step.total,
        "model": step.model,
        **parts,
        "alignment": step.model - plain.model - teachers,
        "alignment_and_teachers_computed": step.total - plain.total,
    }


def attention_of(config: ml_collections.ConfigDict, run: setup.Run) -> dict[str, str]:
    """The student's attention here and, where it chooses by platform, on the accelerators that this stands in for."""
    tokens = getattr(run.model_config, "num_tokens", int(np.prod(run.student_grid[1:])))
    size = run.task.dtype, tokens, run.model_config.width // run.model_config.num_heads
    chosen = {
        "cpu": attention.choose("cpu", "", *size, 8),
        "gpu": attention.choose("gpu", "9.0", *size, 8),
        "tpu": attention.choose("tpu", "", *size, 8),
    }
    return chosen if config.attention == "auto" else dict.fromkeys(chosen, config.attention)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a pytree of shapes with shardings."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape")]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)


def memory_of(found: Mapping[str, Any]) -> int:
    """The bytes that a device needs for the step: arguments, temporaries and those results that are no arguments."""
    m = found["memory"]
    return m["arguments"] + m["temporary"] + m["results"] - m["results_in_place"]


def wire_by(found: Mapping[str, Any], *keys: str) -> dict[tuple, float]:
    """Bytes that a device sends in a step, by 'kind', 'axes' or both."""
    total: dict[tuple, float] = {}
    for c in found["communication"]:
        key = tuple("×".join(c[k]) if k == "axes" else c[k] for k in keys)
        total[key] = total.get(key, 0.0) + c["wire"]
    return dict(sorted(total.items(), key=lambda item: -item[1]))


# ---- a process of its own ------------------------------------------------------------------------------------------


def lower_all(configs: Sequence[ml_collections.ConfigDict]) -> Iterator[dict[str, Any]]:
    """`lower` of each `planned` config, in a child process that pretends as many CPU devices as the largest needs.

    Raises ChildProcessError with the child's last line when it fails.
    """
    most = max(map(num_devices, configs))
    others = re.sub(rf"{FORCED}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {
        "XLA_FLAGS": f"{others} {FORCED}={most}".strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from the cache dumps nothing
    }
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "jaxalign.benchmarks.lowering"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        with child:
            child.stdin.write(json.dumps([config.to_dict() for config in configs]))
            child.stdin.close()
            for line in child.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        if child.returncode:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            raise ChildProcessError(f"the step could not be compiled: {lines[-1] if lines else child.returncode}")


def main() -> None:
    """The child: configs as JSON on stdin, one line of JSON for each on stdout."""
    for config in json.load(sys.stdin):
        print(json.dumps(lower(ml_collections.ConfigDict(config))), flush=True)


if __name__ == "__main__":
    main()
