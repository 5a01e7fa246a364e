"""Pictures of every kind become the right squares; what is no picture is refused in one sentence."""

import base64
import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_mini.processor import ViewSettings, make_views, to_rgb
from llava_mini.processor.image import make_square, split_views

MODES = ("pad", "center_crop", "squash")
NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def values(image) -> np.ndarray:
    return np.asarray(to_rgb(image)).astype(int)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: NOISE,
        lambda path: Image.fromarray(NOISE),
        lambda path: path,
        lambda path: str(path),
        lambda path: path.read_bytes(),
        lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        lambda path: NOISE.transpose(2, 0, 1),
        lambda path: NOISE.astype(np.int64),
        lambda path: NOISE.astype(np.uint16) * 257,
        lambda path: NOISE.astype(np.float32) / 255,
        lambda path: torch.from_numpy(NOISE),
        lambda path: torch.from_numpy(NOISE).permute(2, 0, 1).double() / 255,
    ],
)
def test_every_form_of_a_picture_is_the_same_picture(make, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(NOISE).save(path)
    np.testing.assert_array_equal(values(make(path)), NOISE)


def test_grey_is_grey_in_all_three_channels():
    grey = NOISE[:, :, 0]
    for image in (grey, grey[None], grey[:, :, None], Image.fromarray(grey)):
        np.testing.assert_array_equal(values(image), grey[:, :, None].repeat(3, axis=2))


def test_booleans_are_black_and_white():
    assert set(np.unique(values(NOISE[:, :, 0] > 127))) == {0, 255}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(dtype, tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / "deep.tiff")
    grey = values(tmp_path / "deep.tiff")[:, :, 0]
    np.testing.assert_allclose(grey, ramp / 257, atol=0.51)


def test_cmyk_is_seen_in_its_colours(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert Image.open(tmp_path / "print.jpg").mode == "CMYK"
    np.testing.assert_allclose(values(tmp_path / "print.jpg").mean((0, 1)), (200, 30, 40), atol=6)


def test_transparent_pixels_are_white_and_opaque_ones_keep_their_colour():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    for form in (image, png(image), image.convert("RGBa"), np.asarray(image)):
        np.testing.assert_array_equal(values(form)[0], [[10, 20, 30], [255, 255, 255]])


def test_half_transparent_grey_is_halfway_to_white():
    np.testing.assert_allclose(values(Image.new("LA", (1, 1), (0, 128)))[0, 0], 127, atol=1)


def test_a_palette_and_its_transparent_colour_are_resolved():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(values(png(image))[0], [[255, 0, 0], [0, 255, 0]])
    np.testing.assert_array_equal(values(png(image, transparency=1))[0], [[255, 0, 0], [255, 255, 255]])


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    image = Image.fromarray(NOISE)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(values(tmp_path / "turned.png"), np.rot90(NOISE, -1))


def test_an_animated_gif_as_an_image_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(values(tmp_path / "two.gif")[0, 0], [255, 0, 0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
@pytest.mark.parametrize("ratio", [1, 2])
def test_extreme_proportions_are_handled(mode, size, ratio):
    image = Image.new("RGB", size, (255, 0, 0))
    views = make_views(image, ViewSettings(size=8, mode=mode, ratio=ratio))
    assert views.shape == (1 if ratio == 1 else 5, 3, 8, 8)
    assert views.isfinite().all()


def test_a_long_thin_picture_stays_small_while_it_is_cropped():
    strip = Image.new("RGB", (1, 300_000), (0, 0, 255))
    strip.paste((255, 0, 0), (0, 149_000, 1, 151_000))
    square = make_square(strip, ViewSettings(size=336, mode="center_crop"))
    assert square.size == (336, 336)
    np.testing.assert_array_equal(np.asarray(square)[168, 168], [255, 0, 0])


def test_center_crop_is_the_clip_processor():
    reference = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = reference(Image.fromarray(NOISE), return_tensors="pt")["pixel_values"]
    ours = make_views(Image.fromarray(NOISE), ViewSettings(size=28, mode="center_crop"))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_pad_keeps_everything_squash_too_and_center_crop_cuts_the_ends():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :10] = wide[:, -10:] = 255
    squares = {mode: np.asarray(make_square(to_rgb(wide), ViewSettings(size=20, mode=mode))) for mode in MODES}
    assert squares["center_crop"].max() == 0
    assert squares["squash"].max() == squares["pad"].max() == 255
    np.testing.assert_array_equal(squares["pad"][0, 10], [122, 116, 104])


def test_crops_come_row_by_row_and_the_whole_picture_last():
    image = Image.fromarray(NOISE)  # 53 x 37: a column and a row are left over
    crops = split_views(image, 2)
    assert [crop.size for crop in crops] == [(26, 18)] * 4 + [(53, 37)]
    np.testing.assert_array_equal(np.asarray(crops[1]), NOISE[:18, 26:52])
    np.testing.assert_array_equal(np.asarray(crops[2]), NOISE[18:36, :26])
    np.testing.assert_array_equal(np.asarray(crops[4]), NOISE)


def damaged(tmp_path) -> dict[str, object]:
    whole = png(Image.fromarray(NOISE))
    files = {"text.png": b"not a picture", "cut.png": whole[: len(whole) // 2], "empty.png": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    jpeg = io.BytesIO()
    Image.fromarray(NOISE).save(jpeg, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg.getvalue()[:-200])
    return {name: tmp_path / name for name in [*files, "cut.jpg"]}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text.png", "neither an image nor a video"),
        ("empty.png", "neither an image nor a video"),
        ("cut.png", "truncated"),
        ("cut.jpg", "truncated"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(name, words, tmp_path):
    path = damaged(tmp_path)[name]
    with pytest.raises(ValueError, match=words) as caught:
        to_rgb(path)  # type: ignore[arg-type]
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("missing.png", "There is no file 'missing.png'"),
        (".", "is not a file"),
        ("https://example.org/cat.png", "addresses are not fetched"),
        ("data:image/png;base64,???", "not base64"),
        ("data:image/png,abc", "no base64 data"),
        (np.zeros((0, 4, 3), np.uint8), "a side is empty"),
        (Image.new("RGB", (0, 4)), "a side is empty"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), np.inf), "infinite"),
        (np.full((4, 4, 3), 200.0), "within 0 and 1"),
        (np.full((4, 4, 3), -0.5), "within 0 and 1"),
        (np.full((4, 4, 3), 300), "within 0 and 255"),
        (np.full((4, 4, 3), -1), "within 0 and 255"),
        (np.zeros((5, 4, 2), np.uint8), r"\(5, 4, 2\) is not an image"),
        (np.zeros((2, 4, 4, 3), np.uint8), "a video has 4 dimensions"),
        (np.zeros((4, 4, 3), complex), "complex128 is not a picture"),
        (7, "A int is not an image"),
        ([NOISE], "A list is not an image"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(image, words):
    with pytest.raises(ValueError, match=re.compile(words)):
        to_rgb(image)


def test_the_limit_of_pixels_is_checked_before_decoding(tmp_path):
    path = tmp_path / "large.png"
    whole = png(Image.new("L", (400, 300)))
    path.write_bytes(whole[:60])  # the header alone: decoding would fail with another message
    with pytest.raises(ValueError, match="400 x 300 pixels, more than the limit of 100000"):
        to_rgb(path, max_pixels=100_000)
    with pytest.raises(ValueError, match="limit"):
        to_rgb(NOISE, max_pixels=100)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    body = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "bomb.png").write_bytes(header + struct.pack(">I", 4) + b"IDAT")
    with pytest.raises(ValueError, match="pixels"):
        to_rgb(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["anyres", "square"])
def test_modes_that_do_not_exist_are_refused_with_those_that_do(mode):
    with pytest.raises(ValueError, match="the modes are pad, center_crop, squash"):
        ViewSettings(size=8, mode=mode)
