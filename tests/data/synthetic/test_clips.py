import itertools

import pytest

from llava_mini.data.synthetic.clips import CLIP_MAKERS, DIRECTIONS, ask_about_clip, describe_clip, random_clip
from llava_mini.data.synthetic.scenes import generator_of

CLIPS = [random_clip(generator_of("train", index), num_frames=2 + index % 4) for index in range(300)]


def moved_things(clip):
    count = len(clip.frames[0].things)
    return {index for index in range(count) if len(set(clip.path_of(index))) > 1}


def test_only_the_mover_moves_and_it_goes_straight():
    movers = [clip for clip in CLIPS if clip.mover >= 0]
    assert len(movers) > 100
    for clip in CLIPS:
        assert moved_things(clip) == ({clip.mover} if clip.mover >= 0 else set())
    for clip in movers:
        path = clip.path_of(clip.mover)
        across, down = DIRECTIONS[clip.direction]
        for (x0, y0), (x1, y1) in itertools.pairwise(path):
            assert (x1 - x0) * across + (y1 - y0) * down > 0
            assert (x1 - x0) * down == (y1 - y0) * across == 0


def test_every_event_occurs():
    assert {clip.direction for clip in CLIPS} == {"", *DIRECTIONS}
    assert any(clip.changer >= 0 for clip in CLIPS)
    assert any(clip.appears for clip in CLIPS)
    assert any(len(set(map(repr, clip.frames))) == 1 for clip in CLIPS)


def test_questions_about_motion_and_change_are_answered_right():
    seen = set()
    for index, clip in enumerate(CLIPS):
        for kind in CLIP_MAKERS:
            turn = ask_about_clip(generator_of("train", index, kind), clip, kind, "train")
            if turn is None:
                continue
            seen.add(turn.form)
            if turn.form == "direction":
                assert turn.answer == clip.direction
            elif turn.form == "does anything move":
                assert turn.answer == ("yes" if clip.mover >= 0 else "no")
            elif turn.form == "does it move":
                index_of = [thing.name for thing in clip.frames[0].things].index(turn.nouns[0].phrase)
                assert turn.answer == ("yes" if index_of == clip.mover else "no")
            elif turn.form == "does anything change":
                assert turn.answer == ("yes" if clip.changer >= 0 else "no")
            elif turn.form == "new colour":
                assert turn.answer == clip.frames[-1].things[clip.changer].colour
                assert turn.answer != clip.frames[0].things[clip.changer].colour
            elif turn.form == "what appears":
                assert len(clip.frames[0].things) == len(clip.frames[-1].things) - 1
    assert len(seen) == 9


def test_a_description_tells_what_happens():
    clip = next(clip for clip in CLIPS if clip.mover >= 0 and len(clip.frames[0].things) == 1)
    assert describe_clip(clip) == f"the {clip.frames[0].things[0].name} moves {clip.direction}"


def test_a_clip_of_one_frame_and_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="at least 2 frames"):
        random_clip(generator_of("train", 0), num_frames=1)
    with pytest.raises(ValueError, match="Unknown kind of question 'sound'"):
        ask_about_clip(generator_of("train", 0), CLIPS[0], "sound", "train")
