"""Hangs, recompilations and profiles are noticed, and said in one line."""

import time

import jax
import jax.numpy as jnp

from jaxalign.training.watchdog import Profile, Recompilations, Watchdog


def wait_until(true, seconds=20):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def test_a_hang_is_said_with_its_stacks(tmp_path):
    said = []
    with Watchdog(0.2, tmp_path, said.append) as dog:
        time.sleep(0.5)  # compiling: nothing was alive yet
        dog.alive()
        dog.rest()
        time.sleep(0.5)
        assert said == []
        dog.alive()
        assert wait_until(lambda: said)
    assert "process 0 of 1" in said[0] and "no step was done for 0.2 s" in said[0] and "waiting on" in said[0]
    stacks = (tmp_path / "hang_process_0.txt").read_text()
    assert "wait_until" in stacks and "test_a_hang_is_said" in stacks
    with Watchdog(0, tmp_path, said.append) as dog:
        dog.alive()


def test_compiling_again_is_said_once():
    said = []
    step = jax.jit(lambda x: x + 1)
    watch = Recompilations(step, said.append)
    for number, size in enumerate((2, 2, 3, 4), start=1):
        step(jnp.zeros(size))
        watch.check(number)
    assert len(said) == 1 and "compiled again at step 3" in said[0]


def test_profile(tmp_path):
    said = []
    step = jax.jit(lambda x: x * 2)
    none, profile = Profile(0, tmp_path / "none", 10, said.append), Profile(2, tmp_path, 10, said.append)
    x = jnp.ones(3)
    for number in range(11, 18):
        none.before(number, 17)
        profile.before(number, 17)
        assert profile.running == (number in (13, 14))
        x = step(x)
    profile.stop(x)
    assert len(said) == 1 and said[0].startswith("profile of steps 13 … 14")
    assert list(tmp_path.rglob("*.xplane.pb")) and not (tmp_path / "none").exists()
    cut = Profile(100, tmp_path / "cut", 0, said.append)
    for number in range(1, 5):
        cut.before(number, 4)
        x = step(x)
    cut.stop(x)
    assert list((tmp_path / "cut").rglob("*.xplane.pb"))
