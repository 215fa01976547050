"""Little videos whose frames say their own number, so that a test can tell which frame it was given."""

import shutil
from fractions import Fraction

import av
import numpy as np
import pytest


def numbered_frame(number, height=48, width=64):
    """A moving gradient; the eight blocks of the top rows are the bits of the frame's number."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 3 + number, y * 4 + number, np.full_like(x, 90)], -1) % 256 // 2 + 40
    for bit in range(8):
        image[: height // 4, bit * width // 8 : (bit + 1) * width // 8] = 235 if number >> bit & 1 else 20
    return image.astype(np.uint8)


def frame_number(image):
    """The number that `numbered_frame` wrote; works on shrunk and recoded frames."""
    height, width = image.shape[:2]
    return sum(
        (image[1 : height // 6, bit * width // 8 + 2 : (bit + 1) * width // 8 - 2].mean() > 128) << bit
        for bit in range(8)
    )


def encode(
    path,
    frames,
    codec="libx264",
    rate=25,
    fmt=None,
    stamps=None,
    options=None,
    gop=12,
    b_frames=2,
    turn=0,
    container_options=None,
    pixels="yuv420p",
    lose=0,
    late=0,
):
    """Writes frames to a file; stamps: presentation times in milliseconds for a variable frame rate; lose: how many
    frames an edit list cuts away at the beginning; late: by how many frames each is shown after it is decoded."""
    tick = Fraction(1, 1000) if stamps else Fraction(1, rate)
    with av.open(str(path), "w", format=fmt, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.bit_rate = pixels, 2_000_000
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        if stamps:
            stream.codec_context.time_base = stream.time_base = tick
        if turn:
            stream.set_display_rotation(turn)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = stamps[number] if stamps else number, tick
            container.mux(_later(stream.encode(frame), late))
        container.mux(_later(stream.encode(), late))
    return cut_by_edit_list(path, lose, container_options) if lose else path


def _later(packets, late):
    for packet in packets:
        packet.pts += late
    return packets


def cut_by_edit_list(path, frames, options):
    """What `ffmpeg -ss … -c copy` leaves: packets from before time 0, which decoders need and nobody is shown."""
    whole = path.with_name(f"whole-{path.name}")
    path.rename(whole)
    with av.open(str(whole)) as source, av.open(str(path), "w", options=options or {}) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                earlier = int(frames / (stream.average_rate * stream.time_base))
                packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, copy
                container.mux(packet)
    whole.unlink()
    return path


def encode_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    """numbered(path, frames=60, **encode's) writes a file of numbered frames, encoding each kind only
    once."""
    kept, folder = {}, tmp_path_factory.mktemp("numbered")

    def make(path, frames=60, first=0, **settings):
        kind = (path.suffix, frames, first, repr(settings))
        if kind not in kept:
            images = [numbered_frame(first + k) for k in range(frames)]
            kept[kind] = encode(folder / f"{len(kept)}{path.suffix}", images, **settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept[kind], path)
        return path

    make.number, make.frame, make.encode, make.audio = frame_number, numbered_frame, encode, encode_audio
    return make


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
