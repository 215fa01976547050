"""Where a run runs and what it takes: versions, devices, memory, parameter counts. Facts for reports."""

import importlib.metadata
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from clu import parameter_overview

import jaxalign
from jaxalign.training.mesh import named_leaves

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


_IMPORTED = time.monotonic()


def seconds_since_start() -> float:
    """How long this process has been running, imports included; elsewhere than on Linux, since they were done."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # proc(5): starttime, behind the command's name
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - _IMPORTED


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the packages that decide what a step computes."""
    found = {"python": platform.python_version(), "jaxalign": jaxalign.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """What equal bits depend on besides the config: devices, processes, usable cores, flags, versions.

    One core instead of two changes how XLA's CPU code splits its sums, and so the last bits (measured).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_cores": cores,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions(),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences of two environments, one line each: 'versions.jax: 0.10.2 -> 0.10.3'."""
    lines = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines


def peak_memory() -> dict[str, int]:
    """The most memory taken so far, in bytes: "host" (this process) and, where known, "device" (one)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = {"host": host if sys.platform == "darwin" else host * 1024}  # kilobytes everywhere else
    device = [(stats or {}).get("peak_bytes_in_use") for stats in (d.memory_stats() for d in jax.local_devices())]
    if known := [peak for peak in device if peak is not None]:
        peaks["device"] = max(known)
    return peaks


def count_parameters(tree: Any) -> int:
    """The number of elements of all leaves (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def parameters_by_part(tree: Any) -> dict[str, int]:
    """The number of elements under each top-level name of `tree`, in tree order."""
    counts: dict[str, int] = {}
    for name, leaf in named_leaves(tree).items():
        part = name.split(".", 1)[0]
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


def parameters_table(trees: Mapping[str, Any]) -> str:
    """clu's table (name, shape, dtype, size) of each tree, under its title."""
    parts = []
    for title, tree in trees.items():
        table = parameter_overview.get_parameter_overview(named_leaves(tree), include_stats=False)
        parts.append(f"{title}\n{table}\n")
    return "\n".join(parts)
