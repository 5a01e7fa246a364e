import itertools
from collections import Counter

import pytest

from llava_mini.data.synthetic.questions import MAKERS, PHRASINGS, ask, describe
from llava_mini.data.synthetic.scenes import COLOURS, SHAPES, Background, Scene, Sign, Thing, generator_of, random_scene

GREY = Background(kind="plain", colour=(140, 140, 140), seed=0)


def asked(kind, split="train", count=400):
    """Pairs of a scene and a question of one kind about it."""
    pairs = []
    for index in range(count):
        rng = generator_of(split, index)
        scene = random_scene(rng)
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
    return turn.question.lower().replace("?", " ").replace(",", " ").replace(":", " ").replace(".", " ").split()


def names_in(turn):
    """Names of things in the order of the question: a colour and the shape after it."""
    words = words_of(turn)
    return [f"{a} {b}" for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES]


def test_existence_is_right_and_as_often_yes_as_no():
    pairs = [pair for pair in asked("existence") if pair[1].form == "is there a thing"]
    for scene, turn in pairs:
        name = (names_in(turn) or [word for word in words_of(turn) if word in SHAPES])[0]
        assert turn.answer == ("yes" if any(name in (thing.name, thing.shape) for thing in scene.things) else "no")
    assert 0.4 < sum(turn.answer == "yes" for _, turn in pairs) / len(pairs) < 0.6


def test_colour_and_shape_are_asked_of_the_only_such_thing():
    for scene, turn in asked("colour"):
        shape = next(word for word in words_of(turn) if word in SHAPES)
        assert turn.answer == thing_called(scene, shape).colour
    for scene, turn in asked("shape"):
        colour = next(word for word in words_of(turn) if word in COLOURS)
        assert turn.answer == thing_called(scene, colour).shape


def test_counts_are_right():
    answers = Counter()
    for scene, turn in asked("count"):
        words = [word.removesuffix("es") if word == "crosses" else word.removesuffix("s") for word in words_of(turn)]
        named = [word for word in words if word in SHAPES or word in COLOURS]
        expected = sum(not named or named[0] in (thing.shape, thing.colour) for thing in scene.things)
        assert turn.answer == str(expected)
        answers[turn.answer] += 1
    assert len(answers) >= 6


def test_locations_and_sizes_are_those_of_the_named_thing():
    for kind, field in (("location", "place"), ("size", "size")):
        for scene, turn in asked(kind):
            assert turn.answer == getattr(thing_called(scene, names_in(turn)[0]), field)


def test_relations_are_right():
    for scene, turn in asked("relation"):
        first, second = (thing_called(scene, noun.phrase) for noun in turn.nouns)
        words = words_of(turn)
        across = "left" in words or "right" in words
        gap = first.x - second.x if across else first.y - second.y
        side = (("left", "right") if across else ("above", "below"))[gap > 0]
        if turn.choices:
            assert turn.answer == side
        else:
            assert turn.answer == ("yes" if side in words else "no")


def test_comparisons_name_the_right_thing():
    for scene, turn in asked("compare"):
        things = [thing_called(scene, name) for name in names_in(turn)]
        pick = max if turn.form == "which is larger" else min
        assert turn.answer == f"the {pick(things, key=lambda thing: thing.radius).name}"


def test_text_is_what_the_sign_says():
    assert all(turn.answer == scene.signs[0].text.lower() for scene, turn in asked("text"))


def test_absent_things_are_absent():
    for scene, turn in asked("absence"):
        assert turn.answer.removeprefix("there is no ") not in {thing.shape for thing in scene.things}


def test_a_description_names_everything():
    star = Thing(shape="star", colour="red", size="small", radius=7, x=10, y=10)
    ring = Thing(shape="ring", colour="blue", size="large", radius=14, x=80, y=50)
    sign = Sign(text="42", x=40, y=80, height=16, ink=(0, 0, 0), plate=None, bold=False)
    text = describe(Scene(things=(ring, star), signs=(sign,), background=GREY))
    assert text == "a small red star at the top left, a large blue ring at the right and the number 42"


def test_the_last_phrasing_of_each_form_is_for_the_test_split():
    held_out = {form: phrasings[-1].split("{")[0].strip().lower() for form, phrasings in PHRASINGS.items()}
    assert held_out["where"] == "what is the position of the"
    trained = [turn.question.lower() for _, turn in asked("location")]
    tested = [turn.question.lower() for _, turn in asked("location", "test")]
    assert not any(question.startswith(held_out["where"]) for question in trained)
    assert any(question.startswith(held_out["where"]) for question in tested)


def test_every_kind_says_its_name_and_an_unknown_kind_is_refused():
    for kind in MAKERS:
        assert {turn.kind for _, turn in asked(kind, count=60)} == {kind}
    with pytest.raises(ValueError, match="Unknown kind of question 'sound'"):
        ask(generator_of("train", 0), random_scene(generator_of("train", 0)), "sound", "train")
