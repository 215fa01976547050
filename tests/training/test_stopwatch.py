"""Rates, MFU, and which host keeps the others waiting."""

import time

import numpy as np
import pytest

from jaxalign.training import stopwatch
from jaxalign.training.stopwatch import SlowHosts, Stopwatch, slow_processes


def test_rates_leave_pauses_out_and_know_flops(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch(tokens_per_step=50, peak=4000.0)
    for seconds in (30.0, 2.0, 2.0):  # the first compiles
        now[0] += seconds
        watch.count()
    with watch.paused():
        now[0] += 500.0
    assert watch.rates() == {"steps_per_second": 0.5, "tokens_per_second": 25.0, "data_wait_share": 0.0}
    watch.flops_per_step = 1600
    found = watch.rates()
    assert (found["flops_per_step"], found["flops_per_second"], found["mfu"]) == (1600, 800.0, 0.2)
    unknown = Stopwatch(1)
    unknown.flops_per_step = 1
    unknown.count()
    unknown.count()
    now[0] += 1
    assert "flops_per_second" in unknown.rates() and "mfu" not in unknown.rates()


def test_an_interval_tells_the_host_from_the_devices(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch(1)
    assert watch.interval() is None
    watch.count()
    for _ in range(4):
        with watch.waiting():
            now[0] += 1.0
        with watch.blocked():
            now[0] += 3.0
        with watch.paused():
            now[0] += 7.0
        watch.count()
    assert watch.interval() == pytest.approx((4.0, 1.0))
    assert watch.interval() is None


def test_a_slow_host_is_slow_three_times_and_by_much():
    even = [(1.0, 0.2)] * 4
    late = [(1.0, 0.2), (1.0, 0.2), (1.0, 0.6), (1.0, 0.2)]
    assert slow_processes([late, late]) == []
    assert slow_processes([even, late, late]) == []
    assert slow_processes([late, late, late]) == [2]
    assert slow_processes([late, late, late, even]) == []
    little = [(1.0, 0.001), (1.0, 0.005)]  # five times as much of nothing
    assert slow_processes([little] * 3) == []
    assert slow_processes([[(1.0, 0.1), (1.0, 0.9)]] * 3) == [1]


def test_it_is_named_once(monkeypatch):
    said = []
    monkeypatch.setattr(stopwatch.jax, "process_count", lambda: 2)
    monkeypatch.setattr(stopwatch.multihost_utils, "process_allgather", lambda x: np.array([[1.0, 0.1], [1.0, 0.8]]))
    monkeypatch.setattr(stopwatch.processes, "gather", lambda facts: [{"host": "alpha"}, {"host": "beta"}])
    slow = SlowHosts(said.append)
    for _ in range(6):
        slow((1.0, 0.1))
    assert len(said) == 1 and said[0].startswith("warning: process 1 of 2 on beta keeps the others waiting")
    slow(None)
