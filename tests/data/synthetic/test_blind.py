import pytest

from llava_mini.data.records import Turn
from llava_mini.data.synthetic.blind import BlindBaseline


def turn(form, answer, choices=()):
    return Turn(question="?", answer=answer, kind="kind", form=form, choices=choices)


def test_it_says_the_commonest_answer_to_a_form():
    blind = BlindBaseline([turn("count", "2"), turn("count", "2"), turn("count", "3"), turn("colour", "red")])
    assert blind.answer(turn("count", "5")) == "2"
    assert blind.answer(turn("colour", "blue")) == "red"
    assert blind.answer(turn("never seen", "blue")) == ""


def test_between_named_answers_it_learns_the_place_and_not_the_name():
    blind = BlindBaseline(
        [turn("which", "a", ("b", "a")), turn("which", "c", ("d", "c")), turn("which", "e", ("e", "f"))]
    )
    assert blind.answer(turn("which", "x", ("x", "y"))) == "y"


def test_the_score_is_the_share_of_right_guesses():
    blind = BlindBaseline([turn("count", "2")])
    assert blind.score([turn("count", "2"), turn("count", "1"), turn("count", "1"), turn("count", "4")]) == 0.25
    with pytest.raises(ValueError, match="no questions"):
        blind.score([])
