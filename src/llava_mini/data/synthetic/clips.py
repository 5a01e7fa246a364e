"""Short clips of the drawn world: what is seen in each frame, and what happens. Questions are in ``clip_questions``.

A clip is a few scenes that share their background. One or two things move from the first frame to the last; or up to
three things appear, disappear or change their colour, each at a frame of its own; or nothing happens.
"""

import random
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

from llava_mini.data.records import Noun
from llava_mini.data.synthetic.scenes import CANVAS, COLOURS, Background, Scene, SceneSettings, Thing, random_scene

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Step along x and y; y grows downwards."""

VERBS = {"move": "moves", "appear": "appears", "disappear": "disappears", "change color": "changes color"}
"""What a thing can do."""

FRAME_COUNTS = {3: 2, 4: 4, 5: 2, 6: 1, 8: 1}
"""How often a clip has so many frames, relative to the others."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a thing does."""

    verb: str
    """A key of ``VERBS``."""
    thing: int
    """Which track."""
    frame: int = 0
    """The first frame in which it has happened. 0 for a thing that moves all the time."""
    direction: str = ""
    """Where a moving thing goes, a key of ``DIRECTIONS``."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A few frames and what happens in them."""

    background: Background
    tracks: tuple[tuple[Thing | None, ...], ...]
    """For each thing how it looks in each frame; None where it is not there. Names differ at all times."""
    events: tuple[Event, ...]
    """At most one for a thing."""

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.tracks[0])

    @cached_property
    def frames(self) -> tuple[Scene, ...]:
        """What each frame shows."""
        return tuple(
            Scene(things=tuple(thing for thing in moment if thing is not None), signs=(), background=self.background)
            for moment in zip(*self.tracks, strict=True)
        )

    def first(self, index: int) -> Thing:
        """Return how a thing looks when it is first seen."""
        return next(thing for thing in self.tracks[index] if thing is not None)

    def last(self, index: int) -> Thing:
        """Return how a thing looks when it is last seen."""
        return next(thing for thing in reversed(self.tracks[index]) if thing is not None)

    def name(self, index: int) -> str:
        """Return what a thing is called: by its first colour."""
        return self.first(index).name

    def of_verb(self, verb: str) -> tuple[Event, ...]:
        """Return the events of one kind."""
        return tuple(event for event in self.events if event.verb == verb)

    @property
    def in_order(self) -> tuple[Event, ...]:
        """The events that have a moment, from the first to the last. Their frames differ."""
        return tuple(sorted((event for event in self.events if event.frame > 0), key=lambda event: event.frame))

    @property
    def still(self) -> tuple[int, ...]:
        """The things to which nothing happens."""
        busy = {event.thing for event in self.events}
        return tuple(index for index in range(len(self.tracks)) if index not in busy)

    def nouns(self) -> tuple[Noun, ...]:
        """Return every name that a thing has in some frame, with its place in the frames where it has it."""
        named = {thing.name: thing for track in self.tracks for thing in track if thing is not None}
        found = []
        for name in sorted(named):
            moments = [[thing for thing in frame.things if thing.name == name] for frame in self.frames]
            path = tuple((things[0].x / CANVAS, things[0].y / CANVAS) if things else None for things in moments)
            found.append(Noun(phrase=name, path=path, facts=named[name].facts))
        return tuple(found)

    def describe(self) -> str:
        """Return all there is to know, in words: things at the start, then what happens, in order."""
        start = [
            f"{thing.name} at the {thing.place}" for track in self.tracks for thing in track[:1] if thing is not None
        ]
        begin = "first " + (", ".join(start) or "nothing")
        happenings = (self.happening(event) for event in (*self.of_verb("move"), *self.in_order))
        return "; ".join([begin, *(f"then {text}" for text in happenings)])

    def happening(self, event: Event) -> str:
        """Return an event in words: ``the red circle moves left``, ``the blue star becomes green``."""
        name = f"the {self.name(event.thing)}"
        if event.verb == "move":
            return f"{name} moves {event.direction}"
        if event.verb == "change color":
            return f"{name} becomes {self.last(event.thing).colour}"
        return f"{name} {VERBS[event.verb]}"


def random_clip(rng: random.Random, *, num_frames: int = 0, max_things: int = 4) -> Clip:
    """Draw a clip.

    Args:
        rng: Where the random numbers come from.
        num_frames: Frames of the clip, at least 2; 0 draws a number by ``FRAME_COUNTS``.
        max_things: Most things that take part, at least 3.

    Raises:
        ValueError: If there are too few frames or things.
    """
    if num_frames == 1 or num_frames < 0 or max_things < 3:
        raise ValueError(
            f"A clip needs at least 2 frames and 3 things, got num_frames={num_frames}, max_things={max_things}."
        )
    num_frames = num_frames or rng.choices(tuple(FRAME_COUNTS), tuple(FRAME_COUNTS.values()))[0]
    plot = rng.random()
    movers = 0 if plot > 0.42 else 1 + (rng.random() < 0.4)
    moments = 0 if movers or plot > 0.9 else min(rng.choices((1, 2, 3), (4, 4, 3))[0], num_frames - 1)
    busy = movers + moments
    scene = _cast(rng, rng.randint(max(busy, 1), max_things))
    things = list(range(len(scene.things)))
    rng.shuffle(things)
    if movers:
        events = [Event(verb="move", thing=thing, direction=rng.choice(tuple(DIRECTIONS))) for thing in things[:movers]]
    else:
        frames = rng.sample(range(1, num_frames), moments)
        verbs = [rng.choice(("appear", "disappear", "change color")) for _ in frames]
        if rng.random() < 0.4:
            verbs = verbs[:1] * moments
        events = [
            Event(verb=verb, thing=thing, frame=frame)
            for verb, thing, frame in zip(verbs, things, frames, strict=False)
        ]
    tracks: list[tuple[Thing | None, ...]] = [(thing,) * num_frames for thing in scene.things]
    for event in events:
        tracks[event.thing] = _acted(rng, scene, event, num_frames)
    clip = Clip(background=scene.background, tracks=tuple(tracks), events=tuple(events))
    num_names = len(tracks) + len(clip.of_verb("change color"))
    if len(clip.nouns()) < num_names or any(_covered(clip.frames[frame]) for frame in (0, -1)):
        return random_clip(rng, num_frames=num_frames, max_things=max_things)
    return clip


def _covered(frame: Scene) -> bool:
    """Return whether two things of a frame are so near that one may hide the other."""
    return any(
        (first.x - second.x) ** 2 + (first.y - second.y) ** 2 < (0.75 * (first.radius + second.radius)) ** 2
        for first, second in combinations(frame.things, 2)
    )


def _cast(rng: random.Random, count: int) -> Scene:
    """Return a scene with so many things, no two of the same name."""
    settings = SceneSettings(min_things=count, max_things=count, empty_share=0.0, sign_share=0.0, overlap_share=0.0)
    while True:
        scene = random_scene(rng, settings)
        if len(scene.unique_things) == count:
            return scene


def _acted(rng: random.Random, scene: Scene, event: Event, num_frames: int) -> tuple[Thing | None, ...]:
    """Return the track of a thing to which an event happens."""
    thing = scene.things[event.thing]
    if event.verb == "move":
        return _moved(rng, thing, event.direction, num_frames)
    before: Thing | None = thing
    after: Thing | None = thing
    if event.verb == "appear":
        before = None
    elif event.verb == "disappear":
        after = None
    else:
        after = replace(thing, colour=rng.choice([name for name in COLOURS if name != thing.colour]))
    return (before,) * event.frame + (after,) * (num_frames - event.frame)


def _moved(rng: random.Random, thing: Thing, direction: str, num_frames: int) -> tuple[Thing, ...]:
    """Return the thing in each frame: from one place on its line to another, 20 units or more away."""
    margin = thing.radius + 1
    low, high = margin, CANVAS - margin
    length = rng.randint(20, high - low)
    start = rng.randint(low, high - length)
    ends = (start, start + length)
    across, down = DIRECTIONS[direction]
    first, last = ends if across + down > 0 else ends[::-1]
    places = [round(first + (last - first) * number / (num_frames - 1)) for number in range(num_frames)]
    return tuple(replace(thing, x=place) if across else replace(thing, y=place) for place in places)
