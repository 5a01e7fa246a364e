from dataclasses import replace

import pytest

from llava_mini.data.synthetic.world import WorldSettings
from llava_mini.evaluation.bench import Bench, run_bench
from tests.tiny_engine import tiny_engine

WORLD = WorldSettings(image_kinds={"colour": 1.0, "size": 2.0}, clip_kinds={"direction": 1.0}, clip_share=0.25)
BENCH = Bench(world=WORLD, questions=4)


def test_every_kind_is_asked_as_often_as_the_bench_says():
    kinds = {kind: [turn.kind for turn in BENCH.turns(kind)] for kind in BENCH.weights.kinds}
    assert kinds == {"colour": ["colour"] * 4, "size": ["size"] * 4, "direction": ["direction"] * 2}
    assert BENCH.total == 10
    assert len(BENCH.item("colour", 0).frames) == 1 < len(BENCH.item("direction", 0).frames)


def test_questions_stand_alone_and_differ_by_split_and_index():
    items = [replace(BENCH, split=split).item("size", index) for split in ("test", "validation") for index in range(4)]
    assert all(len(item.turns) == 1 for item in items)
    assert len({item.frames for item in items}) == 8


def test_a_smaller_bench_asks_the_first_questions_of_a_larger_one():
    assert replace(BENCH, questions=2).turns("colour") == BENCH.turns("colour")[:2]


def test_the_fingerprint_changes_with_the_questions():
    assert BENCH.fingerprint() == replace(BENCH).fingerprint()
    assert BENCH.fingerprint() != replace(BENCH, split="validation").fingerprint()
    assert BENCH.fingerprint() != replace(BENCH, questions=3).fingerprint()


def test_a_world_without_clips_is_asked_about_images_only():
    assert replace(BENCH, world=replace(WORLD, clip_share=0.0)).weights.kinds == ("colour", "size")


def test_every_question_gets_a_mark_with_the_answer_and_a_guess():
    engine, asked = tiny_engine(), []
    marks = run_bench(engine.model, engine.processor, BENCH, batch_size=3, progress=asked.append)
    assert [(one.turn.kind, one.index) for one in marks] == [
        *[("colour", index) for index in range(4)],
        *[("size", index) for index in range(4)],
        *[("direction", index) for index in range(2)],
    ]
    assert asked == [3, 1, 3, 1, 2]
    assert all(one.guess for one in marks)
    assert run_bench(engine.model, engine.processor, BENCH, kinds=["size"]) == marks[4:8]


def test_a_bench_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one question of each kind, got 0"):
        Bench(world=WORLD, questions=0)
    with pytest.raises(ValueError, match="no kind of question"):
        Bench(world=replace(WORLD, image_kinds={}, clip_share=0.0))
