"""Questions about a scene, with their answers.

Each kind of question is a function that returns a turn, or None when the scene has no such question.
Each form has several phrasings; the last one is asked in the test split only. Answers are balanced
where the scene leaves a choice, so that guessing without seeing gains little.
"""

import random
from collections.abc import Callable, Sequence

from llava_mini.data.records import Noun, Turn
from llava_mini.data.synthetic.scenes import CANVAS, COLOURS, SHAPES, SIZES, Scene, Split, Thing

MIN_GAP = 8
"""Two things are left and right (or above and below) of one another from so many units on."""

PHRASINGS: dict[str, tuple[str, ...]] = {
    "is there a thing": ("Is there {a}?", "Do you see {a}?", "Is {a} in the picture?", "Can you find {a}?"),
    "is there writing": ("Is anything written?", "Is there a word or a number?", "Do you see any text?"),
    "colour of a shape": (
        "What color is the {a}?",
        "What colour is the {a}?",
        "Which color does the {a} have?",
        "Tell me the color of the {a}.",
    ),
    "shape of a colour": (
        "What shape is the {a} thing?",
        "Which shape is {a}?",
        "What is the shape of the {a} thing?",
        "What {a} shape is there?",
    ),
    "how many things": ("How many things are there?", "How many shapes do you see?", "Count the shapes."),
    "how many of a shape": ("How many {a} are there?", "How many {a} do you see?", "Count the {a}."),
    "how many of a colour": (
        "How many {a} things are there?",
        "How many things are {a}?",
        "Count the {a} things.",
    ),
    "where": ("Where is the {a}?", "In which part is the {a}?", "What is the position of the {a}?"),
    "left or right": (
        "Is the {a} left or right of the {b}?",
        "Is the {a} to the left or to the right of the {b}?",
        "On which side of the {b} is the {a}, left or right?",
    ),
    "above or below": (
        "Is the {a} above or below the {b}?",
        "Is the {a} higher or lower than the {b}, above or below?",
        "Above or below the {b}: where is the {a}?",
    ),
    "is it there from there": (
        "Is the {a} {side} the {b}?",
        "Is the {a} placed {side} the {b}?",
        "{side} the {b}, is there the {a}?",
    ),
    "small or large": (
        "Is the {a} small or large?",
        "What size is the {a}, small or large?",
        "Small or large: the {a}?",
    ),
    "which is larger": (
        "Which is larger, the {a} or the {b}?",
        "Which one is bigger: the {a} or the {b}?",
        "What is larger, the {a} or the {b}?",
    ),
    "which is smaller": (
        "Which is smaller, the {a} or the {b}?",
        "Which one is smaller: the {a} or the {b}?",
        "What is smaller, the {a} or the {b}?",
    ),
    "what word": ("What word is written?", "Which word do you see?", "Read the word.", "What is the word?"),
    "what number": ("What number is written?", "Which number do you see?", "Read the number.", "What is the number?"),
    "what text": ("What does the sign say?", "What is written?", "Read the text.", "What does it say?"),
    "describe": ("Describe the picture.", "What do you see?", "What is in the picture?", "Give a description."),
}
"""Phrasings of each form of question. The last of each is kept for the test split."""

Maker = Callable[[random.Random, Scene, Split], Turn | None]


def phrased(rng: random.Random, split: Split, form: str, **names: str) -> str:
    """Return a question in one of the phrasings that a split may use.

    Args:
        rng: Where the random numbers come from.
        split: The test split uses all phrasings, the others all but the last.
        form: A key of ``PHRASINGS``.
        **names: What stands in the places of the phrasing.
    """
    phrasings = PHRASINGS[form] if split == "test" else PHRASINGS[form][:-1]
    text = rng.choice(phrasings).format(**names)
    text = text[0].upper() + text[1:]
    if split == "train" and rng.random() < 0.1:
        text = text.lower().rstrip("?.")
    return text


def existence(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask whether a thing, or writing, is there. Half of the answers are yes, whatever the form."""
    if rng.random() < 0.15:
        if not scene.signs and rng.random() < 0.5:
            return None
        answer = "yes" if scene.signs else "no"
        return Turn(
            question=phrased(rng, split, "is there writing"), answer=answer, kind="existence", form="is there writing"
        )
    if not scene.things:
        return None
    answer = rng.choice(("yes", "no"))
    names = {name for thing in scene.things for name in (thing.name, thing.shape)}
    seen = rng.choice(scene.things)
    name = rng.choice((seen.name, seen.name, seen.shape))
    while answer == "no" and name in names:  # a near miss: one word of the name is that of a thing that is there
        near = f"{seen.colour} {rng.choice(SHAPES)}", f"{rng.choice(tuple(COLOURS))} {seen.shape}", rng.choice(SHAPES)
        name = rng.choice(near)
    question = phrased(rng, split, "is there a thing", a=with_article(name))
    found = [thing for thing in scene.things if name in (thing.name, thing.shape)]
    nouns: tuple[Noun, ...] = (noun_of(name, found[0]),) if len(found) == 1 else ()
    if not found:
        nouns = (Noun(phrase=name),)
    return Turn(question=question, answer=answer, kind="existence", form="is there a thing", nouns=nouns)


def colour(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for the colour of the only thing of its shape."""
    thing = _only(rng, scene.things, lambda thing: thing.shape)
    if thing is None:
        return None
    question = phrased(rng, split, "colour of a shape", a=thing.shape)
    nouns = (noun_of(f"the {thing.shape}", thing),)
    return Turn(question=question, answer=thing.colour, kind="colour", form="colour of a shape", nouns=nouns)


def shape(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for the shape of the only thing of its colour."""
    thing = _only(rng, scene.things, lambda thing: thing.colour)
    if thing is None:
        return None
    question = phrased(rng, split, "shape of a colour", a=thing.colour)
    nouns = (noun_of(thing.colour, thing),)
    return Turn(question=question, answer=thing.shape, kind="shape", form="shape of a colour", nouns=nouns)


def count(rng: random.Random, scene: Scene, split: Split) -> Turn:
    """Ask how many things there are: all, of a shape, or of a colour. Larger numbers are preferred."""
    form = rng.choice(("how many things", "how many of a shape", "how many of a colour"))
    if form == "how many things":
        return Turn(question=phrased(rng, split, form), answer=str(len(scene.things)), kind="count", form=form)
    of_shape = form == "how many of a shape"
    present = [thing.shape if of_shape else thing.colour for thing in scene.things]
    everything = SHAPES if of_shape else tuple(COLOURS)
    weights = [0.6 / len(everything) + (present.count(name) - 0.6) * (present.count(name) > 0) for name in everything]
    name = rng.choices(everything, weights)[0]
    text = phrased(rng, split, form, a=plural(name) if of_shape else name)
    return Turn(question=text, answer=str(present.count(name)), kind="count", form=form)


def location(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask in which of nine places a thing is."""
    clear = [thing for thing in scene.unique_things if thing.place_is_clear]
    if not clear:
        return None
    thing = rng.choice(clear)
    question = phrased(rng, split, "where", a=thing.name)
    nouns = (noun_of(thing.name, thing),)
    return Turn(question=question, answer=thing.place, kind="location", form="where", nouns=nouns)


def relation(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask on which side of another thing a thing is."""
    if len(scene.unique_things) < 2:
        return None
    first, second = rng.sample(scene.unique_things, 2)
    across = rng.random() < 0.5
    gap = first.x - second.x if across else first.y - second.y
    if abs(gap) < MIN_GAP:
        return None
    names = {"a": first.name, "b": second.name}
    nouns = noun_of(first.name, first), noun_of(second.name, second)
    sides = ("left", "right") if across else ("above", "below")
    if rng.random() < 0.6:
        form = f"{sides[0]} or {sides[1]}"
        answer = sides[gap > 0]
        question = phrased(rng, split, form, **names)
        return Turn(question=question, answer=answer, kind="relation", form=form, choices=sides, nouns=nouns)
    index = rng.randrange(2)
    side = f"{sides[index]} of" if across else sides[index]
    form = "is it there from there"
    question = phrased(rng, split, form, side=side, **names)
    answer = "yes" if (gap > 0) == (index == 1) else "no"
    return Turn(question=question, answer=answer, kind="relation", form=form, nouns=nouns)


def size(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask whether a thing is small or large."""
    if not scene.unique_things:
        return None
    thing = rng.choice(scene.unique_things)
    form = "small or large"
    question = phrased(rng, split, form, a=thing.name)
    nouns = (noun_of(thing.name, thing),)
    return Turn(question=question, answer=thing.size, kind="size", form=form, choices=("small", "large"), nouns=nouns)


def compare(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask which of two things, a small one and a large one, is the larger or the smaller."""
    things = list(scene.unique_things)
    rng.shuffle(things)
    small = next((thing for thing in things if thing.size == "small"), None)
    large = next((thing for thing in things if thing.size == "large"), None)
    if small is None or large is None:
        return None
    pair = [small, large]
    rng.shuffle(pair)
    form = rng.choice(("which is larger", "which is smaller"))
    question = phrased(rng, split, form, a=pair[0].name, b=pair[1].name)
    answer = f"the {(large if form == 'which is larger' else small).name}"
    choices = tuple(f"the {thing.name}" for thing in pair)
    nouns = tuple(noun_of(thing.name, thing) for thing in pair)
    return Turn(question=question, answer=answer, kind="compare", form=form, choices=choices, nouns=nouns)


def text(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask what is written. The answer is in small letters."""
    if not scene.signs:
        return None
    written = scene.signs[0].text.lower()
    form = rng.choice(("what text", "what number" if written.isdigit() else "what word"))
    return Turn(question=phrased(rng, split, form), answer=written, kind="text", form=form)


def absence(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for a property of a thing that is not there."""
    missing = [name for name in SHAPES if name not in {thing.shape for thing in scene.things}]
    if not missing:
        return None
    name = rng.choice(missing)
    form = rng.choice(("colour of a shape", "where", "small or large"))
    question = phrased(rng, split, form, a=name)
    nouns = (Noun(phrase=f"the {name}"),)
    return Turn(question=question, answer=f"there is no {name}", kind="absence", form=f"absent: {form}", nouns=nouns)


def caption(rng: random.Random, scene: Scene, split: Split) -> Turn | None:
    """Ask for a description."""
    if not scene.things and not scene.signs:
        return None
    return Turn(question=phrased(rng, split, "describe"), answer=describe(scene), kind="caption", form="describe")


MAKERS: dict[str, Maker] = {
    "existence": existence,
    "colour": colour,
    "shape": shape,
    "count": count,
    "location": location,
    "relation": relation,
    "size": size,
    "compare": compare,
    "text": text,
    "absence": absence,
    "caption": caption,
}
"""Every kind of question about an image."""


def ask(rng: random.Random, scene: Scene, kind: str, split: Split) -> Turn | None:
    """Return a question of a kind, or None when six attempts found none that the scene allows.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in MAKERS:
        raise ValueError(f"Unknown kind of question {kind!r}. The kinds are {', '.join(MAKERS)}.")
    for _ in range(6):
        turn = MAKERS[kind](rng, scene, split)
        if turn is not None:
            return turn
    return None


def describe(scene: Scene) -> str:
    """Return a sentence that names everything in reading order: ``a small red circle at the top left``."""
    things = sorted(scene.things, key=lambda thing: (thing.y // (CANVAS / 3), thing.x))
    parts = [f"a {thing.size} {thing.name} at the {thing.place}" for thing in things]
    for sign in scene.signs:
        parts.append(f"the {'number' if sign.text.isdigit() else 'word'} {sign.text.lower()}")
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def with_article(name: str) -> str:
    """Return ``a`` or ``an`` and the name."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str) -> str:
    """Return the plural of a shape's name."""
    return f"{name}es" if name == "cross" else f"{name}s"


def noun_of(phrase: str, thing: Thing) -> Noun:
    """Return a phrase that names a thing, with place, colour, shape and size of the thing."""
    facts = {
        "colour": tuple(COLOURS).index(thing.colour),
        "shape": SHAPES.index(thing.shape),
        "size": tuple(SIZES).index(thing.size),
    }
    return Noun(phrase=phrase, path=((thing.x / CANVAS, thing.y / CANVAS),), facts=tuple(facts.items()))


def _only(rng: random.Random, things: Sequence[Thing], key: Callable[[Thing], str]) -> Thing | None:
    values = [key(thing) for thing in things]
    candidates = [thing for thing in things if values.count(key(thing)) == 1]
    return rng.choice(candidates) if candidates else None
