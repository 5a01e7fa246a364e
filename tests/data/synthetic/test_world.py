import numpy as np
import pytest

from llava_mini.data.synthetic.scenes import SceneSettings
from llava_mini.data.synthetic.world import WorldSettings, world_item, world_record

SPLITS = ("train", "validation", "test")

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
    assert {len(item.frames) for item in clips} == {3, 4, 5, 6, 8}


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


def test_kinds_are_asked_by_their_weights_and_a_kind_that_no_picture_allows_is_refused():
    only = WorldSettings(image_kinds={"chart": 1.0}, min_turns=3, max_turns=3)
    items = [world_item("test", index, only) for index in range(20)]
    assert {turn.kind for item in items for turn in item.turns} == {"chart"}
    assert all(item.frames[0].chart is not None for item in items)
    never = WorldSettings(scene=SceneSettings(chart_share=0.0), image_kinds={"chart": 1.0})
    with pytest.raises(ValueError, match="allows a question of the kinds"):
        world_item("test", 0, never)


def test_a_split_is_not_a_shuffle_of_another():
    scenes = {split: {repr(world_item(split, index, MIXED).frames) for index in range(150)} for split in SPLITS}
    assert all(len(found) == 150 for found in scenes.values())
    assert len(set().union(*scenes.values())) == 450
