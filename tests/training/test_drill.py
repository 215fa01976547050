"""The drill, short: a few kills of a real run, most of them inside a save. Long: `python -m tests.drill`."""

import pytest

from tests import drill


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_like_an_undisturbed_one(tmp_path, kills):
    count = drill.drill(tmp_path, kills=kills)
    assert count.kills == kills and count.inside >= kills // 3, count
    assert count.leaves > 100
