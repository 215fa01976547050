"""Training on a mesh equals training on one device, and its memory falls; all in one process with 8 forced devices."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest


def lines(*arguments: str) -> list[str]:
    """The first word of every line that the script prints."""
    script = pathlib.Path(__file__).with_name("sharded_training.py")
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}  # configs/ is no part of the package
    if cache := jax.config.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    command = [sys.executable, script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line.split()[0] for line in run.stdout.splitlines()]


def test_on_eight_devices():
    assert lines() == ["sentences"] + ["memory"] * 3 + ["same"] * 5 + ["restored"] * 2


@pytest.mark.slow
def test_cogvideox_on_eight_devices():
    assert lines("cogvideox") == ["same"] * 3
