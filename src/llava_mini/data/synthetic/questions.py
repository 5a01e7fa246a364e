"""Questions about a scene, with their answers. Their wording is in ``phrasings``.

Each kind of question is a function that returns a turn, or None when the scene has no such question.
Answers are balanced where the scene leaves a choice, so that guessing without seeing gains little.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from llava_mini.data.records import Noun, Turn
from llava_mini.data.synthetic.charts import ask_about_chart
from llava_mini.data.synthetic.phrasings import phrased
from llava_mini.data.synthetic.scenes import CANVAS, COLOURS, SHAPES, SIZES, Scene, Thing
from llava_mini.data.synthetic.splits import Split

MIN_GAP = 8
"""Two things are left and right (or above and below) of one another from so many units on."""

CANNOT_TELL = "I can't tell"
"""The answer to what no picture shows."""

NOTHING_WRITTEN = "nothing is written"
"""The answer to what is written in a picture without writing."""

Maker = Callable[[random.Random, Scene, Split], Turn | None]
AnyMaker = TypeVar("AnyMaker")


def existence(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask whether a thing, or writing, is there. Half of the answers are yes, whatever the form."""
    if scene.chart is not None:
        return None
    if rng.random() < 0.15:
        if not scene.signs and rng.random() < 0.5:
            return None
        return phrased(rng, split, "is there writing").turn("yes" if scene.signs else "no", kind="existence")
    if scene.things and rng.random() < 0.5:
        seen = rng.choice(scene.things)
        name, answer = rng.choice((seen.name, seen.name, seen.shape)), "yes"
    else:
        name, answer = near_miss(rng, scene.things), "no"
    found = [thing for thing in scene.things if name in (thing.name, thing.shape)]
    nouns: tuple[Noun, ...] = (Noun(phrase=name),)
    if found:
        nouns = (noun_of(name, found[0]),) if len(found) == 1 else ()
    return phrased(rng, split, "is there a thing", a=with_article(name)).turn(answer, kind="existence", nouns=nouns)


def colour(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for the colour of the only thing of its shape."""
    thing = _only(rng, scene.things, lambda thing: thing.shape)
    if thing is None:
        return None
    nouns = (noun_of(thing.shape, thing),)
    return phrased(rng, split, "colour of a shape", a=thing.shape).turn(thing.colour, kind="colour", nouns=nouns)


def shape(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for the shape of the only thing of its colour."""
    thing = _only(rng, scene.things, lambda thing: thing.colour)
    if thing is None:
        return None
    nouns = (noun_of(thing.colour, thing),)
    return phrased(rng, split, "shape of a colour", a=thing.colour).turn(thing.shape, kind="shape", nouns=nouns)


def size(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask whether a thing is small or large."""
    if not scene.unique_things:
        return None
    thing = rng.choice(scene.unique_things)
    name = name_of(rng, scene.things, thing)
    nouns = (noun_of(name, thing),)
    return phrased(rng, split, "small or large", a=name).turn(thing.size, kind="size", nouns=nouns)


def count(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask how many things there are."""
    if scene.chart is not None:
        return None
    return phrased(rng, split, "how many things").turn(str(len(scene.things)), kind="count")


def attribute_count(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask how many things have a shape, a colour, a size, or two of these. Larger numbers are preferred."""
    if not scene.things:
        return None
    makers: dict[str, Callable[[Thing], str]] = {
        "shape": lambda thing: plural(thing.shape),
        "colour": lambda thing: f"{thing.colour} things",
        "size": lambda thing: f"{thing.size} things",
        "name": lambda thing: plural(thing.name),
        "size and shape": lambda thing: f"{thing.size} {plural(thing.shape)}",
        "size and colour": lambda thing: f"{thing.size} {thing.colour} things",
    }
    by = rng.choices(tuple(makers), (3, 3, 2, 1, 1, 1))[0]
    present = [makers[by](thing) for thing in scene.things]
    if rng.random() < 0.2:
        a, b, c = rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))
        name = makers[by](Thing(shape=a, colour=b, size=c, radius=1, x=0, y=0))
    else:
        names = sorted(set(present))
        name = rng.choices(names, [present.count(name) ** 3 for name in names])[0]
    question = phrased(rng, split, "how many of a kind", form=f"how many of a {by}", a=name)
    return question.turn(str(present.count(name)), kind="attribute count")


def location(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask in which of nine places a thing is."""
    clear = [thing for thing in scene.unique_things if thing.place_is_clear]
    if not clear:
        return None
    thing = rng.choice(clear)
    name = name_of(rng, scene.things, thing)
    alike = sum(other.shape == thing.shape for other in scene.things) > 1
    case = "a thing of the same shape" if alike else ""
    nouns = (noun_of(name, thing),)
    return phrased(rng, split, "where", a=name).turn(thing.place, kind="location", case=case, nouns=nouns)


def relation(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask on which side of another thing a thing is."""
    if len(scene.unique_things) < 2:
        return None
    first, second = rng.sample(scene.unique_things, 2)
    across = rng.random() < 0.5
    gap = first.x - second.x if across else first.y - second.y
    if abs(gap) < MIN_GAP:
        return None
    names = {"a": name_of(rng, scene.things, first), "b": name_of(rng, scene.things, second)}
    nouns = noun_of(names["a"], first), noun_of(names["b"], second)
    sides = ("left", "right") if across else ("above", "below")
    if rng.random() < 0.6:
        question = phrased(rng, split, f"{sides[0]} or {sides[1]}", **names)
        return question.turn(sides[gap > 0], kind="relation", nouns=nouns)
    index = rng.randrange(2)
    side = f"{sides[index]} of" if across else sides[index]
    answer = "yes" if (gap > 0) == (index == 1) else "no"
    return phrased(rng, split, "is it there from there", side=side, **names).turn(answer, kind="relation", nouns=nouns)


def compare(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask which of two things is the larger or the smaller, or whether they are of the same size."""
    things = list(scene.unique_things)
    rng.shuffle(things)
    small = next((thing for thing in things if thing.size == "small"), None)
    large = next((thing for thing in things if thing.size == "large"), None)
    if rng.random() < 0.25:
        return _same_size(rng, scene, split, things)
    if small is None or large is None:
        return None
    pair = [small, large]
    rng.shuffle(pair)
    form = rng.choice(("which is larger", "which is smaller"))
    names = tuple(name_of(rng, scene.things, thing) for thing in pair)
    best = pair.index(large if form == "which is larger" else small)
    choices = tuple(f"the {name}" for name in names)
    nouns = tuple(noun_of(name, thing) for name, thing in zip(names, pair, strict=True))
    return phrased(rng, split, form, a=names[0], b=names[1]).turn(
        choices[best], kind="compare", choices=choices, nouns=nouns
    )


def _same_size(rng: random.Random, scene: Scene, split: Split, things: Sequence[Thing]) -> Turn | None:
    wanted = rng.random() < 0.37  # pairs of one size are commoner: so both answers come equally often
    for first in things:
        for second in things:
            if first is not second and (first.size == second.size) == wanted:
                names = name_of(rng, scene.things, first), name_of(rng, scene.things, second)
                nouns = noun_of(names[0], first), noun_of(names[1], second)
                question = phrased(rng, split, "same size", a=names[0], b=names[1])
                return question.turn("yes" if wanted else "no", kind="compare", nouns=nouns)
    return None


def text(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask what is written. The answer is in small letters; about one in eight asks where nothing is written."""
    if not scene.signs:
        if scene.chart is not None or rng.random() < 0.985:
            return None
        form = rng.choice(("what text", "what number", "what word"))
        return phrased(rng, split, form).turn(NOTHING_WRITTEN, kind="text")
    written = scene.signs[0].text.lower()
    form = rng.choice(("what text", "what number" if written.isdigit() else "what word"))
    return phrased(rng, split, form).turn(written, kind="text")


def chart(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask about a bar chart."""
    return None if scene.chart is None else ask_about_chart(rng, scene.chart, split)


def absence(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for a property of a thing that is not there: the answer says so."""
    name = near_miss(rng, scene.things)
    nouns = (Noun(phrase=name),)
    if " " in name:
        form = rng.choice(("where", "small or large"))
    else:
        form = rng.choice(("where", "small or large", "colour of a shape", "colour of a shape"))
    answer = f"there is no {name}"
    return phrased(rng, split, form, a=name).turn(answer, kind="absence", choices=(answer,), nouns=nouns)


def cannot_tell(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for something that no picture shows: a sound, a smell, a price."""
    name = rng.choice(scene.things).shape if scene.things else rng.choice(("picture", "chart"))
    return phrased(rng, split, "cannot tell", a=name).turn(CANNOT_TELL, kind="cannot tell")


def caption(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for a description."""
    return phrased(rng, split, "describe").turn(name_all(scene), kind="caption")


MAKERS: dict[str, Maker] = {
    "existence": existence,
    "colour": colour,
    "shape": shape,
    "size": size,
    "count": count,
    "attribute count": attribute_count,
    "location": location,
    "relation": relation,
    "compare": compare,
    "text": text,
    "chart": chart,
    "absence": absence,
    "cannot tell": cannot_tell,
    "caption": caption,
}
"""Every kind of question about an image."""


def ask(rng: random.Random, scene: Scene, kind: str, split: Split) -> Turn | None:
    """Return a question of a kind, or None when six attempts found none that the scene allows.

    Raises:
        ValueError: If there is no such kind.
    """
    maker = maker_of(kind, MAKERS)
    for _ in range(6):
        turn = maker(rng, scene, split)
        if turn is not None:
            return turn
    return None


def maker_of(kind: str, makers: Mapping[str, AnyMaker]) -> AnyMaker:
    """Return what asks questions of a kind.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in makers:
        raise ValueError(f"Unknown kind of question {kind!r}. The kinds are {', '.join(makers)}.")
    return makers[kind]


def describe(scene: Scene) -> str:
    """Return all there is to know: ``a small red circle at the top left and the word cat``.

    It stands for the picture where a language model is trained alone.
    """
    return _listed(scene, [f"a {thing.size} {thing.name} at the {thing.place}" for thing in _in_reading_order(scene)])


def name_all(scene: Scene) -> str:
    """Return a caption, in reading order: ``a red circle, a blue star and the word cat``."""
    return _listed(scene, [with_article(thing.name) for thing in _in_reading_order(scene)])


def _in_reading_order(scene: Scene) -> list[Thing]:
    return sorted(scene.things, key=lambda thing: (thing.y // (CANVAS / 3), thing.x))


def _listed(scene: Scene, parts: list[str]) -> str:
    if scene.chart is not None:
        return scene.chart.describe()
    signs = [f"the {'number' if sign.text.isdigit() else 'word'} {sign.text.lower()}" for sign in scene.signs]
    parts = [*parts, *signs] or ["nothing"]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def name_of(rng: random.Random, things: Sequence[Thing], thing: Thing) -> str:
    """Return the full name of a thing, or sometimes its shape where nothing else has that shape."""
    alone = sum(other.shape == thing.shape for other in things) == 1
    return thing.shape if alone and rng.random() < 0.3 else thing.name


def near_miss(rng: random.Random, things: Sequence[Thing]) -> str:
    """Return a name or a shape that no thing has; mostly one word of it is that of a thing that is there."""
    names = {name for thing in things for name in (thing.name, thing.shape)}
    while True:
        other_shape, other_colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        seen = rng.choice(things) if things else None
        colour, shape = (seen.colour, seen.shape) if seen else (other_colour, other_shape)
        name = rng.choice((f"{colour} {other_shape}", f"{other_colour} {shape}", other_shape))
        if name not in names:
            return name


def with_article(name: str) -> str:
    """Return ``a`` or ``an`` and the name."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str) -> str:
    """Return the plural of a name that ends with a shape."""
    return f"{name}es" if name.endswith("cross") else f"{name}s"


def noun_of(phrase: str, thing: Thing) -> Noun:
    """Return a phrase that names a thing, with place, colour, shape and size of the thing."""
    return Noun(phrase=phrase, path=((thing.x / CANVAS, thing.y / CANVAS),), facts=thing.facts)


def _only(rng: random.Random, things: Sequence[Thing], key: Callable[[Thing], str]) -> Thing | None:
    values = [key(thing) for thing in things]
    candidates = [thing for thing in things if values.count(key(thing)) == 1]
    return rng.choice(candidates) if candidates else None
