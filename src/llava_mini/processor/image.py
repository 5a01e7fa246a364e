"""Pictures: from whatever a user has to square, normalised views.

An image becomes V views: itself, or, for HD (section 4.3 of the paper), ``ratio * ratio`` crops in
row-major order and the whole image last. Every view is made square on its own, then normalised.

Shapes: a picture is [H, W, 3] uint8 in memory and [3, S, S] float32 when ready, S the side that the
vision tower reads; a frame is [V, 3, S, S].
"""

import base64
import binascii
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llava_mini.processor.container import PICTURE_ERRORS, is_film, not_a_picture, reason

ImageMode = Literal["pad", "center_crop", "squash"]
"""How a picture becomes square: padded with the mean colour; short side resized and the middle cut
out (the released setting, called ``square`` there); or resized without regard to its proportions.
The released ``anyres`` does not exist here: its output was read as a video there."""

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A file, a ``data:`` address, the bytes of a file, a PIL image, or an array ([H, W], [H, W, C] or [C, H, W] with
C of 1, 3 or 4: integers from 0 to 255, 16-bit unsigned integers, or floats from 0 to 1)."""

MAX_PIXELS = 178_956_970
"""Most pixels of an image or of a frame of a video: above it, Pillow itself refuses a file."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels. The released code dropped alpha: whatever colour is stored there."""


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """How pictures become views."""

    size: int
    """S: pixels per side of a view."""
    mode: ImageMode = "pad"
    """How a view is made square."""
    ratio: int = 1
    """Crops per side: 1 is the whole picture alone."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Of each colour channel, from 0 to 1."""
    std: tuple[float, ...] = CLIP_STD
    """Of each colour channel."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(ImageMode):
            raise ValueError(
                f"There is no image mode {self.mode!r}; the modes are {', '.join(get_args(ImageMode))}. The released "
                "'square' is 'center_crop'; the released 'anyres' does not work with LLaVA-Mini."
            )


def to_rgb(image: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as 8-bit RGB.

    Turns it as its EXIF orientation says, scales 16-bit values to 8 bits, lays transparent pixels over white,
    and takes the first frame of an animation.

    Raises:
        ValueError: the file is missing, no picture, truncated or too large; an array has the wrong shape or values.
    """
    if isinstance(image, Image.Image):
        return _pil_to_rgb(image, "The image", max_pixels)
    if isinstance(image, np.ndarray | Tensor):
        return _array_to_rgb(image, max_pixels)
    if isinstance(image, bytes):
        return _file_to_rgb(io.BytesIO(image), "The image", max_pixels)
    if isinstance(image, str) and image.startswith("data:"):
        return _file_to_rgb(io.BytesIO(_data_address(image)), "The image", max_pixels)
    if isinstance(image, str | os.PathLike):
        return _file_to_rgb(existing_file(image, "image"), f"The file {str(image)!r}", max_pixels)
    raise ValueError(
        f"A {type(image).__name__} is not an image. Give a path, a PIL image, an array or a tensor; several images are "
        "several parts of the message."
    )


def existing_file(path: str | os.PathLike[str], kind: str) -> Path:
    """The path, if there is such a file.

    Raises:
        ValueError: there is none, it is a folder, or it is an address on the web.
    """
    if "://" in str(path):
        raise ValueError(
            f"{str(path)!r} is an address; addresses are not fetched. Download the {kind} and give the file."
        )
    if not str(path):
        raise ValueError(f"The path of the {kind} is '', which names no file. Give the path of a file.")
    path = Path(path)
    article = "an" if kind.startswith("i") else "a"
    try:
        exists, is_file = path.exists(), path.is_file()
    except OSError:  # not a possible name
        exists = is_file = False
    if not exists:
        raise ValueError(f"There is no file {str(path)[:200]!r}. Give the path of {article} {kind} that exists.")
    if not is_file:
        raise ValueError(f"{str(path)!r} is not a file. Give the path of {article} {kind}.")
    return path


def check_pixels(width: int, height: int, what: str, max_pixels: int) -> None:
    """Refuse empty and huge pictures before they are decoded.

    Raises:
        ValueError: a side is 0, or there are more than ``max_pixels`` pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"{what} is {width} x {height} pixels: a side is empty. Give a picture of at least 1 x 1.")
    if width * height > max_pixels:
        raise ValueError(
            f"{what} is {width} x {height} pixels, more than the limit of {max_pixels}. Make it smaller before, or "
            "raise the processor's max_pixels."
        )


def make_views(image: Image.Image, settings: ViewSettings) -> Tensor:
    """The views of a picture, ready for the vision tower: [V, 3, S, S] float32."""
    squares = [make_square(view, settings) for view in split_views(image, settings.ratio)]
    pixels = np.stack([np.asarray(square) for square in squares])  # [V, S, S, 3]
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    normalised = (scaled - np.asarray(settings.mean, np.float32)) / np.asarray(settings.std, np.float32)
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())  # [V, 3, S, S]


def split_views(image: Image.Image, ratio: int) -> list[Image.Image]:
    """The picture itself for ``ratio`` 1, otherwise its crops row by row and then the whole.

    Columns and rows that are left over at the right and at the bottom belong to no crop. A side shorter
    than ``ratio`` gives crops of one pixel that repeat its last one.
    """
    if ratio == 1:
        return [image]
    width, height = max(image.width // ratio, 1), max(image.height // ratio, 1)
    lefts = [min(column * width, image.width - width) for column in range(ratio)]
    tops = [min(row * height, image.height - height) for row in range(ratio)]
    crops = [image.crop((left, top, left + width, top + height)) for top in tops for left in lefts]
    return [*crops, image]


def make_square(image: Image.Image, settings: ViewSettings) -> Image.Image:
    """One view: S x S pixels, by bicubic resampling."""
    size = settings.size
    if settings.mode == "squash":
        return _resize(image, (size, size))
    if settings.mode == "pad":
        return _resize(_pad(image, settings.mean), (size, size))
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= _MAX_CANVAS:
        return _resize(image, (width, height)).crop((left, top, left + size, top + size))
    box = tuple(edge * short / size for edge in (left, top, left + size, top + size))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=_inside(box, image))


_MAX_CANVAS = 2**26
"""Most pixels of an intermediate picture, so that 1 x 100000 pixels stay small when they are made square."""


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _inside(box: tuple[float, ...], image: Image.Image) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    return max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)


def _pad(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """The picture in the middle of a square of the mean colour."""
    side, limit = max(image.size), int(_MAX_CANVAS**0.5)
    if side > limit:
        shrunk = [max(1, round(edge * limit / side)) for edge in image.size]
        image, side = _resize(image, (shrunk[0], shrunk[1])), limit
    if image.width == image.height:
        return image
    canvas = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _data_address(address: str) -> bytes:
    """The bytes inside ``data:image/png;base64,...``."""
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"The address {address[:40]!r} has no base64 data. Write it as 'data:image/png;base64,...'.")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"The data address of the image is not base64: {error}. Was it cut?") from error


@contextmanager
def _readable(what: str, path: Path | None = None) -> Iterator[None]:
    """Say what is wrong with a file in one sentence; with its path, also whether it is a video."""
    try:
        yield
    except UnidentifiedImageError as error:
        if path is not None and is_film(path):
            raise ValueError(f"{what} is a video, not an image. Give it as a video part.") from error
        raise ValueError(f"{what} {not_a_picture(path)}") from error
    except PermissionError as error:
        raise ValueError(f"{what} may not be read by this user. Change its permissions.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what} has too many pixels: {error} Make it smaller before.") from error
    except PICTURE_ERRORS as error:
        raise ValueError(f"{what} is truncated or damaged: {reason(error)}. Get the file again.") from error


def _file_to_rgb(file: Path | io.BytesIO, what: str, max_pixels: int) -> Image.Image:
    with _readable(what, file if isinstance(file, Path) else None):
        image = Image.open(file)
    with image:
        return _pil_to_rgb(image, what, max_pixels)


def _pil_to_rgb(image: Image.Image, what: str, max_pixels: int) -> Image.Image:
    check_pixels(image.width, image.height, what, max_pixels)
    with _readable(what):
        image.load()
        turned = ImageOps.exif_transpose(image)
        if not (turned.mode.startswith("I") or turned.mode == "F"):
            return _opaque(turned)
    try:
        return _array_to_rgb(np.array(turned), max_pixels, bits=16 if turned.mode.startswith("I") else 8)
    except ValueError as error:
        raise ValueError(f"{what} has pixel values that are no colours: {error}") from error


def _opaque(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")


def _array_to_rgb(image: np.ndarray | Tensor, max_pixels: int, *, bits: int = 8) -> Image.Image:
    array = to_uint8(image, bits=bits)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"An array of shape {tuple(image.shape)} is not an image. Give [H, W, 3] or [3, H, W]; a video "
            "has 4 dimensions."
        )
    check_pixels(array.shape[1], array.shape[0], "The image", max_pixels)
    picture = Image.fromarray(np.ascontiguousarray(array.squeeze(2) if array.shape[2] == 1 else array))
    return _pil_to_rgb(picture, "The image", max_pixels)


def to_uint8(image: np.ndarray | Tensor, *, bits: int = 8) -> np.ndarray:
    """The values of an array as bytes, in any shape.

    Args:
        image: booleans, integers from 0 to 255, 16-bit unsigned integers, or floats from 0 to 1.
        bits: 16 if integers of any type go from 0 to 65535.

    Raises:
        ValueError: a value is not a number or out of range.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.dtype == np.uint8:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * np.uint8(255)
    if image.size == 0:
        return np.zeros(image.shape, np.uint8)
    if np.issubdtype(image.dtype, np.floating):
        low, high = float(image.min()), float(image.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("The array holds NaN or infinite values. Give floats from 0 to 1, or uint8.")
        if low < 0 or high > 1:
            raise ValueError(
                f"The floating-point array goes from {low:g} to {high:g}; it must lie within 0 and 1. Divide "
                "pixel values by 255, and give the picture before it is normalised."
            )
        return np.round(image.astype(np.float32) * 255).astype(np.uint8)
    if not np.issubdtype(image.dtype, np.integer):
        raise ValueError(f"An array of {image.dtype} is not a picture. Give uint8, or floats from 0 to 1.")
    top = 65535 if bits == 16 or image.dtype == np.uint16 else 255
    low, high = int(image.min()), int(image.max())
    if low < 0 or high > top:
        raise ValueError(f"The {image.dtype} array goes from {low} to {high}; it must lie within 0 and {top}.")
    return np.round(image / np.float64(top / 255)).astype(np.uint8)
