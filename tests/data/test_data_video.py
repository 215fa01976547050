"""Frames are the right frames, whatever the container does with time; bad files fail with a reason."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from jaxalign.data import frame_index, video
from jaxalign.data.sources import demo
from jaxalign.data.video import UnreadableVideo, cover_size, index_frames, probe, read_frames, read_span

UNEVEN = np.cumsum(np.random.default_rng(0).integers(10, 90, 60)).tolist()
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0:b-adapt=0:log-level=none"}
B_FRAMES = {"x264-params": "bframes=2:b-adapt=0:scenecut=0:log-level=none"}
STRAIGHT = {"options": {"x264-params": "bframes=0:scenecut=0:log-level=none"}, "b_frames": 0}
KINDS = {
    "straight.mp4": STRAIGHT,
    "straight.mov": STRAIGHT,
    "straight-uneven.mp4": STRAIGHT | {"stamps": UNEVEN},
    "straight-fragmented.mp4": STRAIGHT | {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "straight-edited.mp4": STRAIGHT | {"frames": 80, "lose": 20},
    # Every frame is shown two (one) after it is decoded: a file's own index is looked at, and not taken.
    "late.mp4": STRAIGHT | {"late": 2},
    "late.mov": STRAIGHT | {"late": 1, "container_options": {"use_editlist": "0"}},
    "vp9.mp4": {"codec": "libvpx-vp9", "b_frames": 0, "options": {"deadline": "realtime", "cpu-used": "8"}},
    "b-frames.mp4": {"options": B_FRAMES},
    "open-gop.mp4": {"options": OPEN_GOP},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "uneven.mp4": {"stamps": UNEVEN},
    "uneven.mkv": {"stamps": UNEVEN},
    "mpeg2-program.mpg": {"codec": "mpeg2video", "fmt": "mpeg"},
    "mpeg1-program.mpg": {"codec": "mpeg1video", "fmt": "mpeg"},
    "transport.ts": {"fmt": "mpegts"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "h264.avi": {"options": B_FRAMES},
    "vp8.webm": {"codec": "libvpx", "b_frames": 0},
    # Frames 0 to 19 are cut away: within the only group of pictures, and with a group before the one that is cut.
    "edited-in-one-group.mp4": {"frames": 80, "lose": 20, "gop": 250},
    "edited.mp4": {"frames": 80, "lose": 20, "options": B_FRAMES},
    "edited-mpeg4.mp4": {"frames": 80, "lose": 20, "codec": "mpeg4", "b_frames": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_a_full_decode(kind, tmp_path, numbered):
    path, lost = str(numbered(tmp_path / kind, **KINDS[kind])), KINDS[kind].get("lose", 0)

    def number_of(image):
        return numbered.number(image) - lost

    assert probe(path).frames == len(index_frames(path)) == 60
    with av.open(path) as container:  # the reference: everything, in the order in which it comes out
        whole = [frame.to_ndarray(format="rgb24", interpolation=video._BICUBIC) for frame in container.decode(video=0)]
    assert len(whole) == 60 and [number_of(image) for image in whole] == list(range(60))
    for start, step in [(0, 1), (11, 1), (12, 2), (23, 3), (27, 1), (35, 1), (44, 2), (52, 1)]:
        numbers = list(range(start, min(start + 8 * step, 60), step))
        frames = read_frames(path, numbers)
        assert [number_of(image) for image in frames] == numbers
        np.testing.assert_array_equal(frames, np.stack([whole[number] for number in numbers]))
    np.testing.assert_array_equal(read_frames(path, [40, 7]), np.stack([whole[40], whole[7]]))
    assert [number_of(read_frames(path, [number])[0]) for number in range(1, 60, 2)] == list(range(1, 60, 2))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith(("mp4", "mov"))])
def test_a_files_own_index_is_taken_where_it_is_exact_only(kind, tmp_path, numbered, monkeypatch):
    path, packets, demux = str(numbered(tmp_path / kind, **KINDS[kind])), [], frame_index.demux
    monkeypatch.setattr(frame_index, "demux", lambda *of: (packets.append(packet) or packet for packet in demux(*of)))
    taken = frame_index._index(path)
    with av.open(path) as container:
        assert taken.pts.tolist() == [frame.pts for frame in container.decode(video=0)]
    exact = kind in ("straight.mp4", "straight.mov", "straight-uneven.mp4", "vp9.mp4")
    assert (len(packets) <= 8) == exact  # not the whole file
    monkeypatch.setattr(frame_index, "_listed", lambda *of: None)
    asked = frame_index._index(path)
    for name in ("pts", "seek", "key"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(asked, name))
    assert taken.by_order == asked.by_order


def test_an_index_that_its_packets_belie_is_not_taken(tmp_path, numbered, monkeypatch):
    path = str(numbered(tmp_path / "b-frames.mp4", options=B_FRAMES))

    class Lying:
        has_b_frames = False
        codec = type("Codec", (), {"canonical_name": "h264"})

    with video.opened(path) as (container, stream):
        fake = type("Stream", (), {"index_entries": stream.index_entries, "frames": stream.frames})
        fake.codec_context = Lying
        monkeypatch.setattr(frame_index, "demux", lambda *_: container.demux(stream))
        assert frame_index._listed(path, container, fake) is None


def test_threads_wait_for_one_reading_of_a_file(tmp_path, numbered, monkeypatch):
    path = str(numbered(tmp_path / "a.mp4"))
    readings, genuine = [], frame_index.whole_packets

    def slowly(path):
        readings.append(path)
        time.sleep(0.1)
        return genuine(path)

    monkeypatch.setattr(frame_index, "whole_packets", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert {len(index) for index in pool.map(index_frames, [path] * 4)} == {60}
    assert len(readings) == 1


@pytest.mark.parametrize("item", range(3))
def test_demo_clips_are_read_exactly(item):
    source = demo()
    path, frames = source.read.paths[item], source.items[item].frames
    with av.open(path) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps == index_frames(path).pts.tolist() and len(stamps) == frames
    whole, thumbs = read_span(path, 0, frames, 1, (24, 32))
    for start, step in [(frames // 2 - 3, 2), (frames - 8, 1)]:
        clip, small = (
            read_span(path, start, start + 7 * step + 1, step, (24, 32))
            if step == 1
            else (read_frames(path, range(start, start + 8 * step, step), cover=(24, 32)), None)
        )
        np.testing.assert_array_equal(clip, whole[start : start + 8 * step : step])
        assert small is None or np.array_equal(small, thumbs[start : start + 8])


def test_one_seek_and_only_the_needed_frames(tmp_path, numbered, monkeypatch):
    path = str(numbered(tmp_path / "long.mp4", frames=120))
    index_frames(path)
    decoded, passes = [], []
    genuine, sweep = video._frames_of, video._sweep
    monkeypatch.setattr(video, "_frames_of", lambda packet: decoded.append(packet.pts) or genuine(packet))
    monkeypatch.setattr(video, "_sweep", lambda *given: passes.append(given[-1]) or sweep(*given))
    read_frames(path, range(100, 108))
    assert len(passes) == 1 and passes[0] is not None  # one pass, and it began with a seek
    assert len(decoded) < 30  # the clip, its way from the keyframe, and the decoder's delay; not 108


def test_files_that_stay_open_and_known_thumbnails_change_no_pixel(tmp_path, numbered, monkeypatch):
    path = str(numbered(tmp_path / "a.mp4", frames=60))
    places = [
        (int(start), int(start) + 9, step)
        for start, step in zip([0, 30, 12, 48, 3, 30, 12, 0], [2, 3] * 4, strict=True)
    ]
    kept = [video.read_span(path, *place, (24, 32)) for place in places]
    assert video.known_thumbnails(path, 30, 39) is not None and video.known_thumbnails(path, 20, 31) is None
    monkeypatch.setattr(video, "known_thumbnails", lambda *place: None)
    monkeypatch.setattr(video._kept, "take", lambda path: None)
    for place, clip in zip(places, kept, strict=True):
        for one, other in zip(clip, video.read_span(path, *place, (24, 32)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_file_that_was_written_anew_is_opened_anew(tmp_path, numbered):
    path = str(numbered(tmp_path / "a.mp4", frames=20))
    assert numbered.number(read_frames(path, [7])[0]) == 7
    numbered(tmp_path / "a.mp4", frames=20, first=40)
    assert numbered.number(read_frames(path, [7])[0]) == 47


def test_frames_lost_after_a_seek_are_decoded_from_the_beginning(tmp_path, numbered, monkeypatch):
    path = str(numbered(tmp_path / "a.mp4"))
    right = read_frames(path, range(40, 48))
    sweep, from_start = video._sweep, []

    def loses_one(*given):
        found = sweep(*given)
        found.pop(43, None)
        return found

    in_order = video._sweep_in_order
    monkeypatch.setattr(video, "_sweep", loses_one)
    monkeypatch.setattr(video, "_sweep_in_order", lambda *given: from_start.append(1) or in_order(*given))
    np.testing.assert_array_equal(read_frames(path, range(40, 48)), right)
    assert from_start == [1]


def test_frames_by_time_follow_the_timestamps(tmp_path, numbered):
    path = str(numbered(tmp_path / "uneven.mkv", stamps=UNEVEN))
    for number in (0, 5, 31, 59):
        seconds = (UNEVEN[number] - UNEVEN[0]) / 1000
        assert numbered.number(read_frames(path, times=[seconds + 0.004])[0]) == number
    assert numbered.number(read_frames(path, times=[100.0])[0]) == 59


def test_sizes_turned_and_square_pixels(tmp_path, numbered):
    upright = read_frames(str(numbered(tmp_path / "plain.mp4")), range(3))
    for turn, quarters in ((90, 1), (-90, 3), (180, 2)):
        turned = str(numbered(tmp_path / f"{turn}.mp4", turn=turn))
        np.testing.assert_array_equal(read_frames(turned, range(3)), np.rot90(upright, quarters, axes=(1, 2)))
        assert read_frames(turned, [0], cover=(20, 20)).shape == ((1, 27, 20, 3) if turn != 180 else (1, 20, 27, 3))
    wide = demo().read.paths[2]  # carphone: 176×144 with pixels of 128:117
    assert probe(wide).width == 193 and read_frames(wide, [0]).shape == (1, 144, 193, 3)
    assert cover_size(48, 64, (24, 24)) == (24, 32) and cover_size(48, 64, (96, 200)) == (150, 200)


def test_shrinking_does_not_alias(tmp_path, numbered):
    stripes = np.zeros((96, 128, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: picking every fourth column would give black or white
    path = numbered.encode(tmp_path / "stripes.avi", [stripes] * 2, codec="ffv1", pixels="bgr0", b_frames=0)
    small = read_frames(str(path), [0], cover=(24, 32))[0]
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() < 12


def _cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def test_bad_files_say_what_is_wrong(tmp_path, numbered):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.avi").write_text("no video at all\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    numbered.audio(tmp_path / "sound.mp4")
    _cut(numbered(tmp_path / "no-index.mp4"), 0.6)
    _cut(numbered(tmp_path / "index-first.mp4", container_options={"movflags": "faststart"}), 0.7)
    _cut(numbered(tmp_path / "half.avi", codec="mpeg4"), 0.5)
    edited = numbered(tmp_path / "edited.mp4", frames=80, lose=20, container_options={"movflags": "faststart"})
    assert probe(str(edited)).frames == 60
    _cut(edited, 0.7)
    expected = {
        "empty.mp4": "empty",
        "text.avi": "not a video",
        "sound.mp4": "audio only",
        "gone.mp4": "gone",
        "no-index.mp4": "cut short",
        "index-first.mp4": "cut short",
        "half.avi": "cut short",
        "edited.mp4": "cut short",
        "folder.mp4": "",
    }
    for name, words in expected.items():
        with pytest.raises(UnreadableVideo) as caught:
            probe(str(tmp_path / name))
        assert words in caught.value.why and name in str(caught.value) and "\n" not in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))  # it travels from decode workers
        assert (again.path, again.why) == (caught.value.path, caught.value.why)


def test_a_cut_stream_gives_what_is_there(tmp_path, numbered):
    path = str(_cut(numbered(tmp_path / "cut.ts", fmt="mpegts"), 0.6))
    frames = probe(path).frames
    assert 20 < frames < 50
    assert [numbered.number(image) for image in read_frames(path, range(10, 18))] == list(range(10, 18))
    with pytest.raises(UnreadableVideo):
        read_span(path, 50, 58, 1, (24, 32))
    with pytest.raises(ValueError, match="asked for"):
        read_frames(path, [frames])


def test_damage_inside_a_file_is_survived(tmp_path, numbered):
    data = bytearray(numbered(tmp_path / "a.mp4").read_bytes())
    path = tmp_path / "damaged.mp4"
    for seed in range(6):
        damaged, rng = data.copy(), np.random.default_rng(seed)
        start = int(rng.integers(len(data) // 4, len(data) * 3 // 4))
        damaged[start : start + 300] = rng.bytes(300)
        path.write_bytes(damaged)
        try:  # frames or a reason, nothing else
            frames = read_frames(str(path), range(10, 40))
            assert frames.shape == (30, 48, 64, 3)
        except UnreadableVideo as error:
            assert error.why


def test_a_replaced_file_gets_an_index_of_its_own(tmp_path, numbered):
    path = str(numbered(tmp_path / "a.mp4", frames=60))
    assert len(index_frames(path)) == 60
    numbered(tmp_path / "b.mp4", frames=40).replace(path)
    assert len(index_frames(path)) == 40 and len(read_frames(path)) == 40
