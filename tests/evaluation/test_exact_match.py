import pytest

from llava_mini.data.records import Turn
from llava_mini.evaluation.exact_match import score_table, scores_by_kind

TURNS = [
    Turn(question="?", answer=answer, kind=kind, form=kind)
    for kind, answer in (("colour", "red"), ("colour", "blue"), ("count", "2"), ("count", "3"))
]


def test_scores_are_shares_by_kind_beside_the_blind_guess():
    scores = scores_by_kind(TURNS, ["red", "blue", "2", "4"], lambda turn: "blue")
    assert [(kind, one.exact, one.blind, one.questions) for kind, one in scores.items()] == [
        ("all", 0.75, 0.25, 4),
        ("colour", 1.0, 0.5, 2),
        ("count", 0.5, 0.0, 2),
    ]


def test_almost_right_words_are_wrong():
    assert scores_by_kind(TURNS[:1], ["red."], lambda turn: "")["all"].exact == 0


def test_the_table_has_a_line_for_each_kind():
    lines = score_table(scores_by_kind(TURNS, ["red"] * 4, lambda turn: "")).splitlines()
    assert [line.split()[0] for line in lines] == ["kind", "all", "colour", "count"]


def test_answers_must_be_as_many_as_questions():
    with pytest.raises(ValueError, match="1 answers were given to 4 questions"):
        scores_by_kind(TURNS, ["red"], lambda turn: "")
