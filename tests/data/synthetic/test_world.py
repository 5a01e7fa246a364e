import numpy as np

from llava_mini.data.synthetic.world import WorldSettings, world_item, world_record

MIXED = WorldSettings(min_turns=2, max_turns=4, clip_share=0.4)


def test_a_record_is_the_same_at_every_call():
    first, second = (world_record("train", 5, MIXED) for _ in range(2))
    assert first.turns == second.turns
    assert len(first.video) == len(second.video)
    pictures = [np.asarray(record.image if record.image is not None else record.video[0]) for record in (first, second)]
    assert np.array_equal(*pictures)


def test_records_hold_an_image_or_a_clip_in_the_asked_shares():
    items = [world_item("train", index, MIXED) for index in range(300)]
    clips = [item for item in items if len(item.frames) > 1]
    assert 0.3 < len(clips) / len(items) < 0.5
    assert all(MIXED.min_frames <= len(item.frames) <= MIXED.max_frames for item in clips)


def test_questions_of_a_record_differ_and_there_is_at_least_one():
    items = [world_item("validation", index, MIXED) for index in range(200)]
    assert all(1 <= len(item.turns) <= 4 for item in items)
    assert all(len({turn.question for turn in item.turns}) == len(item.turns) for item in items)


def test_splits_draw_different_records():
    questions = [
        tuple(turn.question for index in range(20) for turn in world_item(split, index, MIXED).turns)
        for split in ("train", "validation", "test")
    ]
    assert len(set(questions)) == 3
