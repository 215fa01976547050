"""Videos as files that people can open: MP4, GIF, PNG film strips, grids of clips. uint8, frames first."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxalign.interop import sealed

BORDER = 2  # pixels between the clips of a grid
PAPER = 255  # their colour


@contextlib.contextmanager
def _whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` at the end: nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = sealed.unfinished(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def enlarge(video: UInt8[np.ndarray, "... h w 3"], least: int) -> UInt8[np.ndarray, "... H W 3"]:
    """Repeat pixels by the smallest whole factor that makes the shorter side at least `least` pixels long."""
    factor = max(1, math.ceil(least / min(video.shape[-3:-1])))
    return video.repeat(factor, axis=-3).repeat(factor, axis=-2)


def grid(
    videos: UInt8[np.ndarray, "b t h w 3"], *, columns: int | None = None, border: int = BORDER
) -> UInt8[np.ndarray, "t H W 3"]:
    """Clips side by side with a thin border, row by row; `columns` defaults to about a square."""
    count, frames, height, width, _ = videos.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    step = (height + border, width + border)
    sheet = np.full((frames, rows * step[0] + border, columns * step[1] + border, 3), PAPER, np.uint8)
    for index, video in enumerate(videos):
        top, left = border + index // columns * step[0], border + index % columns * step[1]
        sheet[:, top : top + height, left : left + width] = video
    return sheet


def film_strips(
    videos: UInt8[np.ndarray, "b t h w 3"], *, frames: int = 8, border: int = BORDER
) -> UInt8[np.ndarray, "H W 3"]:
    """One picture: a clip a row, at most `frames` evenly spaced frames of it in the columns."""
    picked = np.unique(np.linspace(0, videos.shape[1] - 1, min(frames, videos.shape[1])).round().astype(int))
    stills = videos[:, picked].reshape(-1, 1, *videos.shape[2:])
    return grid(stills, columns=len(picked), border=border)[0]


def write_png(path: str | Path, image: UInt8[np.ndarray, "h w 3"]) -> Path:
    """Write an image; returns the path."""
    with _whole_file(path) as file:
        file.write_bytes(png_bytes(image))
    return Path(path)


def png_bytes(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def gif_bytes(video: UInt8[np.ndarray, "t h w 3"], fps: float | int) -> bytes:
    """An endless GIF; every frame has its own 256 colours. GIF counts time in hundredths of a second."""
    frames = [Image.fromarray(frame).quantize(256) for frame in video]
    buffer = io.BytesIO()
    duration = max(20, round(100 / fps) * 10)  # milliseconds; players slow down what is shorter than 20
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=False)
    return buffer.getvalue()


def write_gif(path: str | Path, video: UInt8[np.ndarray, "t h w 3"], fps: float | int) -> Path:
    """Write a GIF; returns the path."""
    with _whole_file(path) as file:
        file.write_bytes(gif_bytes(video, fps))
    return Path(path)


def _encoder() -> str:
    """H.264 where this build of FFmpeg has an encoder for it (every player knows it), else MPEG-4 part 2."""
    for name in ("libx264", "libopenh264"):
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name
    return "mpeg4"


def write_mp4(path: str | Path, video: UInt8[np.ndarray, "t h w 3"], fps: float | int) -> Path:
    """Write an MP4 in H.264 (MPEG-4 part 2 where that is missing); returns the path.

    Players want 4:2:0 colour, which wants even sides: an odd last row or column is repeated once.
    Raises OSError when it cannot be written.
    """
    height, width = video.shape[1:3]
    video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    encoder = _encoder()
    # `faststart` puts the index in front: browsers begin to play before they have the whole file.
    options = {"movflags": "faststart"}
    with _whole_file(path) as file, av.open(str(file), "w", format="mp4", options=options) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        if encoder == "libx264":
            stream.options = {"crf": "14", "preset": "medium"}
        else:
            stream.bit_rate = max(1_000_000, video.shape[1] * video.shape[2] * int(max(fps, 1)))
        for image in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def read_mp4(path: str | Path) -> UInt8[np.ndarray, "t h w 3"]:
    """Every frame of a file that was written here."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
