"""The drill, short: a tiny run is killed twice, at least once inside a save. Long: `python -m tests.drill`."""

import pytest

from tests import drill


@pytest.mark.parametrize(
    ("kills", "least", "tiny"), [(2, 1, True), pytest.param(50, 16, False, marks=pytest.mark.slow)]
)
def test_killed_runs_end_like_an_undisturbed_one(tmp_path, kills, least, tiny):
    count = drill.drill(tmp_path, kills=kills, least=least, tiny=tiny)
    assert count.kills >= kills and count.inside >= least, count
    assert count.leaves > 100
