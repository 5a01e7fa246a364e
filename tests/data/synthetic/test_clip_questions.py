from collections import Counter

import pytest

from llava_mini.data.synthetic.clip_questions import CLIP_MAKERS, ask_about_clip
from llava_mini.data.synthetic.clips import random_clip
from llava_mini.data.synthetic.splits import generator_of

CLIPS = [random_clip(generator_of("train", index)) for index in range(600)]


def asked(kind):
    turns = [
        (clip, ask_about_clip(generator_of("train", index, kind), clip, kind, "train"))
        for index, clip in enumerate(CLIPS)
    ]
    found = [(clip, turn) for clip, turn in turns if turn is not None]
    assert len(found) > 60
    return found


def named_in(clip, turn):
    """Tracks whose first name stands in a question, in the order of the question."""
    text = turn.question.lower()
    return sorted(
        (index for index in range(len(clip.tracks)) if clip.name(index) in text), key=lambda i: text.index(clip.name(i))
    )


def event_of(clip, thing):
    return next((event for event in clip.events if event.thing == thing), None)


def test_directions_are_those_of_the_named_thing():
    for clip, turn in asked("direction"):
        assert turn.answer == event_of(clip, named_in(clip, turn)[0]).direction


def test_what_moves_is_told_right():
    forms = set()
    for clip, turn in asked("moving"):
        movers = [event.thing for event in clip.of_verb("move")]
        forms.add(turn.form)
        if turn.form == "does anything move":
            assert turn.answer == ("yes" if movers else "no")
        elif turn.form == "what moves":
            assert turn.answer == (f"the {clip.name(movers[0])}" if movers else "nothing")
        elif turn.form == "still or moving":
            assert turn.answer == ("moving" if named_in(clip, turn)[0] in movers else "still")
        else:
            assert named_in(clip, turn)[0] not in movers
            assert turn.answer == "it does not move"
    assert len(forms) == 4


def test_order_follows_the_frames():
    forms = Counter()
    for clip, turn in asked("order"):
        forms[turn.form] += 1
        events = [event_of(clip, index) for index in named_in(clip, turn)]
        if turn.form == "before or after":
            reference = turn.question.lower().split("before or after the ")[1]
            first, second = sorted(events, key=lambda event: reference.startswith(clip.name(event.thing)))
            assert turn.answer == ("before" if first.frame < second.frame else "after")
        elif turn.form == "which is first":
            assert turn.answer == f"the {clip.name(min(events, key=lambda event: event.frame).thing)}"
        else:
            pick = min if turn.form == "what happens first" else max
            assert turn.answer == clip.happening(pick(clip.in_order, key=lambda event: event.frame))
    assert len(forms) == 4


def test_changes_and_their_number_are_told_right():
    for clip, turn in asked("change"):
        changes = clip.of_verb("change color")
        if turn.form == "does anything change":
            assert turn.answer == ("yes" if changes else "no")
        elif turn.form == "new colour":
            assert turn.answer in {clip.last(event.thing).colour for event in changes}
        else:
            events = clip.of_verb("appear" if turn.form == "what appears" else "disappear")
            assert turn.answer == (f"the {clip.name(events[0].thing)}" if events else "nothing")
            assert len(events) < 2
    answers = Counter()
    for clip, turn in asked("event count"):
        verb = turn.form.removeprefix("how many ")
        assert verb in turn.question.lower()
        assert turn.answer == str(len(clip.of_verb(verb)))
        answers[turn.answer] += 1
    assert set(answers) == set("0123")
    assert max(answers.values()) < 0.6 * answers.total()


def test_places_and_colours_are_those_of_the_frame():
    for clip, turn in asked("clip place"):
        frame = 0 if turn.form == "where at the start" else -1
        thing = clip.tracks[named_in(clip, turn)[0]][frame]
        assert thing is not None
        assert turn.answer == thing.place
    for clip, turn in asked("clip colour"):
        shape = next(thing.shape for track in clip.tracks for thing in track if thing and thing.shape in turn.question)
        assert {thing.colour for track in clip.tracks for thing in track if thing and thing.shape == shape} == {
            turn.answer
        }


def test_captions_tell_every_event():
    for clip, turn in asked("clip caption"):
        assert turn.answer.count(" and ") == max(len(clip.events) - 1, 0)
        assert (turn.answer == "nothing happens") == (not clip.events)


def test_every_kind_says_its_name_and_an_unknown_kind_is_refused():
    assert all({turn.kind for _, turn in asked(kind)} == {kind} for kind in CLIP_MAKERS)
    with pytest.raises(ValueError, match="Unknown kind of question 'sound'"):
        ask_about_clip(generator_of("train", 0), CLIPS[0], "sound", "train")
