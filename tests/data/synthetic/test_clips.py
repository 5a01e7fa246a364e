import itertools
from collections import Counter

import pytest

from llava_mini.data.synthetic.clips import DIRECTIONS, VERBS, random_clip
from llava_mini.data.synthetic.splits import generator_of

CLIPS = [random_clip(generator_of("train", index)) for index in range(400)]


def test_only_movers_move_and_they_go_straight():
    moves = [(clip, event) for clip in CLIPS for event in clip.of_verb("move")]
    assert len(moves) > 150
    for clip in CLIPS:
        movers = {event.thing for event in clip.of_verb("move")}
        for index, track in enumerate(clip.tracks):
            places = {(thing.x, thing.y) for thing in track if thing is not None}
            assert (len(places) > 1) == (index in movers)
    for clip, event in moves:
        across, down = DIRECTIONS[event.direction]
        for before, after in itertools.pairwise(clip.tracks[event.thing]):
            assert (after.x - before.x) * across + (after.y - before.y) * down > 0
            assert (after.x - before.x) * down == (after.y - before.y) * across == 0


def test_things_appear_disappear_and_change_at_their_frame():
    for clip in CLIPS:
        for event in clip.in_order:
            before, after = clip.tracks[event.thing][: event.frame], clip.tracks[event.thing][event.frame :]
            assert before
            assert after
            assert all(thing is None for thing in before) == (event.verb == "appear")
            assert all(thing is None for thing in after) == (event.verb == "disappear")
            if event.verb == "change color":
                assert {thing.colour for thing in before}.isdisjoint({thing.colour for thing in after})
        frames = [event.frame for event in clip.in_order]
        assert len(set(frames)) == len(frames)


def test_every_event_occurs_up_to_three_times_and_some_clips_are_still():
    verbs = Counter(event.verb for clip in CLIPS for event in clip.events)
    assert set(verbs) == set(VERBS)
    assert {len(clip.events) for clip in CLIPS} == {0, 1, 2, 3}
    assert {clip.num_frames for clip in CLIPS} == {3, 4, 5, 6, 8}


def test_a_name_means_one_thing_at_all_times():
    for clip in CLIPS:
        owners = {}
        for index, track in enumerate(clip.tracks):
            for thing in track:
                if thing is not None:
                    assert owners.setdefault(thing.name, index) == index
        nouns = {noun.phrase: noun for noun in clip.nouns()}
        assert set(nouns) == set(owners)
        for name, noun in nouns.items():
            seen = [place is not None for place in noun.path]
            assert seen == [any(thing.name == name for thing in frame.things) for frame in clip.frames]


def test_a_description_tells_things_and_events_in_order():
    clip = next(clip for clip in CLIPS if {event.verb for event in clip.in_order} == {"appear", "disappear"})
    text = clip.describe()
    assert text.startswith("first ")
    assert text.split("; then ")[1:] == [
        f"the {clip.name(event.thing)} {VERBS[event.verb]}"
        for event in sorted(clip.events, key=lambda event: event.frame)
    ]


def test_too_few_frames_or_things_are_refused():
    with pytest.raises(ValueError, match="at least 2 frames"):
        random_clip(generator_of("train", 0), num_frames=1)
    with pytest.raises(ValueError, match="3 things"):
        random_clip(generator_of("train", 0), max_things=2)
