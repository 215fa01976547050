"""Videos, grids and curves as files: decoded again, they are what went in."""

import av
import matplotlib
import numpy as np
import pytest
from PIL import Image

from jaxalign.figures import curves
from jaxalign.figures import video as videos


def clips(count=3, frames=6, height=18, width=26):
    """Smooth moving gradients: video coders change them little."""
    t, y, x = np.mgrid[:frames, :height, :width]
    channels = [np.stack([8 * x + 3 * t, 10 * y, 40 * k + 5 * t + 0 * x], -1) for k in range(count)]
    return np.stack(channels).clip(0, 255).astype(np.uint8)


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate), stream.codec_context.name


@pytest.mark.parametrize("height, width", [(18, 26), (17, 25)])
def test_mp4_keeps_frames_rate_and_picture(tmp_path, height, width):
    video = clips(1, height=height, width=width)[0]
    path = videos.write_mp4(tmp_path / "new" / "a.mp4", video, 12.5)
    found, fps, codec = decode(path)
    assert found.shape == (6, height + height % 2, width + width % 2, 3)  # odd sides are padded
    assert fps == pytest.approx(12.5) and codec == "h264"
    assert np.abs(found[:, :height, :width].astype(float) - video).mean() < 4
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_mp4_without_an_h264_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "_encoder", lambda: "mpeg4")
    found, fps, codec = decode(videos.write_mp4(tmp_path / "a.mp4", clips(1)[0], 8))
    assert found.shape == (6, 18, 26, 3) and fps == 8 and codec == "mpeg4"
    assert np.abs(found.astype(float) - clips(1)[0]).mean() < 6


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = videos.write_mp4(tmp_path / "a.mp4", clips(1)[0], 8)
    before = path.read_bytes()
    monkeypatch.setattr(videos.av.VideoFrame, "from_ndarray", lambda *a, **k: 1 / 0, raising=False)
    with pytest.raises((ZeroDivisionError, TypeError)):
        videos.write_mp4(path, clips(1)[0] // 2, 8)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_gif_has_every_frame(tmp_path):
    video = clips(1)[0]
    gif = Image.open(videos.write_gif(tmp_path / "a.gif", video, 10))
    assert gif.n_frames == 6 and gif.info["duration"] == 100 and gif.info["loop"] == 0
    gif.seek(3)
    assert np.abs(np.asarray(gif.convert("RGB")).astype(float) - video[3]).mean() < 12


def test_grid_and_film_strips_place_every_clip():
    three = clips(3)
    sheet = videos.grid(three, border=2)
    assert sheet.shape == (6, 2 * 20 + 2, 2 * 28 + 2, 3)
    assert np.array_equal(sheet[:, 2:20, 2:28], three[0])
    assert np.array_equal(sheet[:, 2:20, 30:56], three[1])
    assert np.array_equal(sheet[:, 22:40, 2:28], three[2])
    assert (sheet[:, 22:, 28:] == 255).all() and (sheet[:, :2] == 255).all()

    strips = videos.film_strips(three, frames=3, border=1)
    assert strips.shape == (3 * 19 + 1, 3 * 27 + 1, 3)
    for row in range(3):
        for column, frame in enumerate((0, 2, 5)):
            place = strips[1 + row * 19 : 19 + row * 19, 1 + column * 27 : 27 + column * 27]
            assert np.array_equal(place, three[row, frame])


def test_enlarge_repeats_pixels(tmp_path):
    video = clips(1)[0]
    large = videos.enlarge(video, 50)
    assert large.shape == (6, 54, 78, 3) and np.array_equal(large[:, 1::3, 2::3], video)
    assert videos.enlarge(video, 10).shape == video.shape
    path = videos.write_png(tmp_path / "a.png", large[0])
    assert np.array_equal(np.asarray(Image.open(path)), large[0])


def test_smoothing_is_a_mean_that_skips_what_is_not_finite():
    assert np.allclose(curves.smooth([3.0] * 10, 2.0), 3.0)
    found = curves.smooth([1.0, float("nan"), 3.0], 1.0)
    assert found[:2].tolist() == [1.0, 1.0] and found[2] == pytest.approx((0.25 * 1 + 3) / 1.25)
    assert np.isnan(curves.smooth([float("nan")], 1.0)).all()


def test_curves_draw_every_quantity_of_every_run(tmp_path):
    rows = [{"step": s, "loss": 1 / (1 + s), **({"held out": 0.5} if s == 40 else {})} for s in range(80)]
    figure = curves.loss_curves({"tsa": rows, "plain": [{"step": 1, "loss": float("nan")}]}, tmp_path / "a" / "c.png")
    loss, held_out = figure.axes
    assert loss.get_title() == "loss" and held_out.get_title() == "held out"
    thin, bold, other = loss.lines
    assert np.allclose(thin.get_ydata(), [row["loss"] for row in rows])
    assert bold.get_label() == "tsa" and other.get_label() == "plain" and loss.get_yscale() == "log"
    assert held_out.lines[0].get_marker() == "o" and held_out.lines[0].get_ydata().tolist() == [0.5]
    image = np.asarray(Image.open(tmp_path / "a" / "c.png").convert("L"))
    assert image.shape[0] > 200 and image.std() > 5
    assert "matplotlib.pyplot" not in vars(matplotlib) or not matplotlib.pyplot.get_fignums()
    with pytest.raises(ValueError, match="no row holds"):
        curves.loss_curves([{"step": 1}])
