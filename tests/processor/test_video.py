"""Frames of videos: which, when, upright, and as far as the file is whole; little memory; bad input in one sentence."""

import json
import re
import warnings
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini.processor import FrameSampling, choose_frames, frames_of, kind_of_file, spread, video
from llava_mini.processor.video import chunks
from tests.processor.clips import index_of, shade, write_clip

ALL = FrameSampling(all_frames=True)


def seen(source, total: int, sampling: FrameSampling | None = None) -> list[int]:
    return [index_of(frame.image, total) for frame in frames_of(source, sampling or FrameSampling())]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.flv", "clip.h264"])
@pytest.mark.parametrize("num_frames", [1, 3, 8, 40])
def test_evenly_spread_frames_follow_the_released_rule_in_every_container(name, num_frames, tmp_path):
    clip = write_clip(tmp_path / name, 40)
    assert seen(clip, 40, FrameSampling(num_frames=num_frames)) == spread(40, num_frames)


@pytest.mark.parametrize("key_frames", [1, 7, 100])
def test_jumping_to_key_frames_changes_nothing(key_frames, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 60, key_frames=key_frames)
    assert seen(clip, 60, FrameSampling(num_frames=4)) == spread(60, 4)
    assert seen(clip, 60, ALL) == list(range(60))


def test_frames_between_sparse_ones_are_not_all_decoded(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", 60, key_frames=5)
    decoded = []
    number = video._Decoder._number
    monkeypatch.setattr(video._Decoder, "_number", lambda self, frame: decoded.append(frame.pts) or number(self, frame))
    assert seen(clip, 60, FrameSampling(num_frames=3)) == spread(60, 3)
    assert 3 <= len(decoded) <= 3 * 5


def test_one_frame_per_second_is_the_default_and_the_rate_can_be_chosen(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 40, rate=10)
    assert seen(clip, 40) == choose_frames(40, 10, FrameSampling()) == spread(40, 4)
    assert seen(clip, 40, FrameSampling(fps=2)) == spread(40, 8)
    assert seen(clip, 40, FrameSampling(max_frames=2)) == spread(40, 2)
    assert len(seen(clip, 40, FrameSampling(fps=0.1))) == 1


@pytest.mark.parametrize("fps", [11, 1e9, 1e308])
def test_above_the_rate_of_the_video_every_frame_is_seen_once(fps, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 20, rate=10)
    assert seen(clip, 20, FrameSampling(fps=fps)) == list(range(20))
    assert seen(clip, 20, FrameSampling(fps=fps, max_frames=4)) == spread(20, 4)


def test_more_frames_than_fit_are_refused_where_the_rate_is_not_constant(tmp_path):
    clip = write_clip(tmp_path / "variable.mkv", 4, times=[0, 100, 200, 3000])
    assert len(seen(clip, 4, FrameSampling(fps=1e308, max_frames=5))) == 5
    with pytest.raises(ValueError, match="more than 1000000 frames"):
        seen(clip, 4, FrameSampling(fps=1e308))


def test_a_clip_under_one_second_gives_one_frame(tmp_path):
    assert len(seen(write_clip(tmp_path / "short.mp4", 4, rate=10), 4)) == 1
    assert len(seen(write_clip(tmp_path / "one.mp4", 1, rate=10), 1)) == 1


def test_frames_know_when_they_are_shown(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 40, rate=10)
    times = [frame.time for frame in frames_of(clip, FrameSampling(num_frames=5))]
    np.testing.assert_allclose(times, [index / 10 for index in spread(40, 5)], atol=1e-3)


def test_a_variable_rate_is_sampled_by_time_stamps(tmp_path):
    times = [*range(0, 1000, 50), *range(1000, 9000, 1000)]  # 20 frames in the first second, then one per second
    clip = write_clip(tmp_path / "variable.mkv", 28, times=times)
    frames = list(frames_of(clip, FrameSampling()))
    assert len(frames) == 8
    assert [index_of(frame.image, 28) for frame in frames] == [10, 20, 21, 22, 23, 24, 25, 26]
    for frame, moment in zip(frames, range(8), strict=True):
        assert frame.time is not None
        assert frame.time <= moment + 0.6


def test_two_frames_close_together_and_one_late_are_all_seen_when_all_are_wanted(tmp_path):
    clip = write_clip(tmp_path / "variable.mp4", 5, times=[0, 10, 20, 3000, 3010])
    assert seen(clip, 5, ALL) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("rotation", "corner"), [(90, (0, 0)), (180, (1, 0)), (270, (1, 1)), (0, (0, 1))])
def test_a_video_is_turned_as_its_metadata_says(rotation, corner, tmp_path):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, 32:] = 255  # upper right
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(rotation)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (frame,) = frames_of(tmp_path / "turned.mp4", FrameSampling())
    assert frame.image.size == ((32, 64) if rotation % 180 else (64, 32))
    image = np.asarray(frame.image.resize((2, 2), Image.Resampling.BOX))[:, :, 0]
    assert np.unravel_index(image.argmax(), image.shape) == corner


def test_a_resolution_that_changes_mid_stream_is_followed(tmp_path):
    first = write_clip(tmp_path / "a.ts", 10, size=(32, 32))
    second = write_clip(tmp_path / "b.ts", 10, size=(64, 48), times=[1000 + 100 * i for i in range(10)])
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.warns(UserWarning, match="marks a part of itself as lost"):  # the count of packets starts anew
        sizes = [frame.image.size for frame in frames_of(tmp_path / "both.ts", ALL)]
    assert {*sizes} == {(32, 32), (64, 48)}
    assert len(sizes) >= 19


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_cut_off_file_gives_what_is_there_and_says_so(name, tmp_path):
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    whole = write_container(tmp_path / name, options)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * 6 // 10])
    with pytest.warns(UserWarning, match=r"damaged after \d\.\d\d s") as caught:
        indices = seen(whole, 50, ALL)
    assert indices == list(range(len(indices)))
    assert 20 < len(indices) < 40
    assert len(caught) == 1


def test_a_cut_off_file_is_refused_where_videos_have_to_be_whole(tmp_path):
    clip = write_container(tmp_path / "cut.mkv", {})
    frames = list(frames_of(clip, ALL, whole=True))
    assert len(frames) == 50
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size * 6 // 10])
    with pytest.raises(ValueError, match=r"damaged after \d\.\d\d s .* Get the file again"):
        list(frames_of(clip, ALL, whole=True))


@pytest.mark.parametrize("num_frames", [1, 2])
def test_what_can_be_decoded_before_the_first_wanted_frame_is_seen(num_frames, tmp_path):
    clip = write_container(tmp_path / "holes.mp4", {"movflags": "faststart"}, key_frames=5)
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat")
    hole = start + (len(data) - start) // 10
    data[hole:] = bytes(len(data) - hole)
    clip.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged after"):
        frames = list(frames_of(clip, FrameSampling(num_frames=num_frames)))
    assert len(frames) == 1


def test_frames_that_the_decoder_holds_back_are_seen_before_the_damage(tmp_path):
    clip = write_container(tmp_path / "hole.mp4", {"movflags": "faststart"}, key_frames=50)
    data = clip.read_bytes()
    with av.open(str(clip)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    clip.write_bytes(data[: places[20]] + bytes(len(data) - places[20]))
    with pytest.warns(UserWarning, match="damaged after"):
        assert len(seen(clip, 50, ALL)) == 20


def test_a_part_that_the_container_marks_as_damaged_is_reported(tmp_path):
    clip = write_clip(tmp_path / "clip.ts", 40)
    data = clip.read_bytes()
    packets = [data[start : start + 188] for start in range(0, len(data), 188)]
    pictures = [number for number, packet in enumerate(packets) if packet[1] & 31 == 1 and packet[2] == 0]
    del packets[pictures[len(pictures) // 2]]
    clip.write_bytes(b"".join(packets))
    with pytest.warns(UserWarning, match="marks a part of itself as lost"):
        assert len(seen(clip, 40)) == 4


def test_jumps_that_a_container_cannot_make_lose_no_frame(tmp_path):
    clip = write_clip(tmp_path / "clip.ts", 30, key_frames=20)
    assert seen(clip, 30, FrameSampling(num_frames=3)) == spread(30, 3)


def write_container(path: Path, container_options: dict[str, str], *, key_frames: int = 12) -> Path:
    """50 noisy frames, so that the bytes are spread evenly over them."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.gop_size = key_frames
        for index in range(50):
            pixels = shade(index, 50) + noise.integers(-15, 16, (32, 32, 1)).repeat(3, axis=2)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_an_animated_gif_is_a_video_with_its_own_times(tmp_path):
    frames = [Image.new("RGB", (16, 16), (shade(index, 5),) * 3) for index in range(5)]
    frames[0].save(tmp_path / "five.gif", save_all=True, append_images=frames[1:], duration=[100, 100, 100, 1000, 100])
    read = list(frames_of(tmp_path / "five.gif", ALL))
    assert [index_of(frame.image, 5) for frame in read] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([frame.time for frame in read], [0, 0.1, 0.2, 0.3, 1.3])
    assert kind_of_file(tmp_path / "five.gif") == "video"


@pytest.mark.parametrize(("durations", "index"), [((100, 10_000), 1), ((10_000, 100), 0)])
def test_the_last_frame_of_a_gif_counts_for_as_long_as_it_is_shown(durations, index, tmp_path):
    pages = [Image.new("RGB", (16, 16), (shade(page, 2),) * 3) for page in range(2)]
    pages[0].save(tmp_path / "hold.gif", save_all=True, append_images=pages[1:], duration=list(durations))
    assert seen(tmp_path / "hold.gif", 2) == [index] * 10


def test_every_form_of_a_list_of_frames_is_the_same_video(tmp_path):
    array = np.stack([np.full((8, 8, 3), shade(index, 6), np.uint8) for index in range(6)])
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for path, pixels in zip(paths, array, strict=True):
        Image.fromarray(pixels).save(path)
    images = [Image.fromarray(pixels) for pixels in array]
    forms = (array, torch.from_numpy(array), array.transpose(0, 3, 1, 2), list(array), images, paths, tuple(images))
    for form in forms:
        assert seen(form, 6) == [0, 1, 2, 3, 4, 5]
        assert seen(form, 6, FrameSampling(num_frames=2)) == spread(6, 2)
        assert seen(form, 6, FrameSampling(max_frames=3)) == spread(6, 3)
    assert seen(iter(images), 6) == seen((image for image in images), 6) == [0, 1, 2, 3, 4, 5]
    assert seen(iter(images), 6, FrameSampling(max_frames=2)) == [0, 1]
    assert all(frame.time is None for frame in frames_of(images, FrameSampling()))


def test_frames_are_decoded_as_they_are_asked_for(tmp_path):
    """A frame that was let go is freed before later ones are read: memory does not grow with the film."""
    clip = write_clip(tmp_path / "clip.mp4", 30)
    alive: list[weakref.ref] = []
    most = 0
    for chunk in chunks(frames_of(clip, ALL), 4):
        assert len(chunk) <= 4
        alive += [weakref.ref(frame.image) for frame in chunk]
        most = max(most, sum(reference() is not None for reference in alive))
        del chunk
    assert len(alive) == 30
    assert most <= 2 * 4


def test_an_iterator_is_read_no_further_than_needed():
    def endless():
        while True:
            yield np.zeros((4, 4, 3), np.uint8)

    frames = frames_of(endless(), FrameSampling())
    assert [next(frames).image.size for _ in range(3)] == [(4, 4)] * 3


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_sound_alone_is_no_video(tmp_path):
    sound = write_sound(tmp_path / "sound.m4a")
    for read in (lambda: list(frames_of(sound, ALL)), lambda: kind_of_file(sound)):
        with pytest.raises(ValueError, match="has sound but no video"):
            read()


def test_a_video_without_frames_is_refused(tmp_path):
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match="0 frames|neither an image nor a video"):
        list(frames_of(tmp_path / "none.avi", ALL))


def test_frames_beyond_the_limit_of_pixels_are_refused_before_decoding(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 3, size=(64, 32))
    with pytest.raises(ValueError, match="64 x 32 pixels, more than the limit of 1000"):
        list(frames_of(clip, ALL, max_pixels=1000))
    with pytest.raises(ValueError, match="limit"):
        list(frames_of(np.zeros((2, 64, 32, 3), np.uint8), ALL, max_pixels=1000))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.mp4", "There is no file 'missing.mp4'"),
        ("https://example.org/film.mp4", "addresses are not fetched"),
        ([], "0 frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "0 frames"),
        (iter([]), "iterator of frames is empty"),
        (np.zeros((4, 4, 3), np.uint8), "is not a video"),
        (np.full((2, 4, 4, 3), np.nan), "NaN"),
        (np.full((2, 4, 4, 3), 9.0), "within 0 and 1"),
        ([np.zeros((4, 4, 3), np.uint8), "missing.png"], "There is no file"),
        (7, "A int is not a video"),
        (b"bytes", "A bytes is not a video"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(source, words):
    with pytest.raises(ValueError, match=words):
        list(frames_of(source, FrameSampling()))


@pytest.mark.parametrize("data", [b"", b"no video at all" * 100])
def test_a_file_that_is_no_video_is_named(data, tmp_path):
    path = tmp_path / "strange.mp4"
    path.write_bytes(data)
    for read in (lambda: list(frames_of(path, ALL)), lambda: kind_of_file(path)):
        with pytest.raises(ValueError, match=re.compile("neither an image nor a video.*", re.DOTALL)) as caught:
            read()
        assert "strange.mp4" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 0}, "whole number from 1"),
        ({"num_frames": 2.5}, "whole number from 1"),
        ({"max_frames": -1}, "whole number from 1"),
        ({"num_frames": True}, "whole number from 1"),
        ({"num_frames": 10**9}, "more than 1000000 frames"),
        ({"fps": 0}, "above 0"),
        ({"fps": float("inf")}, "finite number above 0"),
        ({"fps": "2"}, "finite number above 0"),
        ({"fps": float("nan")}, "above 0"),
        ({"fps": 1, "num_frames": 3}, "exclude one another"),
        ({"all_frames": True, "num_frames": 3}, "exclude one another"),
    ],
)
def test_impossible_samplings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        FrameSampling(**fields)


def test_a_rate_cannot_be_asked_of_a_list_nor_a_number_of_an_iterator():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="has no rate"):
        list(frames_of([image], FrameSampling(fps=2)))
    with pytest.raises(ValueError, match="neither a length nor a rate"):
        list(frames_of(iter([image]), FrameSampling(num_frames=2)))


def test_the_kind_of_a_file_is_what_is_in_it(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.mp4", "PNG")
    assert kind_of_file(tmp_path / "picture.mp4") == "image"
    assert kind_of_file(write_clip(tmp_path / "clip.mkv", 3)) == "video"
    assert kind_of_file(write_clip(tmp_path / "clip.mpg", 3, rate=25, codec="mpeg1video", b="500k")) == "video"
    pages = [Image.new("RGB", (4, 4)) for _ in range(3)]
    for name in ("pages.tiff", "moving.webp", "moving.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert kind_of_file(tmp_path / name) == "image"
    with pytest.raises(ValueError, match="There is no file"):
        kind_of_file(tmp_path / "missing")
    with pytest.raises(ValueError, match="There is no file"):
        kind_of_file("long" * 1000)


def test_the_frame_rule_covers_the_stored_choices():
    stored = json.loads((Path(__file__).parents[1] / "parity/fixtures/preprocess/video.json").read_text())
    assert len(stored["seq_frames"]) >= 9
    for rule in stored["seq_frames"]:
        assert spread(rule["total"], rule["want"]) == rule["indices"]
