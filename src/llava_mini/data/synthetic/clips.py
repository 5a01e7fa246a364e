"""Short clips of the drawn world, and questions about what happens in them.

A clip is a few scenes that share their background. At most one thing moves, and at most one changes
its colour. The answer to every question here depends on more than one frame, but for ``still colour``.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from llava_mini.data.records import Noun, Turn
from llava_mini.data.synthetic.questions import with_article
from llava_mini.data.synthetic.scenes import CANVAS, COLOURS, Scene, SceneSettings, Split, Thing, random_scene

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Step along x and y; y grows downwards."""

PHRASINGS: dict[str, tuple[str, ...]] = {
    "direction": (
        "Which way does the {a} move?",
        "In which direction does the {a} move?",
        "Where does the {a} move to?",
        "The {a} moves: which way?",
    ),
    "does anything move": ("Does anything move?", "Is something moving?", "Is there any motion?"),
    "does it move": ("Does the {a} move?", "Is the {a} moving?", "Is the {a} in motion?"),
    "what moves": ("What moves?", "Which thing moves?", "What is moving?"),
    "does anything change": ("Does anything change color?", "Does a color change?", "Is there a change of color?"),
    "new colour": (
        "What color does the {a} become?",
        "Which color does the {a} turn into?",
        "What is the new color of the {a}?",
    ),
    "what appears": ("What appears?", "Which thing appears?", "What shows up later?"),
    "what happens": ("What happens?", "Describe the video.", "What do you see happen?", "Tell me what happens."),
    "still colour": ("What color is the {a}?", "What colour is the {a}?", "Tell me the color of the {a}."),
}
"""Phrasings of each form of question. The last of each is kept for the test split."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A few frames and what happens in them. Index -1 means that it happens to no thing."""

    frames: tuple[Scene, ...]
    """The things of every frame stand in the same order; one that appears is the last of the later frames."""
    mover: int = -1
    direction: str = ""
    """Of the mover; a key of ``DIRECTIONS``."""
    changer: int = -1
    """Which thing has another colour in the later frames."""
    appears: bool = False
    """Whether the last thing is missing from the first frames."""

    def path_of(self, index: int) -> tuple[tuple[float, float], ...]:
        """Return where a thing is in each frame, as shares of the canvas."""
        last = self.frames[-1].things[index]
        found = [frame.things[index] if index < len(frame.things) else last for frame in self.frames]
        return tuple((thing.x / CANVAS, thing.y / CANVAS) for thing in found)


Maker = Callable[[random.Random, Clip, Split], Turn | None]


def random_clip(rng: random.Random, *, num_frames: int = 4, max_things: int = 3) -> Clip:
    """Draw a clip: in half of them a thing moves; the others change, gain a thing, or stay still.

    Args:
        rng: Where the random numbers come from.
        num_frames: Frames of the clip, at least 2.
        max_things: Most things in a frame.
    """
    if num_frames < 2:
        raise ValueError(f"A clip needs at least 2 frames, got {num_frames}.")
    settings = SceneSettings(min_things=1, max_things=max_things, sign_share=0.0)
    scene = random_scene(rng, settings)
    while len(scene.unique_things) < len(scene.things):
        scene = random_scene(rng, settings)
    event = rng.choice(("move", "move", "move", "move", "change", "change", "appear", "still"))
    index = rng.randrange(len(scene.things))
    if event == "move":
        direction = rng.choice(tuple(DIRECTIONS))
        frames = tuple(
            _replaced(scene, index, thing) for thing in _moved(rng, scene.things[index], direction, num_frames)
        )
        return Clip(frames=frames, mover=index, direction=direction)
    start = rng.randrange(1, num_frames)
    if event == "change":
        old = scene.things[index]
        taken = {thing.colour for thing in scene.things}
        new = replace(old, colour=rng.choice([name for name in COLOURS if name not in taken]))
        frames = tuple(scene if number < start else _replaced(scene, index, new) for number in range(num_frames))
        return Clip(frames=frames, changer=index)
    if event == "appear" and len(scene.things) > 1:
        before = replace(scene, things=scene.things[:-1])
        frames = tuple(before if number < start else scene for number in range(num_frames))
        return Clip(frames=frames, appears=True)
    return Clip(frames=(scene,) * num_frames)


def direction(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask which way the moving thing goes."""
    if clip.mover < 0:
        return None
    question = _phrased(rng, split, "direction", a=_name(clip, clip.mover))
    return Turn(
        question=question, answer=clip.direction, kind="direction", form="direction", nouns=nouns_of(clip, clip.mover)
    )


def moving(rng: random.Random, clip: Clip, split: Split) -> Turn:
    """Ask whether anything moves, whether one thing moves, or what moves."""
    form = rng.choice(("does anything move", "does it move", "what moves"))
    if form == "does anything move":
        answer = "yes" if clip.mover >= 0 else "no"
        return Turn(question=_phrased(rng, split, form), answer=answer, kind="moving", form=form)
    if form == "what moves":
        answer = f"the {_name(clip, clip.mover)}" if clip.mover >= 0 else "nothing"
        return Turn(question=_phrased(rng, split, form), answer=answer, kind="moving", form=form)
    others = [index for index in range(len(clip.frames[0].things)) if index not in (clip.mover, clip.changer)]
    index = clip.mover if clip.mover >= 0 and (rng.random() < 0.85 or not others) else -1
    if index < 0:
        if not others:
            return moving(rng, clip, split)
        index = rng.choice(others)
    question = _phrased(rng, split, form, a=_name(clip, index))
    answer = "yes" if index == clip.mover else "no"
    return Turn(question=question, answer=answer, kind="moving", form=form, nouns=nouns_of(clip, index))


def change(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask whether a colour changes, which colour a thing turns into, or what appears."""
    if clip.appears and rng.random() < 0.6:
        thing = clip.frames[-1].things[-1]
        return Turn(
            question=_phrased(rng, split, "what appears"),
            answer=with_article(thing.name),
            kind="change",
            form="what appears",
        )
    if clip.changer >= 0 and rng.random() < 0.6:
        shape = clip.frames[0].things[clip.changer].shape
        if [thing.shape for thing in clip.frames[0].things].count(shape) > 1:
            return None
        return Turn(
            question=_phrased(rng, split, "new colour", a=shape),
            answer=clip.frames[-1].things[clip.changer].colour,
            kind="change",
            form="new colour",
        )
    if clip.changer < 0 and rng.random() < 0.9:
        return None
    answer = "yes" if clip.changer >= 0 else "no"
    question = _phrased(rng, split, "does anything change")
    return Turn(question=question, answer=answer, kind="change", form="does anything change")


def still_colour(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask for the colour of a thing that keeps it."""
    shapes = [thing.shape for thing in clip.frames[0].things]
    candidates = [index for index, shape in enumerate(shapes) if shapes.count(shape) == 1 and index != clip.changer]
    if not candidates or clip.appears:
        return None
    index = rng.choice(candidates)
    question = _phrased(rng, split, "still colour", a=shapes[index])
    answer = clip.frames[0].things[index].colour
    return Turn(question=question, answer=answer, kind="clip colour", form="still colour")


def clip_caption(rng: random.Random, clip: Clip, split: Split) -> Turn:
    """Ask for a description of what happens."""
    question = _phrased(rng, split, "what happens")
    return Turn(question=question, answer=describe_clip(clip), kind="clip caption", form="what happens")


def describe_clip(clip: Clip) -> str:
    """Return a sentence about every thing: ``the red circle moves left and the blue star stays``."""
    parts = []
    for index, thing in enumerate(clip.frames[-1].things):
        name = f"the {clip.frames[0].things[index].name if index < len(clip.frames[0].things) else thing.name}"
        if index == clip.mover:
            parts.append(f"{name} moves {clip.direction}")
        elif index == clip.changer:
            parts.append(f"{name} becomes {thing.colour}")
        elif clip.appears and index == len(clip.frames[-1].things) - 1:
            parts.append(f"{name} appears")
        else:
            parts.append(f"{name} stays")
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


CLIP_MAKERS: dict[str, Maker] = {
    "direction": direction,
    "moving": moving,
    "change": change,
    "clip colour": still_colour,
    "clip caption": clip_caption,
}
"""Every kind of question about a clip."""


def ask_about_clip(rng: random.Random, clip: Clip, kind: str, split: Split) -> Turn | None:
    """Return a question of a kind, or None when six attempts found none that the clip allows.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in CLIP_MAKERS:
        raise ValueError(f"Unknown kind of question {kind!r}. The kinds are {', '.join(CLIP_MAKERS)}.")
    for _ in range(6):
        turn = CLIP_MAKERS[kind](rng, clip, split)
        if turn is not None:
            return turn
    return None


def _moved(rng: random.Random, thing: Thing, direction: str, num_frames: int) -> list[Thing]:
    """Return the thing in each frame: from one place on its line to another, 20 units or more away."""
    margin = thing.radius + 1
    low, high = margin, CANVAS - margin
    length = rng.randint(20, high - low)
    start = rng.randint(low, high - length)
    ends = (start, start + length)
    across, down = DIRECTIONS[direction]
    first, last = ends if across + down > 0 else ends[::-1]
    places = [round(first + (last - first) * number / (num_frames - 1)) for number in range(num_frames)]
    return [replace(thing, x=place) if across else replace(thing, y=place) for place in places]


def _replaced(scene: Scene, index: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def nouns_of(clip: Clip, index: int) -> tuple[Noun, ...]:
    """Return the first name of a thing, with its way through the frames."""
    return (Noun(phrase=_name(clip, index), path=clip.path_of(index)),)


def _name(clip: Clip, index: int) -> str:
    return clip.frames[0].things[index].name


def _phrased(rng: random.Random, split: Split, form: str, **names: str) -> str:
    phrasings = PHRASINGS[form] if split == "test" else PHRASINGS[form][:-1]
    text = rng.choice(phrasings).format(**names)
    return text.lower().rstrip("?") if split == "train" and rng.random() < 0.1 else text
