import pytest

from llava_mini.data.records import Turn
from llava_mini.evaluation.exact_match import (
    KindWeights,
    Mark,
    form_scores,
    phrase_f1,
    score_table,
    scores,
    weighted_score,
)

WEIGHTS = KindWeights(images={"colour": 3.0, "count": 1.0, "caption": 1.0}, clips={"direction": 1.0})


def marked(kind: str, truth: str, answer: str, *, guess: str = "blue", form: str = "", held_out: bool = False) -> Mark:
    turn = Turn(question="?", answer=truth, kind=kind, form=form or kind, held_out=held_out)
    return Mark(turn=turn, index=0, answer=answer, guess=guess)


MARKS = [
    marked("colour", "red", "red"),
    marked("colour", "blue", "blue", held_out=True),
    marked("count", "2", "2", form="how many things"),
    marked("count", "3", "4", form="how many circles", held_out=True),
    marked("direction", "left", "right"),
    marked("caption", "a red star and a blue ring", "a red star and a green ring"),
]


def test_scores_are_shares_by_kind_beside_the_blind_guess():
    found = scores(MARKS, WEIGHTS)
    assert list(found) == [
        *("colour", "count", "caption", "direction"),
        *("images", "clips", "all", "known phrasings", "new phrasings"),
    ]
    assert [(one.exact, one.blind, one.questions) for one in (found["colour"], found["count"])] == [
        (1.0, 0.5, 2),
        (0.5, 0.0, 2),
    ]
    assert found["caption"].exact == 0.5
    assert all(one.low <= one.exact <= one.high for one in found.values())


def test_sums_weigh_kinds_as_they_are_asked_and_leave_descriptions_out():
    found = scores(MARKS, WEIGHTS)
    assert found["images"].exact == pytest.approx(0.75 * 1 + 0.25 * 0.5)
    assert found["clips"].exact == 0
    assert found["all"].exact == pytest.approx(0.6 * 0.875)
    assert (found["images"].questions, found["all"].questions) == (4, 5)


def test_how_often_a_kind_was_asked_does_not_change_its_weight():
    often = [*MARKS, *[marked("count", "2", "2"), marked("count", "3", "4")] * 5]
    assert scores(often, WEIGHTS)["images"].exact == pytest.approx(scores(MARKS, WEIGHTS)["images"].exact)


def test_phrasings_that_training_lacks_are_scored_apart():
    found = scores(MARKS[:4], WEIGHTS)
    assert found["known phrasings"].exact == 1
    assert found["new phrasings"].exact == pytest.approx(0.75)
    assert "new phrasings" not in scores(MARKS[:1], WEIGHTS)


def test_almost_right_words_are_wrong():
    assert weighted_score([marked("colour", "red", "red.")], {"colour": 1.0}).exact == 0


def test_a_description_is_marked_by_its_phrases_in_any_order():
    right = "a red star, a blue ring and the word cat"
    assert phrase_f1(right, "the word cat, a blue ring and a red star") == 1
    assert phrase_f1(right, "a red star") == pytest.approx(2 / 4)
    assert phrase_f1(right, "a red star, a red star and a red star") == pytest.approx(2 / 6)
    assert phrase_f1(right, "") == 0


def test_forms_are_scored_each():
    assert {name: one.exact for name, one in form_scores(MARKS[2:4]).items()} == {
        "count: how many things": 1,
        "count: how many circles": 0,
    }


def test_the_table_has_a_line_for_each_kind_and_says_what_a_star_means():
    lines = score_table(scores(MARKS[:2], WEIGHTS)).splitlines()
    assert [line.split()[0] for line in lines] == ["kind", "colour", "images", "all", "known", "new"]
    starred = score_table(scores(MARKS[-1:], WEIGHTS)).splitlines()
    assert starred[1].startswith("caption *")
    assert "F1" in starred[-1]


def test_marks_of_an_unknown_kind_are_named():
    with pytest.raises(ValueError, match="without a weight: smell"):
        scores([marked("smell", "sweet", "sweet")], WEIGHTS)
