"""The tokens of step 0 that the correspondence figure keeps."""

import numpy as np
import pytest

from jaxalign.training.showing import Correspondence


@pytest.fixture
def figure():
    """As the figure of a run is before it is drawn; nothing is compiled."""
    one = Correspondence.__new__(Correspondence)
    one.initial, one.note = None, ""
    one.batch = {"video": np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(1, 2, 4, 4, 3)}
    return one


def test_tokens_of_step_0_are_of_their_clip_or_are_left_out(figure, tmp_path):
    path, tokens = tmp_path / "figures" / "tokens_000000.npz", np.ones((2, 1, 1, 3), np.float32)
    figure._read(path)
    assert figure.initial is None and "cannot be read" in figure.note
    figure.initial, figure.note = tokens, ""
    figure._keep(path)
    figure.initial = None
    figure._read(path)
    np.testing.assert_array_equal(figure.initial, tokens)
    figure.initial, figure.batch = None, {"video": figure.batch["video"][:, ::-1]}
    figure._read(path)
    assert figure.initial is None and "is of another clip" in figure.note
    path.unlink()
    np.save(path.with_suffix(".npy"), tokens)  # by an earlier version
    figure._read(path)
    np.testing.assert_array_equal(figure.initial, tokens)


def test_a_full_disk_costs_the_panel_and_not_the_run(figure, tmp_path):
    (tmp_path / "figures").write_text("a file where the folder should be")
    figure.initial = np.ones(3)
    figure._keep(tmp_path / "figures" / "tokens_000000.npz")
    assert "will not show step 0" in figure.note
    for name in ("half.npz", "half.npy"):
        (tmp_path / name).touch()
        figure._read(tmp_path / "half.npz")
        assert "cannot be read" in figure.note
        (tmp_path / "half.npz").unlink(missing_ok=True)
