"""Questions about what happens in a clip. The answers depend on more than one frame, but for ``clip colour``.

As in ``questions``, a kind of question is a function that returns a turn, or None where a clip has no such question.
"""

import random
from collections.abc import Callable

from llava_mini.data.records import Turn
from llava_mini.data.synthetic.clips import VERBS, Clip
from llava_mini.data.synthetic.phrasings import phrased
from llava_mini.data.synthetic.questions import CANNOT_TELL, maker_of, near_miss
from llava_mini.data.synthetic.splits import Split

Maker = Callable[[random.Random, Clip, Split], Turn | None]


def direction(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask which way a moving thing goes."""
    moves = clip.of_verb("move")
    if not moves:
        return None
    move = rng.choice(moves)
    return phrased(rng, split, "direction", a=clip.name(move.thing)).turn(move.direction, kind="direction")


def moving(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask whether anything moves, whether one thing does, what moves, or which way a thing that does not move goes."""
    moves = clip.of_verb("move")
    if not moves and rng.random() < 0.25:
        return None
    forms = ["does anything move", "still or moving", "still or moving"]
    if len(moves) < 2:
        forms.append("what moves")
    if clip.still:
        forms.append("direction")
    form = rng.choice(forms)
    if form == "does anything move":
        return phrased(rng, split, form).turn("yes" if moves else "no", kind="moving")
    if form == "what moves":
        answer = f"the {clip.name(moves[0].thing)}" if moves else "nothing"
        return phrased(rng, split, form).turn(answer, kind="moving")
    if form == "direction":
        name = clip.name(rng.choice(clip.still))
        return phrased(rng, split, form, a=name).turn("it does not move", kind="moving")
    is_mover = bool(moves) and (not clip.still or rng.random() < 0.7)
    candidates = tuple(move.thing for move in moves) if is_mover else clip.still
    if not candidates:
        return None
    name = clip.name(rng.choice(candidates))
    return phrased(rng, split, form, a=name).turn("moving" if is_mover else "still", kind="moving")


def order(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask which of two events comes first, or what happens first or last."""
    events = clip.in_order
    if len(events) < 2:
        return None
    if rng.random() < 0.2:
        form, event = rng.choice((("what happens first", events[0]), ("what happens last", events[-1])))
        return phrased(rng, split, form).turn(clip.happening(event), kind="order")
    first, second = rng.sample(events, 2)
    names = {"a": clip.name(first.thing), "b": clip.name(second.thing)}
    if first.verb == second.verb and rng.random() < 0.6:
        choices = tuple(f"the {name}" for name in names.values())
        question = phrased(rng, split, "which is first", event=VERBS[first.verb], **names)
        return question.turn(choices[first.frame > second.frame], kind="order", choices=choices)
    words = {"do": first.verb, "does": VERBS[first.verb], "does_too": VERBS[second.verb]}
    answer = "before" if first.frame < second.frame else "after"
    return phrased(rng, split, "before or after", **names, **words).turn(answer, kind="order")


def change(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask whether a colour changes, which colour a thing turns into, what appears, or what disappears."""
    changes, comes, goes = (clip.of_verb(verb) for verb in ("change color", "appear", "disappear"))
    happens = ["does anything change", "new colour", "new colour"] if changes else []
    happens += ["what appears"] * (len(comes) == 1) + ["what disappears"] * (len(goes) == 1)
    missing = ["does anything change"] if not changes else []
    missing += ["what appears"] * (not comes) + ["what disappears"] * (not goes)
    if happens and rng.random() < 0.85:
        form = rng.choice(happens)
    elif missing and rng.random() < 0.3:
        form = rng.choice(missing)
    else:
        return None
    if form == "does anything change":
        return phrased(rng, split, form).turn("yes" if changes else "no", kind="change")
    if form == "new colour":
        event = rng.choice(changes)
        shape = clip.first(event.thing).shape
        alone = [clip.first(index).shape for index in range(len(clip.tracks))].count(shape) == 1
        name = shape if alone and rng.random() < 0.5 else clip.name(event.thing)
        return phrased(rng, split, form, a=name).turn(clip.last(event.thing).colour, kind="change")
    events = comes if form == "what appears" else goes
    answer = f"the {clip.name(events[0].thing)}" if events else "nothing"
    return phrased(rng, split, form).turn(answer, kind="change")


def event_count(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask how many things move, appear, disappear or change their colour. Larger numbers are preferred."""
    numbers = {verb: len(clip.of_verb(verb)) for verb in VERBS}
    happens = [verb for verb, number in numbers.items() for _ in range(number**2)]
    missing = [verb for verb, number in numbers.items() if number == 0]
    if happens and rng.random() < 0.8:
        verb = rng.choice(happens)
    elif missing and rng.random() < 0.5:
        verb = rng.choice(missing)
    else:
        return None
    question = phrased(rng, split, "how many do so", form=f"how many {verb}", event=verb)
    return question.turn(str(numbers[verb]), kind="event count")


def clip_place(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask where a thing is at the start or at the end. Things that move are asked about first."""
    form, frame = rng.choice((("where at the start", 0), ("where at the end", -1)))
    moving = [move.thing for move in clip.of_verb("move")]
    shown = [
        index
        for index, track in enumerate(clip.tracks)
        if (thing := track[frame]) is not None and thing.place_is_clear and thing.name == clip.name(index)
    ]
    if not shown:
        return None
    index = rng.choice([index for index in moving if index in shown] or shown)
    thing = clip.tracks[index][frame]
    assert thing is not None
    return phrased(rng, split, form, a=thing.name).turn(thing.place, kind="clip place")


def clip_colour(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask for the colour of a thing that keeps it."""
    things = [clip.first(index) for index in range(len(clip.tracks))]
    changing = {event.thing for event in clip.of_verb("change color")}
    shapes = [thing.shape for thing in things]
    candidates = [index for index in range(len(things)) if shapes.count(shapes[index]) == 1 and index not in changing]
    if not candidates:
        return None
    thing = things[rng.choice(candidates)]
    return phrased(rng, split, "colour of a shape", a=thing.shape).turn(thing.colour, kind="clip colour")


def clip_absence(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask about a thing that is never there, or for something that no film without sound tells."""
    things = [thing for track in clip.tracks for thing in track if thing is not None]
    if rng.random() < 0.5:
        name = rng.choice(things).shape
        return phrased(rng, split, "cannot tell", a=name).turn(CANNOT_TELL, kind="clip absence")
    name = near_miss(rng, things)
    form = rng.choice(("direction", "where at the end"))
    answer = f"there is no {name}"
    return phrased(rng, split, form, a=name).turn(answer, kind="clip absence", choices=(answer,))


def clip_caption(rng: random.Random, clip: Clip, split: Split) -> Turn | None:
    """Ask for a description of what happens."""
    events = (*clip.of_verb("move"), *clip.in_order)
    answer = " and ".join(clip.happening(event) for event in events) or "nothing happens"
    return phrased(rng, split, "what happens").turn(answer, kind="clip caption")


CLIP_MAKERS: dict[str, Maker] = {
    "direction": direction,
    "moving": moving,
    "order": order,
    "change": change,
    "event count": event_count,
    "clip place": clip_place,
    "clip colour": clip_colour,
    "clip absence": clip_absence,
    "clip caption": clip_caption,
}
"""Every kind of question about a clip."""


def ask_about_clip(rng: random.Random, clip: Clip, kind: str, split: Split) -> Turn | None:
    """Return a question of a kind, or None when the clip has none, or has enough of its like in other clips.

    Raises:
        ValueError: If there is no such kind.
    """
    return maker_of(kind, CLIP_MAKERS)(rng, clip, split)
