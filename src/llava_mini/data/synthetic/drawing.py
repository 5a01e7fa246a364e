"""From the content of a scene to pixels, and to labels of its patches.

Masks of shapes are drawn four times too large and reduced, and kept: a scene takes well under a
millisecond. Only the font that comes with Pillow is used, so pictures do not depend on the machine.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from llava_mini.data.synthetic.scenes import CANVAS, CHARACTERS, COLOURS, SHAPES, SIZES, Background, Scene, Sign, Thing

SUPERSAMPLING = 4
MIN_PATCH_PIXELS = 10
"""A patch belongs to a thing or a letter that covers at least so many of its pixels."""


@dataclass(frozen=True, kw_only=True)
class PatchLabels:
    """What each patch of a scene shows. All arrays are [P] int64, P patches row by row; 0 means nothing."""

    shape: NDArray[np.int64]
    """1 + index in ``SHAPES``."""
    colour: NDArray[np.int64]
    """1 + index in ``COLOURS``."""
    size: NDArray[np.int64]
    """1 + index in ``SIZES``."""
    column: NDArray[np.int64]
    """1 + which twelfth of the canvas holds the centre of the thing, from the left."""
    row: NDArray[np.int64]
    """1 + which twelfth of the canvas holds the centre of the thing, from the top."""
    character: NDArray[np.int64]
    """1 + index in ``CHARACTERS``."""
    order: NDArray[np.int64]
    """1 + place of the letter in its word, at most 4."""


@lru_cache(maxsize=512)
def shape_mask(shape: str, diameter: int) -> Image.Image:
    """Return how much of each pixel a shape covers: a greyscale image of ``diameter`` pixels a side."""
    side = diameter * SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    edge = side - 1
    if shape == "circle":
        draw.ellipse((0, 0, edge, edge), fill=255)
    elif shape == "square":
        draw.rectangle((0.08 * edge, 0.08 * edge, 0.92 * edge, 0.92 * edge), fill=255)
    elif shape == "triangle":
        draw.polygon([(0.5 * edge, 0.02 * edge), (edge, 0.94 * edge), (0, 0.94 * edge)], fill=255)
    elif shape == "diamond":
        draw.polygon([(0.5 * edge, 0), (0.92 * edge, 0.5 * edge), (0.5 * edge, edge), (0.08 * edge, 0.5 * edge)], 255)
    elif shape == "star":
        points = [
            (edge / 2 * (1 + r * sin(pi * k / 5)), edge / 2 * (1.05 - r * cos(pi * k / 5)))
            for k in range(10)
            for r in ((1.0,) if k % 2 == 0 else (0.42,))
        ]
        draw.polygon(points, fill=255)
    elif shape == "cross":
        draw.rectangle((0.34 * edge, 0, 0.66 * edge, edge), fill=255)
        draw.rectangle((0, 0.34 * edge, edge, 0.66 * edge), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, edge, edge), fill=255)
        draw.ellipse((0.3 * edge, 0.3 * edge, 0.7 * edge, 0.7 * edge), fill=0)
    elif shape == "heart":
        draw.ellipse((0, 0.04 * edge, 0.54 * edge, 0.58 * edge), fill=255)
        draw.ellipse((0.46 * edge, 0.04 * edge, edge, 0.58 * edge), fill=255)
        draw.polygon([(0.04 * edge, 0.44 * edge), (0.96 * edge, 0.44 * edge), (0.5 * edge, edge)], fill=255)
    else:
        raise ValueError(f"Unknown shape {shape!r}. The shapes are {', '.join(SHAPES)}.")
    return mask.resize((diameter, diameter), Image.Resampling.BOX)


def draw_scene(scene: Scene, side: int = CANVAS) -> Image.Image:
    """Return the picture of a scene, an RGB image of ``side`` pixels a side."""
    image = draw_background(scene.background, side)
    for sign in scene.signs:
        draw_sign(image, sign)
    for thing in scene.things:
        image.paste(COLOURS[thing.colour], _corner(thing, side), _mask_of(thing, side))
    return image


def draw_background(background: Background, side: int = CANVAS) -> Image.Image:
    """Return a textured square of ``side`` pixels."""
    rng = np.random.default_rng(background.seed)
    texture = _texture(background.kind, side, rng)  # [side, side], about -20 to 20
    pixels = np.asarray(background.colour, dtype=np.float32) + texture[:, :, None]  # [side, side, 3]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_sign(image: Image.Image, sign: Sign) -> None:
    """Write a sign onto a picture, in place."""
    draw = ImageDraw.Draw(image)
    scale = image.width / CANVAS
    font = font_of(round(sign.height * scale))
    left, top, right, bottom = _text_box(sign, scale, font)
    if sign.plate is not None:
        draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), fill=sign.plate)
    for place, character in zip(_letter_places(sign.text, left, font), sign.text, strict=True):
        draw.text((place, top), character, fill=sign.ink, font=font, anchor="lt")
        if sign.bold:
            draw.text((place + 1, top), character, fill=sign.ink, font=font, anchor="lt")


@lru_cache(maxsize=64)
def font_of(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font at a height in pixels."""
    return ImageFont.load_default(size=height)


def patch_labels(scene: Scene, patch: int = 8) -> PatchLabels:
    """Return what each patch of ``patch`` units a side shows.

    A patch belongs to the thing that covers most of it, if that is ``MIN_PATCH_PIXELS`` or more.

    Args:
        scene: The scene, as drawn at ``CANVAS`` pixels.
        patch: Side of a patch; divides ``CANVAS``.
    """
    things = np.zeros((CANVAS, CANVAS), np.uint8)
    owners = Image.fromarray(things)
    for number, thing in enumerate(scene.things, start=1):
        owners.paste(
            number, _corner(thing, CANVAS), _mask_of(thing, CANVAS).point([255 * (value > 127) for value in range(256)])
        )
    of_thing = _largest(np.asarray(owners), patch, len(scene.things))  # [P]
    facts = np.zeros((len(scene.things) + 1, 5), np.int64)
    colours, sizes = tuple(COLOURS), tuple(SIZES)
    for number, thing in enumerate(scene.things, start=1):
        column, row = (min(int(12 * value / CANVAS), 11) for value in (thing.x, thing.y))
        indices = SHAPES.index(thing.shape), colours.index(thing.colour), sizes.index(thing.size), column, row
        facts[number] = [1 + index for index in indices]
    shape, colour, size, column, row = facts[of_thing].T
    of_letter, letters = _letter_owners(scene, patch)
    character, order = letters[of_letter].T
    return PatchLabels(shape=shape, colour=colour, size=size, column=column, row=row, character=character, order=order)


def letter_boxes(sign: Sign) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Return each letter of a sign with its box (left, top, right, bottom) in world units."""
    font = font_of(sign.height)
    left, top, _, bottom = _text_box(sign, 1.0, font)
    places = _letter_places(sign.text, left, font)
    ends = [*places[1:], left + font.getlength(sign.text)]
    return [
        (character, (start, top, end, bottom)) for character, start, end in zip(sign.text, places, ends, strict=True)
    ]


def _letter_owners(scene: Scene, patch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which letter owns each patch [P], and character and order of each letter [letters + 1, 2]."""
    owners = np.zeros((CANVAS, CANVAS), np.uint8)
    letters = [(0, 0)]
    for sign in scene.signs:
        for order, (character, (left, top, right, bottom)) in enumerate(letter_boxes(sign)):
            owners[max(round(top), 0) : round(bottom) + 1, max(round(left), 0) : round(right)] = len(letters)
            letters.append((1 + CHARACTERS.index(character), 1 + min(order, 3)))
    return _largest(owners, patch, len(letters) - 1), np.asarray(letters, np.int64)


def _largest(owners: NDArray[np.uint8], patch: int, count: int) -> NDArray[np.int64]:
    """Return for each patch the owner, 1 to ``count``, of most of its pixels, or 0. owners: [side, side] -> [P]."""
    grid = owners.shape[0] // patch
    if count == 0:
        return np.zeros(grid * grid, np.int64)
    patches = owners.reshape(grid, patch, grid, patch).swapaxes(1, 2).reshape(grid * grid, 1, -1)  # [P, 1, pixels]
    covered = (patches == np.arange(1, count + 1, dtype=np.uint8)[:, None]).sum(axis=2)  # [P, count]
    return np.where(covered.max(axis=1) >= MIN_PATCH_PIXELS, covered.argmax(axis=1) + 1, 0)


def _texture(kind: str, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    if kind == "plain":
        return np.zeros((side, side), np.float32)
    if kind == "gradient":
        slope = rng.uniform(-25, 25, 2)
        ramp = np.linspace(-1, 1, side)
        return (slope[0] * ramp[:, None] + slope[1] * ramp[None, :]).astype(np.float32)
    if kind == "noise":
        return rng.normal(0, 1, (side, side)).astype(np.float32) * rng.uniform(4, 14)
    if kind == "stripes":
        phase = rng.uniform(0.15, 0.8) * np.arange(side)
        angle = rng.uniform(0, pi)
        wave = np.sin(cos(angle) * phase[:, None] + sin(angle) * phase[None, :])
        return (wave * rng.uniform(4, 16)).astype(np.float32)
    if kind == "blotches":
        coarse = rng.uniform(-22, 22, (7, 7)).astype(np.float32)
        return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR))
    raise ValueError(f"Unknown background {kind!r}.")


def _mask_of(thing: Thing, side: int) -> Image.Image:
    return shape_mask(thing.shape, max(round(2 * thing.radius * side / CANVAS), 1))


def _corner(thing: Thing, side: int) -> tuple[int, int]:
    scale = side / CANVAS
    return round((thing.x - thing.radius) * scale), round((thing.y - thing.radius) * scale)


def _text_box(
    sign: Sign, scale: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> tuple[float, float, float, float]:
    width = font.getlength(sign.text)
    height = 0.72 * sign.height * scale
    left, top = round(sign.x * scale - width / 2), round(sign.y * scale - height / 2)
    return left, top, left + width, top + height


def _letter_places(text: str, left: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[float]:
    return [left + font.getlength(text[:index]) for index in range(len(text))]
