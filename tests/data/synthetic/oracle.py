"""Answers found by looking at what frames show, without the code that makes up the questions.

A question is read word by word: its names of things are the runs of words for sizes, colours and shapes. What happens
in a clip is found by following each thing from frame to frame.
"""

import re
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = ("small", "large")
PLURALS = {f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES}
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
VERBS = {"moves": "move", "appears": "appear", "disappears": "disappear", "changes color": "change color"}

SECOND_FIRST = re.compile(
    r"on which side of|is it before or after the [a-z ]+ that the |"
    r"(?:left or right of|above or below|before or after) the [a-z ]+: "
)
"""Wordings that name what is asked about after what it is compared with."""


def phrases_of(question):
    """Names in a question, each a tuple of words: ("red", "circle"). What is asked about comes first."""
    words = [PLURALS.get(word, word) for word in re.findall(r"[a-z]+|[^a-z ]", question.lower())]
    found, run = [], []
    for word in [*words, ""]:
        rank = next((rank for rank, known in enumerate((SIZES, COLOURS, SHAPES)) if word in known), None)
        if run and (rank is None or rank <= run[-1][0]):  # a size comes before a colour, a colour before a shape
            found.append(tuple(name for _, name in run))
            run = []
        if rank is not None:
            run.append((rank, word))
    found = [phrase for phrase in found if set(phrase) - set(SIZES)]
    return found[::-1] if SECOND_FIRST.search(question.lower()) else found


def size_of(thing):
    return "small" if thing.radius < 10 else "large"


def has(thing, phrase):
    return all(word in (size_of(thing), thing.colour, thing.shape) for word in phrase)


def place_of(thing):
    row, column = (0 if value < 32 else 1 if value < 64 else 2 for value in (thing.y, thing.x))
    return f"{ROWS[row]} {COLUMNS[column]}".strip() or "center"


def name_of(thing):
    return f"{thing.colour} {thing.shape}"


def the_one(things, phrase):
    """The only thing of that name; None if there is none."""
    found = [thing for thing in things if has(thing, phrase)]
    assert len(found) <= 1, f"{phrase} names {len(found)} things"
    return found[0] if found else None


def listed(parts):
    parts = parts or ["nothing"]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def answer_about_picture(scene, form, question):
    """The right answer to a question about an image."""
    if form == "cannot tell":
        return "I can't tell"
    if form == "describe":
        return description(scene)
    if form == "is there writing":
        return "yes" if scene.signs else "no"
    if form in ("what word", "what number", "what text"):
        assert scene.chart is None
        if not scene.signs:
            return "nothing is written"
        (sign,) = scene.signs
        assert form == "what text" or sign.text.isdigit() == (form == "what number")
        return sign.text.lower()
    if "bar" in form:
        return answer_about_chart(scene.chart.bars, form, question)
    if form == "how many things":
        return str(len(scene.things))
    phrases = phrases_of(question)
    if form.startswith("how many of a "):
        phrase = phrases[0] if phrases else re.findall("small|large", question.lower())
        return str(sum(has(thing, phrase) for thing in scene.things))
    if form == "is there a thing":
        return "yes" if any(has(thing, phrases[0]) for thing in scene.things) else "no"
    return answer_about_things(scene.things, form, question, phrases)


def answer_about_things(things, form, question, phrases):
    """Questions that name one or two things, each of them the only one of its name."""
    found = [the_one(things, phrase) for phrase in phrases]
    if None in found:
        assert len(found) == 1
        return f"there is no {' '.join(phrases[0])}"
    if form == "colour of a shape":
        return found[0].colour
    if form == "shape of a colour":
        return found[0].shape
    if form == "small or large":
        return size_of(found[0])
    if form == "where":
        return place_of(found[0])
    first, second = found
    if form == "same size":
        return "yes" if size_of(first) == size_of(second) else "no"
    if form in ("which is larger", "which is smaller"):
        assert size_of(first) != size_of(second)
        is_first = (first.radius > second.radius) == (form == "which is larger")
        return "the " + " ".join(phrases[0] if is_first else phrases[1])
    across, down = first.x - second.x, first.y - second.y
    sides = {"left": across <= -8, "right": across >= 8, "above": down <= -8, "below": down >= 8}
    if form in ("left or right", "above or below"):
        (answer,) = [side for side in form.split(" or ") if sides[side]]
        return answer
    assert form == "is it there from there", form
    (side,) = re.findall("left|right|above|below", question.lower())
    assert abs(across if side in ("left", "right") else down) >= 8
    return "yes" if sides[side] else "no"


def answer_about_chart(bars, form, question):
    by_colour = {bar.colour: bar.value for bar in bars}
    assert len(by_colour) == len(bars)
    if form == "how many bars":
        return str(len(bars))
    if form in ("tallest bar", "shortest bar"):
        best = (max if form == "tallest bar" else min)(by_colour.values())
        (answer,) = [colour for colour, value in by_colour.items() if value == best]
        return answer
    colours = [phrase[0] for phrase in phrases_of(question)]
    if form == "value of a bar":
        return str(by_colour[colours[0]])
    assert form == "is a bar taller", form
    first, second = (by_colour[colour] for colour in colours)
    assert first != second
    return "yes" if first > second else "no"


def description(scene):
    if scene.chart is not None:
        return "a bar chart with " + listed([f"{bar.colour} {bar.value}" for bar in scene.chart.bars])
    things = sorted(scene.things, key=lambda thing: (thing.y >= 32, thing.y >= 64, thing.x))
    names = [f"{'an' if name_of(thing)[0] in 'aeiou' else 'a'} {name_of(thing)}" for thing in things]
    signs = [f"the {'number' if sign.text.isdigit() else 'word'} {sign.text.lower()}" for sign in scene.signs]
    return listed([*names, *signs])


@dataclass
class Track:
    """One thing from frame to frame."""

    looks: list
    """How it looks in each frame; None where it is not there."""

    @property
    def seen(self):
        return [thing for thing in self.looks if thing is not None]

    @property
    def name(self):
        return name_of(self.seen[0])

    @property
    def verb(self):
        """What it does; empty if it does nothing."""
        changes = []
        if len({(thing.x, thing.y) for thing in self.seen}) > 1:
            changes.append("move")
        if self.looks[0] is None:
            changes.append("appear")
        if self.looks[-1] is None:
            changes.append("disappear")
        if len({thing.colour for thing in self.seen}) > 1:
            changes.append("change color")
        assert len(changes) <= 1, f"{self.name} does {changes}"
        return changes[0] if changes else ""

    @property
    def moment(self):
        """The first frame that differs from the one before it."""
        return next(index for index in range(1, len(self.looks)) if self.looks[index] != self.looks[index - 1])

    @property
    def direction(self):
        across, down = self.seen[-1].x - self.seen[0].x, self.seen[-1].y - self.seen[0].y
        assert (across == 0) != (down == 0)
        return ("left" if across < 0 else "right") if across else ("up" if down < 0 else "down")

    @property
    def happening(self):
        if self.verb == "move":
            return f"the {self.name} moves {self.direction}"
        if self.verb == "change color":
            return f"the {self.name} becomes {self.seen[-1].colour}"
        return f"the {self.name} {self.verb}s"


def tracks_of(frames):
    """Follow each thing: by its name, or by its shape and place where its colour changes."""
    tracks = []
    for number, frame in enumerate(frames):
        left = [track for track in tracks if track.looks[-1] is not None]
        for thing in frame.things:
            same = [track for track in left if name_of(track.looks[-1]) == name_of(thing)] or [
                track
                for track in left
                if (track.looks[-1].shape, track.looks[-1].x, track.looks[-1].y) == (thing.shape, thing.x, thing.y)
            ]
            if same:
                left.remove(same[0])
                same[0].looks.append(thing)
            else:
                tracks.append(Track([None] * number + [thing]))
        for track in tracks:
            track.looks += [None] * (number + 1 - len(track.looks))
    return tracks


def answer_about_clip(frames, form, question):
    """The right answer to a question about a clip."""
    if form == "cannot tell":
        return "I can't tell"
    tracks = tracks_of(frames)
    doing = {verb: [track for track in tracks if track.verb == verb] for verb in VERBS.values()}
    moments = sorted((track for track in tracks if track.verb not in ("", "move")), key=lambda track: track.moment)
    assert len({track.moment for track in moments}) == len(moments)
    if form in ("does anything move", "does anything change"):
        return "yes" if doing["move" if form == "does anything move" else "change color"] else "no"
    if form in ("what moves", "what appears", "what disappears"):
        found = doing[form.removeprefix("what ").removesuffix("s")]
        assert len(found) <= 1
        return f"the {found[0].name}" if found else "nothing"
    if form.startswith("how many "):
        return str(len(doing[form.removeprefix("how many ")]))
    if form == "what happens":
        return " and ".join(track.happening for track in (*doing["move"], *moments)) or "nothing happens"
    if form in ("what happens first", "what happens last"):
        return moments[0 if form == "what happens first" else -1].happening
    return answer_about_tracks(tracks, form, question)


def answer_about_tracks(tracks, form, question):
    """Questions that name one or two things of a clip."""
    phrases = phrases_of(question)
    named = [[track for track in tracks if any(has(thing, phrase) for thing in track.seen)] for phrase in phrases]
    assert all(len(found) <= 1 for found in named), f"{phrases} can mean several things"
    if [] in named:
        assert len(named) == 1
        return f"there is no {' '.join(phrases[0])}"
    first = named[0][0]
    if form == "direction":
        return first.direction if first.verb == "move" else "it does not move"
    if form == "still or moving":
        assert first.verb in ("", "move")
        return "moving" if first.verb == "move" else "still"
    if form == "new colour":
        assert first.verb == "change color"
        return first.seen[-1].colour
    if form == "colour of a shape":
        (colour,) = {thing.colour for thing in first.seen}
        return colour
    if form in ("where at the start", "where at the end"):
        return place_of(first.looks[0 if form == "where at the start" else -1])
    second = named[1][0]
    if form == "before or after":
        for track in (first, second):
            assert any(verb in question.lower() for verb, stem in VERBS.items() if stem == track.verb) or (
                track.verb in question.lower()
            )
        return "before" if first.moment < second.moment else "after"
    assert form == "which is first", form
    assert first.verb == second.verb
    return f"the {(first if first.moment < second.moment else second).name}"
