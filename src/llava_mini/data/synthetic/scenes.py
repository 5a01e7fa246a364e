"""The synthetic world: what a scene holds, drawn at random from a seed. Pixels are made in ``drawing``.

Lengths and places are in world units: the canvas is ``CANVAS`` units wide and high, x grows to the
right and y downwards. A scene is plain data, so that the answer to a question about it is known.
"""

import random
from dataclasses import dataclass, replace

from llava_mini.data.synthetic.charts import Chart, random_chart
from llava_mini.data.synthetic.fonts import FONTS, text_width

CANVAS = 96
"""World units along a side of a scene; one pixel each at the size of the tiny model."""

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (245, 140, 20),
    "yellow": (248, 226, 50),
    "green": (40, 160, 60),
    "blue": (40, 85, 225),
    "purple": (135, 50, 175),
    "pink": (250, 150, 200),
    "brown": (115, 68, 30),
    "black": (15, 15, 15),
    "white": (252, 252, 252),
}

SHADE = 16
"""A thing's colour differs from that of ``COLOURS`` by at most so much in red, green and blue."""

SIZES: dict[str, tuple[int, int]] = {"small": (6, 8), "large": (12, 15)}
"""Smallest and largest radius of each size."""

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""Names of the nine cells of the canvas, row by row."""

WORDS = (
    *("cat", "dog", "sun", "hat", "car", "bus", "cup", "map", "key", "box", "fox", "bee", "egg", "jam", "pen", "ten"),
    *("red", "blue", "park", "shop", "stop", "exit", "open", "milk", "fish", "bird", "tree", "star", "moon", "ship"),
    *("road", "home", "door", "book", "lamp", "king", "gold", "wind", "rain", "snow", "zoo", "ice", "van", "jet"),
    *("quiz", "vote", "work", "push", "pull", "taxi", "hall", "cafe", "bank", "food", "left", "west", "east", "day"),
)
"""What is written on signs, besides numbers."""

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What signs are written with."""

SIGN_SIZES = (14, 20)
"""Smallest and largest size of the font of a sign."""

BACKGROUNDS = ("plain", "gradient", "noise", "stripes", "blotches", "photo")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One coloured shape."""

    shape: str
    """One of ``SHAPES``."""
    colour: str
    """One of ``COLOURS``."""
    size: str
    """One of ``SIZES``."""
    radius: int
    """Half of its width, in world units."""
    shade: tuple[int, int, int] = (0, 0, 0)
    """What is added to the red, green and blue of its colour."""
    x: float
    """Centre, in world units."""
    y: float
    """Centre, in world units."""

    @property
    def name(self) -> str:
        """How questions call it: ``red circle``."""
        return f"{self.colour} {self.shape}"

    @property
    def facts(self) -> tuple[tuple[str, int], ...]:
        """Its properties, each with the number of its value."""
        return (
            ("colour", tuple(COLOURS).index(self.colour)),
            ("shape", SHAPES.index(self.shape)),
            ("size", tuple(SIZES).index(self.size)),
        )

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour it is painted in."""
        red, green, blue = (
            min(max(value + more, 0), 255) for value, more in zip(COLOURS[self.colour], self.shade, strict=True)
        )
        return red, green, blue

    @property
    def place(self) -> str:
        """The cell of the canvas that holds its centre."""
        return PLACES[3 * cell_of(self.y) + cell_of(self.x)]

    @property
    def place_is_clear(self) -> bool:
        """Whether the centre is at least 3 units from the border of its cell."""
        return all(abs(value - border) >= 3 for value in (self.x, self.y) for border in (CANVAS / 3, 2 * CANVAS / 3))


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A word or a number written into a scene, in capital letters."""

    text: str
    x: float
    """Centre, in world units."""
    y: float
    """Centre, in world units."""
    height: int
    """Size of the font, in world units."""
    font: str = "sans"
    """One of ``FONTS``."""
    ink: tuple[int, int, int]
    """Colour of the letters."""
    plate: tuple[int, int, int] | None
    """Colour of a board behind the letters. None: written on the background."""
    bold: bool
    """Whether every stroke is one unit thicker."""

    @property
    def half_width(self) -> float:
        """Half of the width with a margin, in world units."""
        return text_width(self.text, self.font, self.height) / 2 + 4


@dataclass(frozen=True, kw_only=True)
class Background:
    """What is behind the things: a muted colour with a texture."""

    kind: str
    """One of ``BACKGROUNDS``, or ``static`` where nothing is shown."""
    colour: tuple[int, int, int]
    seed: int
    """Seed of the texture."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that a picture shows."""

    things: tuple[Thing, ...]
    """From the hindmost to the foremost."""
    signs: tuple[Sign, ...]
    background: Background
    chart: Chart | None = None
    """A scene with a chart shows nothing else."""

    def named(self, name: str) -> tuple[Thing, ...]:
        """Return the things that are called ``name``."""
        return tuple(thing for thing in self.things if thing.name == name)

    @property
    def unique_things(self) -> tuple[Thing, ...]:
        """The things whose colour and shape together name nothing else."""
        return tuple(thing for thing in self.things if len(self.named(thing.name)) == 1)


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What random scenes hold."""

    min_things: int = 1
    max_things: int = 8
    empty_share: float = 0.03
    """Share of scenes without things, where fewer than ``min_things`` would otherwise not occur. Half of them, those
    with writing excepted, have a background unlike those of the others."""
    sign_share: float = 0.35
    """Share of scenes with a word or a number, among those without a chart."""
    chart_share: float = 0.0
    """Share of scenes with a bar chart."""
    overlap_share: float = 0.25
    """Share of scenes in which things may cover one another in part."""
    distractor_share: float = 0.5
    """Chance that a further thing repeats the shape or the colour of an earlier one."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_things <= self.max_things:
            raise ValueError(
                f"SceneSettings needs 0 <= min_things <= max_things, got {self.min_things} and {self.max_things}."
            )


def cell_of(value: float) -> int:
    """Return the third of the canvas, 0 to 2, that holds a coordinate."""
    return min(int(3 * value / CANVAS), 2)


def random_scene(rng: random.Random, settings: SceneSettings | None = None) -> Scene:
    """Draw the content of a scene. Things keep clear of signs, and of one another unless they may overlap.

    Args:
        rng: Where the random numbers come from.
        settings: What the scene may hold; the defaults of ``SceneSettings`` when not given.
    """
    settings = settings or SceneSettings()
    background = random_background(rng)
    if settings.chart_share and rng.random() < settings.chart_share:
        chart = random_chart(rng, tuple(COLOURS), tuple(FONTS))
        return Scene(things=(), signs=(), background=background, chart=chart)
    signs: tuple[Sign, ...] = ()
    if rng.random() < settings.sign_share:
        signs = (random_sign(rng, background),)
    nearest = 0.75 if rng.random() < settings.overlap_share else 1.1
    things: list[Thing] = []
    is_empty = rng.random() < settings.empty_share
    if is_empty and not signs and rng.random() < 0.5:
        background = _odd_background(rng)
    for _ in range(0 if is_empty else rng.randint(settings.min_things, settings.max_things)):
        thing = _placed(rng, _random_thing(rng, things, settings), things, signs, nearest)
        if thing is not None:
            things.append(thing)
    if not things and settings.min_things > 0 and not is_empty:
        return random_scene(rng, replace(settings, sign_share=0.0))
    return Scene(things=tuple(things), signs=signs, background=background)


def random_page(rng: random.Random) -> Scene:
    """Draw a page of words, strings of letters and things packed in four rows: many letters for little work."""
    background = random_background(rng)
    things: list[Thing] = []
    signs: list[Sign] = []
    for cell in range(8):
        x, y = 24 + 48 * (cell % 2), 12 + 24 * (cell // 2)
        if rng.random() < 0.25:
            thing = _random_thing(rng, things, SceneSettings())
            radius = min(thing.radius, 12)
            things.append(replace(thing, radius=radius, x=x + rng.randint(-10, 10), y=y + rng.randint(-1, 1)))
        else:
            sign = random_sign(rng, background)
            alphabet = CHARACTERS[10:] if rng.random() < 0.7 else CHARACTERS[:10]
            text = sign.text if rng.random() < 0.4 else "".join(rng.choices(alphabet, k=rng.randint(2, 4)))
            sign = replace(sign, text=text)
            while sign.half_width > 25 and sign.height > SIGN_SIZES[0]:
                sign = replace(sign, height=sign.height - 1)
            while sign.half_width > 25:
                sign = replace(sign, text=sign.text[:-1])
            slack = max(int(25 - sign.half_width), 0)
            signs.append(replace(sign, x=x + rng.randint(-slack, slack), y=y + rng.randint(-2, 2)))
    return Scene(things=tuple(things), signs=tuple(signs), background=background)


def random_background(rng: random.Random) -> Background:
    """Draw a muted background, away from black and from white."""
    level = rng.randint(105, 185)
    red, green, blue = (level + rng.randint(-16, 16) for _ in range(3))
    return Background(kind=rng.choice(BACKGROUNDS), colour=(red, green, blue), seed=rng.getrandbits(32))


def _odd_background(rng: random.Random) -> Background:
    """Draw a background of any colour, or of pixels that have nothing to do with one another."""
    red, green, blue = (rng.choice((0, 255, rng.randint(0, 255))) for _ in range(3))
    return Background(kind=rng.choice((*BACKGROUNDS, "static")), colour=(red, green, blue), seed=rng.getrandbits(32))


def random_sign(rng: random.Random, background: Background) -> Sign:
    """Draw a word or a number of one to three digits, and a place that keeps it on the canvas.

    Letters are rather dark on a light background, and light on a dark one.
    """
    text = rng.choice(WORDS).upper() if rng.random() < 0.6 else str(rng.randrange(10 ** rng.randint(1, 3)))
    dark = rng.random() < (0.85 if sum(background.colour) > 3 * 145 else 0.3)
    shade = rng.randint(0, 45) if dark else rng.randint(225, 255)
    plate = None
    if rng.random() < 0.4:
        board = rng.randint(215, 250) if dark else rng.randint(10, 60)
        plate = (board, board, board)
    font = rng.choice(tuple(FONTS))
    bold = font == "sans" and rng.random() < 0.4
    height = rng.randint(*SIGN_SIZES)
    sign = Sign(text=text, x=0, y=0, height=height, font=font, ink=(shade, shade, shade), plate=plate, bold=bold)
    margin = sign.half_width + 1
    x = rng.uniform(margin, CANVAS - margin) if margin < CANVAS / 2 else CANVAS / 2
    return replace(sign, x=round(x), y=round(rng.uniform(12, CANVAS - 12)))


def _random_thing(rng: random.Random, others: list[Thing], settings: SceneSettings) -> Thing:
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    if others and rng.random() < settings.distractor_share:
        other = rng.choice(others)
        shape, colour = (other.shape, colour) if rng.random() < 0.5 else (shape, other.colour)
    size = rng.choice(tuple(SIZES))
    red, green, blue = (rng.randint(-SHADE, SHADE) for _ in range(3))
    return Thing(
        shape=shape, colour=colour, size=size, radius=rng.randint(*SIZES[size]), shade=(red, green, blue), x=0, y=0
    )


def _placed(
    rng: random.Random, thing: Thing, others: list[Thing], signs: tuple[Sign, ...], nearest: float
) -> Thing | None:
    """Return the thing at a free place, or None when 20 places were all taken.

    ``nearest`` is the least distance to the centre of another thing, as a share of the two radii together.
    """
    margin = thing.radius + 1
    for _ in range(20):
        x, y = rng.randint(margin, CANVAS - margin), rng.randint(margin, CANVAS - margin)
        clear_of_things = all(
            (x - other.x) ** 2 + (y - other.y) ** 2 > (nearest * (thing.radius + other.radius)) ** 2 for other in others
        )
        clear_of_signs = all(
            abs(x - sign.x) > thing.radius + sign.half_width or abs(y - sign.y) > thing.radius + sign.height / 2 + 2
            for sign in signs
        )
        if clear_of_things and clear_of_signs:
            return replace(thing, x=x, y=y)
    return None
