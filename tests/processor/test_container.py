"""Files of every kind: what is no film or picture is refused at once, and damage never ends in a traceback."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_mini.processor import FrameSampling, frames_of, kind_of_file, to_rgb
from tests.processor.clips import write_clip

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
READERS = (kind_of_file, to_rgb, lambda path: list(frames_of(path, FrameSampling())))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("text.png", b"Not a picture. " * 40),
        ("text.jpg", b"Not a picture. " * 40),
        ("text.webp", b"Not a picture. " * 40),
        ("art.ans", b"text " * 60),
        ("art.nfo", b"text " * 60),
        ("art.diz", b"text " * 60),
        ("art.vt", b"x"),
        ("noise.cdg", NOISE.tobytes() * 5),
        ("noise.raw", NOISE.tobytes()),
        ("list.ffconcat", b"ffconcat version 1.0\nfile 'clip.ts'\n"),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nclip.ts\n#EXT-X-ENDLIST\n"),
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("drawing.svg", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>\n'),
    ],
)
def test_what_only_its_name_makes_a_film_is_refused_at_once(name, data, tmp_path):
    write_clip(tmp_path / "clip.ts", 3)
    path = write_file(tmp_path / name, data)
    for read in READERS:
        with pytest.raises(ValueError, match="neither an image nor a video") as caught:
            read(path)
        assert name in str(caught.value)


def test_a_picture_without_pixels_says_so(tmp_path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 10, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path = write_file(tmp_path / "zero.png", data)
    for read in READERS:
        with pytest.raises(ValueError, match=r"neither an image nor a video .*0 x 10 pixels: a side of 0 pixels"):
            read(path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_a_video_of_an_unknown_kind_is_refused(name, tmp_path):
    codec, tag = ("libx264", b"avc1") if name.endswith("mp4") else ("mpeg4", b"FMP4")
    clip = write_clip(tmp_path / name, 4, codec=codec, b="500k")
    clip.write_bytes(clip.read_bytes().replace(tag, b"zz9q"))
    for read in (kind_of_file, READERS[2]):
        with pytest.raises(ValueError, match="no decoder for this kind of video"):
            read(clip)


def test_an_image_is_no_video_and_a_video_no_image(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match=r"picture.png' is an image, not a video"):
        list(frames_of(tmp_path / "picture.png", FrameSampling()))
    clip = write_clip(tmp_path / "clip.mp4", 3)
    with pytest.raises(ValueError, match=r"clip.mp4' is a video, not an image. Give it as a video part"):
        to_rgb(clip)


@pytest.mark.parametrize("name", ["picture.dds", "picture.avif", "picture.tiff", "moving.gif", "clip.ts"])
@pytest.mark.filterwarnings("ignore")
def test_no_damage_ends_in_a_traceback(name, tmp_path):
    path = tmp_path / name
    if name == "clip.ts":
        write_clip(path, 6)
    else:
        pages = [Image.fromarray(np.roll(NOISE, 3 * turn, axis=0)) for turn in range(3)]
        pages[0].save(path, **({"save_all": True, "append_images": pages[1:]} if name == "moving.gif" else {}))
    whole = path.read_bytes()
    random = np.random.default_rng(3)
    sentences: list[str] = []
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(0, min(len(data), 300), 6):
            data[place] = random.integers(256)
        path.write_bytes(data[: random.integers(1, len(data))] if random.random() < 0.3 else data)
        for read in READERS:
            try:
                read(path)
            except ValueError as error:
                sentences.append(str(error))
    assert len(sentences) > 20
    assert all(sentence.endswith((".", "?")) for sentence in sentences)


def test_values_beyond_16_bits_are_refused_with_the_name_of_the_file(tmp_path):
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif.*70000"):
        to_rgb(tmp_path / "deep.tif")


@pytest.mark.parametrize("read", READERS)
def test_an_empty_path_is_named(read):
    with pytest.raises(ValueError, match="is '', which names no file"):
        read("")
