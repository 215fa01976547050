"""PCA colours: one basis for the clip, the true variance, and pictures that show what they say."""

import numpy as np
import pytest
from PIL import Image

from jaxalign.figures import pca


def things(seed=0, frames=3, side=6, width=16):
    """Tokens of four things that stay where they are, with a little noise of their own each frame."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(size=(4, width))
    where = np.repeat(np.repeat(np.arange(4).reshape(2, 2), side // 2, 0), side // 2, 1)
    return (kinds[where][None] + 0.02 * rng.normal(size=(frames, side, side, width))).astype(np.float32), where


def test_one_thing_has_one_colour_in_every_frame():
    tokens, where = things()
    tokens *= np.asarray([1, 5, 0.2], np.float32)[:, None, None, None]  # lengths of tokens do not matter
    colours, share = pca.principal_colours(tokens)
    assert colours.dtype == np.uint8 and colours.shape == (3, 6, 6, 3) and share > 0.98
    means = np.asarray([colours[:, where == kind].reshape(-1, 3).mean(0) for kind in range(4)])
    spread = max(colours[:, where == kind].reshape(-1, 3).std(0).max() for kind in range(4))
    apart = min(np.linalg.norm(means[a] - means[b]) for a in range(4) for b in range(a))
    assert spread < 8 and apart > 80


def test_the_share_is_that_of_an_svd():
    tokens = np.random.default_rng(1).normal(size=(2, 5, 5, 9)).astype(np.float32)
    points = tokens.reshape(-1, 9) / np.linalg.norm(tokens.reshape(-1, 9), axis=1, keepdims=True)
    values = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    assert pca.principal_colours(tokens)[1] == pytest.approx(values[:3].sum() / values.sum(), rel=1e-5)


def test_colours_do_not_depend_on_the_basis_of_the_tokens():
    tokens = np.random.default_rng(2).normal(size=(2, 6, 6, 8)).astype(np.float32)
    turned = np.concatenate([tokens[..., 3:], np.zeros_like(tokens[..., :2]), tokens[..., :3]], -1)
    one, two = (pca.principal_colours(x)[0].astype(int) for x in (tokens, turned))
    assert all(min(np.abs(one - two)[..., c].max(), np.abs(255 - one - two)[..., c].max()) <= 1 for c in range(3))
    assert np.array_equal(one, pca.principal_colours(tokens)[0])


def test_an_outlier_does_not_grey_out_the_rest():
    tokens, _ = things(frames=4, side=20)
    tokens[0, 0, 0] = 100 * np.random.default_rng(3).normal(size=16)
    rest = pca.principal_colours(tokens)[0][1:].reshape(-1, 3)
    assert (rest.max(0).astype(int) - rest.min(0) > 150).all()


def test_nothing_to_see_is_grey():
    colours, share = pca.principal_colours(np.ones((2, 3, 3, 4), np.float32))
    assert share == 0 and (colours == 128).all()
    assert (
        pca.principal_colours(np.random.default_rng(0).normal(size=(1, 4, 4, 2)).astype(np.float32))[0].shape[-1] == 3
    )


def test_the_figure_shows_frames_and_colours(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (6, 24, 32, 3), np.uint8)
    panels = {"fine": things(frames=6)[0], "coarse in time": things(1, frames=3, side=4)[0]}
    path = tmp_path / "new" / "pca.png"
    figure = pca.pca_figure(video, panels, path, frames=3, title="a clip")
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    assert len(pictures) == 9 and np.asarray(Image.open(path)).std() > 20
    for column, (frame, coarse) in enumerate([(0, 0), (2, 1), (5, 2)]):
        assert np.array_equal(pictures[column], video[frame])
        assert np.array_equal(pictures[3 + column], pca.principal_colours(panels["fine"])[0][frame])
        assert np.array_equal(pictures[6 + column], pca.principal_colours(panels["coarse in time"])[0][coarse])
    words = {text.get_text() for text in figure.texts}
    assert {"a clip", "video", "fine", "coarse in time"} <= words
    with pytest.raises(ValueError, match="panel 'a': tokens must be"):
        pca.pca_figure(video, {"a": panels["fine"][0]})
