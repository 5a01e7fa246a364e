"""From the content of a scene to pixels, and to labels of its patches.

Masks of shapes are drawn four times too large and reduced, and kept: most scenes take well under a
millisecond. Fonts come with this package and with Pillow, so pictures do not depend on the machine.
"""

from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from llava_mini.data.synthetic.charts import MAX_VALUE, Chart
from llava_mini.data.synthetic.fonts import CAPITAL_HEIGHT, font_of, text_width
from llava_mini.data.synthetic.scenes import (
    CANVAS,
    CHARACTERS,
    COLOURS,
    SHAPES,
    SIZES,
    WORDS,
    Background,
    Scene,
    Sign,
    Thing,
)

MAX_LETTERS = max(len(word) for word in WORDS)
"""Letters of the longest text on a sign: 4."""

LABEL_CLASSES = {
    "shape": 2 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "size": 1 + len(SIZES),
    "value": 1 + MAX_VALUE,
    "column": 13,
    "row": 13,
    "character": 1 + len(CHARACTERS),
    "order": 1 + MAX_LETTERS,
    "word": 1 + len(WORDS),
    **{f"letter {place}": 1 + len(CHARACTERS) for place in range(1, 1 + MAX_LETTERS)},
}
"""Classes of each label of a patch; class 0 is nothing."""

BAR = 1 + len(SHAPES)
"""The shape label of a bar of a chart."""

SUPERSAMPLING = 4
MIN_PATCH_PIXELS = 10
"""A patch belongs to a thing or a letter that covers at least so many of its pixels."""


PatchLabels = dict[str, NDArray[np.int64]]
"""What each patch of a scene shows: for each name of ``LABEL_CLASSES`` an array [P], P patches row by row.

shape: 1 + index in ``SHAPES``, or ``BAR``. colour, size: 1 + index in ``COLOURS``, ``SIZES``. value: of a bar. column,
row: 1 + which twelfth of the canvas holds the centre of the thing, from the left and from the top. character: 1 + index
in ``CHARACTERS``. order: 1 + place of the letter in its text. word: 1 + index in ``WORDS`` of the text that the letter
belongs to, and letter 1 to letter 4: 1 + index in ``CHARACTERS`` of each of its letters.
"""


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
    if scene.chart is not None:
        draw_chart(image, scene.chart)
    for sign in scene.signs:
        draw_sign(image, sign)
    for thing in scene.things:
        image.paste(thing.rgb, _corner(thing, side), _mask_of(thing, side))
    return image


def draw_background(background: Background, side: int = CANVAS) -> Image.Image:
    """Return a textured square of ``side`` pixels."""
    rng = np.random.default_rng(background.seed)
    texture = _texture(background.kind, side, rng)  # about -20 to 20
    texture = texture if texture.ndim == 3 else texture[:, :, None]
    pixels = np.asarray(background.colour, dtype=np.float32) + texture  # [side, side, 3]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_sign(image: Image.Image, sign: Sign) -> None:
    """Write a sign onto a picture, in place."""
    draw = ImageDraw.Draw(image)
    scale = image.width / CANVAS
    left, top, right, bottom = _text_box(sign, scale)
    if sign.plate is not None:
        draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), fill=sign.plate)
    font = font_of(sign.font, round(sign.height * scale))
    for place, character in zip(_letter_places(sign, left, scale), sign.text, strict=True):
        draw.text((place, bottom), character, fill=sign.ink, font=font, anchor="ls")
        if sign.bold:
            draw.text((place + 1, bottom), character, fill=sign.ink, font=font, anchor="ls")


def draw_chart(image: Image.Image, chart: Chart) -> None:
    """Draw a bar chart onto a picture, in place: a board, bars, and the value above each bar."""
    draw = ImageDraw.Draw(image)
    scale = image.width / CANVAS
    draw.rectangle(
        (3 * scale, 3 * scale, image.width - 3 * scale - 1, image.height - 3 * scale - 1), (chart.plate,) * 3
    )
    font = font_of(chart.font, round(chart.digit_size * scale))
    for bar in chart.bars:
        left, right = bar.left * scale, (bar.left + bar.width) * scale - 1
        top = (chart.ground - bar.value * chart.unit) * scale
        draw.rectangle((left, top, right, chart.ground * scale), COLOURS[bar.colour])
        draw.text(((left + right) / 2, top - 2 * scale), str(bar.value), (chart.ink,) * 3, font, anchor="ms")
    ground = chart.ground * scale
    draw.line((5 * scale, ground, image.width - 5 * scale, ground), (chart.ink,) * 3, max(round(scale), 1))


def patch_labels(scene: Scene, patch: int = 8) -> PatchLabels:
    """Return what each patch of ``patch`` units a side shows.

    A patch belongs to the thing that covers most of it, if that is ``MIN_PATCH_PIXELS`` or more.

    Args:
        scene: The scene, as drawn at ``CANVAS`` pixels.
        patch: Side of a patch; divides ``CANVAS``.
    """
    owners = Image.new("L", (CANVAS, CANVAS), 0)
    facts = [(0, 0, 0, 0, 0, 0)]
    colours, sizes = tuple(COLOURS), tuple(SIZES)
    for thing in scene.things:
        covered = _mask_of(thing, CANVAS).point([255 * (value > 127) for value in range(256)])
        owners.paste(len(facts), _corner(thing, CANVAS), covered)
        shape, size = 1 + SHAPES.index(thing.shape), 1 + sizes.index(thing.size)
        facts.append((shape, 1 + colours.index(thing.colour), size, 0, _twelfth(thing.x), _twelfth(thing.y)))
    for bar in scene.chart.bars if scene.chart is not None else ():
        assert scene.chart is not None
        top = scene.chart.ground - bar.value * scene.chart.unit
        owners.paste(len(facts), (bar.left, top, bar.left + bar.width, scene.chart.ground))
        centre = bar.left + bar.width / 2, (top + scene.chart.ground) / 2
        facts.append((BAR, 1 + colours.index(bar.colour), 0, bar.value, _twelfth(centre[0]), _twelfth(centre[1])))
    of_thing = _largest(np.asarray(owners), patch, len(facts) - 1)  # [P]
    of_letter, letters = _letter_owners(scene, patch)
    labels = np.concatenate([np.asarray(facts, np.int64)[of_thing], letters[of_letter]], axis=1)  # [P, labels]
    return dict(zip(LABEL_CLASSES, labels.T, strict=True))


Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in world units."""


def letter_boxes(scene: Scene) -> list[tuple[str, int, Box]]:
    """Return for each letter and digit of a scene the text it belongs to, its place in it, from 0, and its box."""
    found: list[tuple[str, int, Box]] = []
    for sign in scene.signs:
        left, top, right, bottom = _text_box(sign, 1.0)
        places = _letter_places(sign, left, 1.0)
        for order, (start, end) in enumerate(zip(places, [*places[1:], right], strict=True)):
            found.append((sign.text, order, (start, top, end, bottom)))
    for bar in scene.chart.bars if scene.chart is not None else ():
        assert scene.chart is not None
        digit, size = str(bar.value), scene.chart.digit_size
        half = text_width(digit, scene.chart.font, size) / 2
        centre, bottom = bar.left + (bar.width - 1) / 2, scene.chart.ground - bar.value * scene.chart.unit - 2
        found.append((digit, 0, (centre - half, bottom - CAPITAL_HEIGHT * size, centre + half, bottom)))
    return found


def _letter_owners(scene: Scene, patch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which letter owns each patch [P], and the facts of each letter [letters + 1, facts]."""
    owners = np.zeros((CANVAS, CANVAS), np.uint8)
    letters = [(0,) * (3 + MAX_LETTERS)]
    for text, order, (left, top, right, bottom) in letter_boxes(scene):
        owners[max(round(top), 0) : round(bottom) + 1, max(round(left), 0) : round(right)] = len(letters)
        spelling = [1 + CHARACTERS.index(character) for character in text]
        word = 1 + WORDS.index(text.lower()) if text.lower() in WORDS else 0
        letters.append((spelling[order], 1 + order, word, *spelling, *[0] * (MAX_LETTERS - len(text))))
    return _largest(owners, patch, len(letters) - 1), np.asarray(letters, np.int64)


def _twelfth(value: float) -> int:
    return 1 + min(int(12 * value / CANVAS), 11)


def _largest(owners: NDArray[np.uint8], patch: int, count: int) -> NDArray[np.int64]:
    """Return for each patch the owner, 1 to ``count``, of most of its pixels, or 0. owners: [side, side] -> [P]."""
    grid = owners.shape[0] // patch
    if count == 0:
        return np.zeros(grid * grid, np.int64)
    patches = owners.reshape(grid, patch, grid, patch).swapaxes(1, 2).reshape(grid * grid, 1, -1)  # [P, 1, pixels]
    covered = (patches == np.arange(1, count + 1, dtype=np.uint8)[:, None]).sum(axis=2)  # [P, count]
    return np.where(covered.max(axis=1) >= MIN_PATCH_PIXELS, covered.argmax(axis=1) + 1, 0)


def _texture(kind: str, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return what is added to a background: [side, side], or [side, side, 3] where colours differ."""
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
    if kind == "static":
        return rng.uniform(-255, 255, (side, side, 3)).astype(np.float32)
    if kind == "photo":
        return _photographic(side, rng)
    raise ValueError(f"Unknown background {kind!r}.")


def _photographic(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return noise with the spectrum of photographs, 1 over frequency, and a little grain: [side, side, 3]."""
    grid = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])  # [side, side / 2 + 1]
    grid[0, 0] = np.inf
    phases = np.fft.rfft2(rng.normal(0, 1, (3, side, side)))
    layers = np.fft.irfft2(phases / grid ** rng.uniform(0.8, 1.3), s=(side, side))  # [3, side, side]
    layers /= layers.std(axis=(1, 2), keepdims=True)
    light, tint = layers[0], layers[1:]
    colours = np.stack([light + 0.4 * tint[0], light, light + 0.4 * tint[1]], axis=-1)  # [side, side, 3]
    grain = rng.normal(0, 1, (side, side, 1)) * rng.uniform(0, 6)
    return (colours * rng.uniform(8, 24) + grain).astype(np.float32)


def _mask_of(thing: Thing, side: int) -> Image.Image:
    return shape_mask(thing.shape, max(round(2 * thing.radius * side / CANVAS), 1))


def _corner(thing: Thing, side: int) -> tuple[int, int]:
    scale = side / CANVAS
    return round((thing.x - thing.radius) * scale), round((thing.y - thing.radius) * scale)


def _text_box(sign: Sign, scale: float) -> Box:
    size = round(sign.height * scale)
    width = text_width(sign.text, sign.font, size)
    height = CAPITAL_HEIGHT * size
    left, top = round(sign.x * scale - width / 2), round(sign.y * scale - height / 2)
    return left, top, left + width, top + round(height)


def _letter_places(sign: Sign, left: float, scale: float) -> list[float]:
    size = round(sign.height * scale)
    return [left + text_width(sign.text[:index], sign.font, size) for index in range(len(sign.text))]
