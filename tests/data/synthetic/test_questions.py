import itertools
from collections import Counter

import pytest

from llava_mini.data.synthetic.phrasings import NUM_HELD_OUT, PHRASINGS
from llava_mini.data.synthetic.questions import CANNOT_TELL, MAKERS, NOTHING_WRITTEN, ask, describe, name_all, plural
from llava_mini.data.synthetic.scenes import (
    COLOURS,
    SHAPES,
    Background,
    Scene,
    SceneSettings,
    Sign,
    Thing,
    random_scene,
)
from llava_mini.data.synthetic.splits import generator_of

GREY = Background(kind="plain", colour=(140, 140, 140), seed=0)
STAR = Thing(shape="star", colour="red", size="small", radius=7, x=10, y=10)
RING = Thing(shape="ring", colour="blue", size="large", radius=14, x=80, y=50)
SIGN = Sign(text="42", x=40, y=80, height=16, ink=(0, 0, 0), plate=None, bold=False)
SCENE = Scene(things=(RING, STAR), signs=(SIGN,), background=GREY)


def asked(kind, split="train", count=400):
    """Pairs of a scene and a question of one kind about it."""
    pairs = []
    for index in range(count):
        rng = generator_of(split, index)
        scene = random_scene(rng, SceneSettings(chart_share=0.25))
        turn = ask(rng, scene, kind, split)
        if turn is not None:
            pairs.append((scene, turn))
    assert len(pairs) > count / 6
    return pairs


def thing_called(scene, name):
    found = [thing for thing in scene.things if name in (thing.name, thing.shape, thing.colour)]
    assert len(found) == 1
    return found[0]


def words_of(turn):
    return turn.question.lower().translate(str.maketrans("?,:.", "    ")).split()


def test_existence_is_right_and_as_often_yes_as_no():
    pairs = [pair for pair in asked("existence") if pair[1].form == "is there a thing"]
    for scene, turn in pairs:
        words = words_of(turn)
        pairs_of_words = [f"{a} {b}" for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES]
        name = (pairs_of_words or [word for word in words if word in SHAPES])[0]
        assert turn.answer == ("yes" if any(name in (thing.name, thing.shape) for thing in scene.things) else "no")
    assert 0.4 < sum(turn.answer == "yes" for _, turn in pairs) / len(pairs) < 0.6


def test_colour_and_shape_are_asked_of_the_only_such_thing():
    for scene, turn in asked("colour"):
        assert turn.answer == thing_called(scene, next(word for word in words_of(turn) if word in SHAPES)).colour
    for scene, turn in asked("shape"):
        assert turn.answer == thing_called(scene, next(word for word in words_of(turn) if word in COLOURS)).shape


def test_counts_are_right_and_larger_ones_are_common():
    assert {turn.answer for scene, turn in asked("count")} == set("012345678")
    assert all(turn.answer == str(len(scene.things)) for scene, turn in asked("count"))
    answers = Counter()
    for scene, turn in asked("attribute count"):
        words = {word.removesuffix("es") if word == "crosses" else word.removesuffix("s") for word in words_of(turn)}
        asked_for = words & {*SHAPES, *COLOURS, "small", "large"}
        assert asked_for
        expected = sum(asked_for <= {thing.shape, thing.colour, thing.size} for thing in scene.things)
        assert turn.answer == str(expected)
        answers[turn.answer] += 1
    assert answers["2"] + answers["3"] + answers["4"] > 0.3 * answers.total()


def test_locations_and_sizes_are_those_of_the_named_thing():
    for kind, field in (("location", "place"), ("size", "size")):
        pairs = asked(kind)
        for scene, turn in pairs:
            assert turn.answer == getattr(thing_called(scene, turn.nouns[0].phrase), field)
            assert turn.nouns[0].phrase in turn.question.lower()
        alike = [turn for scene, turn in pairs if turn.case]
        assert kind == "size" or 0.2 * len(pairs) < len(alike) < 0.8 * len(pairs)


def test_relations_are_right():
    for scene, turn in asked("relation"):
        first, second = (thing_called(scene, noun.phrase) for noun in turn.nouns)
        words = words_of(turn)
        across = "left" in words or "right" in words
        gap = first.x - second.x if across else first.y - second.y
        side = (("left", "right") if across else ("above", "below"))[gap > 0]
        if turn.form == "is it there from there":
            assert turn.answer == ("yes" if side in words else "no")
        else:
            assert turn.answer == side


def test_comparisons_name_the_right_thing():
    for scene, turn in asked("compare"):
        things = [thing_called(scene, noun.phrase) for noun in turn.nouns]
        if turn.form == "same size":
            assert turn.answer == ("yes" if things[0].size == things[1].size else "no")
        else:
            pick = max if turn.form == "which is larger" else min
            best = pick(range(2), key=lambda index: things[index].radius)
            assert turn.answer == turn.choices[best] == f"the {turn.nouns[best].phrase}"


def test_text_is_what_the_sign_says():
    pairs = asked("text")
    assert all(turn.answer == scene.signs[0].text.lower() for scene, turn in pairs if scene.signs)
    unwritten = [turn.answer for scene, turn in pairs if not scene.signs]
    assert set(unwritten) == {NOTHING_WRITTEN}
    assert 0.05 < len(unwritten) / len(pairs) < 0.3


def test_charts_are_read_right():
    forms = set()
    for scene, turn in asked("chart", count=1000):
        bars = {bar.colour: bar.value for bar in scene.chart.bars}
        named = [bars[word] for word in words_of(turn) if word in bars]
        expected = {
            "tallest bar": lambda bars: max(bars, key=bars.__getitem__),
            "shortest bar": lambda bars: min(bars, key=bars.__getitem__),
            "how many bars": lambda bars: str(len(bars)),
            "value of a bar": lambda _, named=named: str(named[0]),
            "is a bar taller": lambda _, named=named: "yes" if named[0] > named[1] else "no",
        }[turn.form](bars)
        assert turn.answer == expected
        forms.add(turn.form)
    assert len(forms) == 5


def test_absent_things_are_absent_and_what_no_picture_shows_is_not_told():
    for scene, turn in asked("absence"):
        name = turn.answer.removeprefix("there is no ")
        assert name in turn.question.lower()
        assert not any(name in (thing.name, thing.shape) for thing in scene.things)
    assert {turn.answer for _, turn in asked("cannot tell")} == {CANNOT_TELL}


def test_a_description_names_everything_and_a_caption_is_shorter():
    assert describe(SCENE) == "a small red star at the top left, a large blue ring at the right and the number 42"
    assert name_all(SCENE) == "a red star, a blue ring and the number 42"
    assert [plural(name) for name in ("red cross", "star")] == ["red crosses", "stars"]


def test_the_last_phrasings_of_each_form_are_for_the_test_split():
    for form, phrasings in PHRASINGS.items():
        assert len(set(phrasings)) == len(phrasings) >= NUM_HELD_OUT + 3, form
    held_out = [phrasing.split("{")[0].strip().lower() for phrasing in PHRASINGS["where"][-NUM_HELD_OUT:]]
    trained = [turn for _, turn in asked("location", count=600)]
    tested = [turn for _, turn in asked("location", "test", count=600)]
    assert not any(turn.held_out for turn in trained)
    assert not any(begin in turn.question.lower() for turn in trained for begin in held_out)
    marked = [turn for turn in tested if turn.held_out]
    assert 0.1 < len(marked) / len(tested) < 0.35
    assert all(any(turn.question.lower().startswith(begin) for begin in held_out) for turn in marked)


def test_every_kind_says_its_name_and_an_unknown_kind_is_refused():
    for kind in MAKERS:
        assert {turn.kind for _, turn in asked(kind, count=120)} == {kind}
    with pytest.raises(ValueError, match="Unknown kind of question 'sound'"):
        ask(generator_of("train", 0), SCENE, "sound", "train")
