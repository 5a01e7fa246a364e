"""What is new in a frame is told of the things of a clip, and of nothing else."""

import random

import pytest

from llava_mini.data.changes import CHANGES, IGNORED, changes_of
from llava_mini.data.records import Noun
from llava_mini.data.synthetic.clips import DIRECTIONS, random_clip
from llava_mini.data.synthetic.scenes import COLOURS, SHAPES

HERE, THERE = (0.2, 0.5), (0.6, 0.5)


def noun(colour, shape, *path):
    return Noun(phrase="thing", path=path, facts=(("colour", colour), ("shape", shape), ("size", 0)))


def told(*things):
    return [{name: value for name, value in change.items() if value} for change in changes_of(things)]


def test_things_come_go_and_move():
    still, late = noun(1, 1, HERE, HERE, HERE), noun(2, 3, None, HERE, HERE)
    assert told(still, late) == [{"comes colour": 3, "comes shape": 4}, {}]
    assert told(still, noun(0, 0, HERE, HERE, None)) == [{}, {"goes colour": 1, "goes shape": 1}]
    right, up = noun(4, 5, HERE, THERE), noun(6, 7, (0.5, 0.9), (0.5, 0.1))
    assert told(right) == [{"moves colour": 5, "moves shape": 6, "direction": 2}]
    assert told(up) == [{"moves colour": 7, "moves shape": 8, "direction": 3}]


def test_a_new_colour_is_a_thing_that_goes_and_one_that_comes():
    change = {"goes colour": 1, "goes shape": 3, "comes colour": 2, "comes shape": 3}
    assert told(noun(0, 2, HERE, None), noun(1, 2, None, HERE)) == [change]


def test_what_two_things_do_differently_is_not_to_be_learned():
    (change,) = changes_of([noun(0, 2, HERE, THERE), noun(1, 2, HERE, (0.2, 0.9))])
    assert (change["moves colour"], change["moves shape"], change["direction"]) == (IGNORED, 3, IGNORED)


def test_without_things_there_is_nothing_to_tell():
    assert changes_of([]) == []


@pytest.mark.parametrize("seed", range(30))
def test_the_changes_of_a_drawn_clip_are_its_events(seed):
    clip = random_clip(random.Random(seed))
    changes = changes_of(clip.nouns())
    assert len(changes) == clip.num_frames - 1
    assert all(set(change) == set(CHANGES) for change in changes)
    for event in clip.in_order:
        change, thing = changes[event.frame - 1], clip.first(event.thing)
        shape = SHAPES.index(thing.shape) + 1
        if event.verb != "disappear":
            assert change["comes colour"] == tuple(COLOURS).index(clip.last(event.thing).colour) + 1
            assert change["comes shape"] == shape
        if event.verb != "appear":
            assert change["goes colour"] == tuple(COLOURS).index(thing.colour) + 1
            assert change["goes shape"] == shape
    moves = clip.of_verb("move")
    if len(moves) == 1:
        assert {change["direction"] for change in changes} == {tuple(DIRECTIONS).index(moves[0].direction) + 1}
    if not moves:
        assert {change["direction"] for change in changes} == {0}
