from dataclasses import replace

import pytest
import torch
from PIL import Image

from llava_mini.config import preset
from llava_mini.data.collate import LENGTH_STEP, Collator
from llava_mini.data.records import Noun, Record, Turn
from llava_mini.data.tokenizer import build_tokenizer
from llava_mini.processor.processor import LlavaMiniProcessor

CONFIG = preset("tiny")
TOKENIZER = build_tokenizer(["Where is the red circle? top left", "the red star"] * 9, vocab_size=400)
RED_CIRCLE = Noun(phrase="red circle", path=((0.25, 0.75),), facts=(("colour", 0), ("shape", 3), ("size", 1)))
WHERE = Turn(question="Where is the red circle?", answer="top left", kind="location", form="where", nouns=(RED_CIRCLE,))
ABSENT = Turn(
    question="Is there a red star?", answer="no", kind="existence", form="is", nouns=(Noun(phrase="red star"),)
)
IMAGE = Record(turns=(WHERE, ABSENT), image=Image.new("RGB", (96, 96)))
MOVER = Noun(phrase="red circle", path=((0.1, 0.5), None, (0.9, 0.5)))
CLIP = Record(
    turns=(WHERE,), video=tuple(Image.new("RGB", (96, 96), (i, i, i)) for i in (0, 100, 200)), things=(MOVER,)
)


def collator():
    assert CONFIG.image_token_id is not None
    processor = LlavaMiniProcessor.from_config(CONFIG, TOKENIZER, "tiny")
    return Collator(processor, image_token_id=CONFIG.image_token_id, tokens_per_frame=1)


def test_answers_and_their_ends_have_labels_and_lengths_are_rounded_up():
    batch = collator()([IMAGE, CLIP])
    labels = batch.inputs.labels
    assert labels is not None
    assert labels.shape[1] % LENGTH_STEP == 0
    assert TOKENIZER.decode(labels[0][labels[0] != -100]) == "top left<|end|>no<|end|>"
    assert batch.inputs.attention_mask is not None
    assert (labels[batch.inputs.attention_mask == 0] == -100).all()


def test_nouns_of_questions_are_found_with_what_they_name():
    batch = collator()([IMAGE])
    ids, nouns = batch.inputs.input_ids, batch.nouns
    words = [TOKENIZER.decode(ids[p, t - 1 : t + 1]) for p, t in zip(nouns.prompts, nouns.tokens, strict=True)]
    assert words == [" red circle", " red star"]
    assert nouns.present.tolist() == [1, 0]
    assert nouns.places[0].tolist() == [0.25, 0.75]
    assert {name: values.tolist() for name, values in nouns.facts.items()} == {
        "colour": [0, -100],
        "shape": [3, -100],
        "size": [1, -100],
    }


def test_nouns_in_answers_do_not_count():
    turn = Turn(question="What is it?", answer="the red circle", kind="k", form="f", nouns=(RED_CIRCLE,))
    assert len(collator()([Record(turns=(turn,), image=IMAGE.image)]).nouns.prompts) == 0


def test_a_name_within_a_longer_one_is_not_a_name():
    circle = Noun(phrase="circle")
    other = replace(ABSENT, question="Is there a circle?", nouns=(circle,))
    nouns = collator()([replace(IMAGE, turns=(WHERE, other))]).nouns
    assert nouns.present.tolist() == [1, 0]


def test_each_frame_of_a_clip_is_paired_with_each_name_once():
    batch = collator()([IMAGE, replace(CLIP, turns=(WHERE, ABSENT))], separate=True)
    things = batch.frame_things
    assert things.prompts.tolist() == [2, 2, 2]
    assert things.present.tolist() == [1, 0, 1]
    assert things.tokens.shape == (3, 1)
    assert (batch.inputs.input_ids[things.prompts[:, None], things.tokens] == CONFIG.image_token_id).all()
    torch.testing.assert_close(things.places, torch.tensor([[0.1, 0.5], [0.0, 0.0], [0.9, 0.5]]))
    assert TOKENIZER.decode(things.names[0]) == " red circle"


def test_the_trajectory_of_a_thing_goes_to_each_mention_in_a_question_about_a_clip():
    which = Turn(question="Is the red circle left of the red circle?", answer="the red circle", kind="k", form="f")
    batch = collator()([IMAGE, replace(CLIP, turns=(which, ABSENT))], separate=True)
    nouns = batch.clip_nouns
    assert nouns.prompts.tolist() == [2, 2]
    ends = [TOKENIZER.decode(batch.inputs.input_ids[2, token - 1 : token + 1]) for token in nouns.tokens]
    assert ends == [" red circle"] * 2
    torch.testing.assert_close(nouns.trajectories, torch.tensor([[0.1, 0.5, 0.9, 0.5, 0.0, 1.0]] * 2))
    late = Noun(phrase="red circle", path=(None, (0.2, 0.3), (0.2, 0.3)))
    trajectories = collator()([replace(CLIP, things=(late,))]).clip_nouns.trajectories
    torch.testing.assert_close(trajectories, torch.tensor([[0.2, 0.3, 0.2, 0.3, 0.5, 1.0]]))


def test_frames_of_clips_are_listed_with_all_they_show_and_with_what_is_new():
    facts = (("colour", 2), ("shape", 5), ("size", 0))
    named = replace(CLIP, things=tuple(replace(thing, facts=facts) for thing in CLIP.things))
    batch = collator()([IMAGE, replace(named, turns=(WHERE, ABSENT))], separate=True)
    shown, new = batch.shown_things, batch.frame_changes
    assert shown.prompts.tolist() == [2, 2, 2]
    assert shown.frames.tolist() == [0, 2]
    assert (shown.facts["colour"].tolist(), shown.facts["shape"].tolist()) == ([2, 2], [5, 5])
    assert new.prompts.tolist() == [2, 2]
    assert new.tokens.equal(shown.tokens[1:])
    assert (batch.inputs.input_ids[new.prompts[:, None], new.tokens] == CONFIG.image_token_id).all()
    assert new.facts["goes colour"].tolist() == [3, 0]
    assert new.facts["comes shape"].tolist() == [0, 6]
    assert new.facts["direction"].tolist() == [0, 0]


def test_separate_turns_share_the_frames_of_their_record():
    batch = collator()([IMAGE, CLIP], separate=True)
    assert batch.inputs.input_ids.shape[0] == 3
    assert isinstance(batch.inputs.pixel_values, torch.Tensor)
    assert batch.inputs.pixel_values.shape[0] == 4
    assert batch.frame_sources.tolist() == [0, 0, 1, 2, 3]
    together = collator()([IMAGE, CLIP])
    assert isinstance(together.inputs.pixel_values, torch.Tensor)
    torch.testing.assert_close(batch.inputs.pixel_values, together.inputs.pixel_values)
    assert together.frame_sources.tolist() == [0, 1, 2, 3]


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="at least one record"):
        collator()([])
