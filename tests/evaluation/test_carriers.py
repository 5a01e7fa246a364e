"""What tokens and text carry: prompts are spoiled as named, and models are asked about what they have."""

from dataclasses import replace

import pytest
import torch

from llava_mini.data.synthetic.world import WorldSettings
from llava_mini.evaluation.bench import Bench, run_bench
from llava_mini.evaluation.carriers import (
    UNCHANGED,
    answers_to,
    batches,
    carriers,
    fused_variants,
    raw_text,
    shuffled_tokens,
    spoils,
    swapped_text,
    swapped_tokens,
    zeroed_tokens,
)
from llava_mini.evaluation.exact_match import answer_records
from llava_mini.processor.processor import LlavaMiniProcessor
from tests.tiny_engine import BYTES, tiny_parts
from tests.tiny_models import tiny_model

WORLD = WorldSettings(image_kinds={"colour": 1.0}, clip_kinds={"direction": 1.0}, clip_share=0.5)
BENCH = Bench(world=WORLD, questions=8)


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def changed(parts, **fields):
    """A model with other fields, and its processor."""
    _, processor = parts
    model = tiny_model(text={"vocab_size": BYTES, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2}, **fields)
    return model, LlavaMiniProcessor.from_config(model.config, processor.tokenizer, "tiny")


def records_of(kind, numbers=range(3)):
    return [BENCH.item(kind, index).record() for index in numbers]


def clips_of_one_length():
    group = next(batch for batch in batches(BENCH, 4) if batch[0][0] == "direction")
    return [BENCH.item(kind, index).record() for kind, index in group]


def rows(fused, places):
    return fused.inputs_embeds[places]


@torch.inference_mode()
def test_only_what_is_named_is_spoiled(parts):
    model, processor = parts
    asking = fused_variants(model, processor, records_of("colour"))
    own, other = asking.own, asking.other
    frames, text = own.input_ids == model.config.image_token_id, own.is_fused
    assert not torch.equal(rows(own, frames), rows(other, frames))
    assert not torch.equal(rows(own, text), rows(other, text))

    assert not rows(zeroed_tokens(model, asking), frames).any()
    assert torch.equal(rows(swapped_tokens(model, asking), frames), rows(other, frames))
    for spoil in (zeroed_tokens, swapped_tokens):
        assert torch.equal(rows(spoil(model, asking), ~frames), rows(own, ~frames))
    raw = model.get_input_embeddings()(own.input_ids[text])
    assert torch.equal(rows(swapped_text(model, asking), text), rows(other, text))
    assert torch.equal(rows(raw_text(model, asking), text), raw)
    for spoil in (swapped_text, raw_text):
        assert torch.equal(rows(spoil(model, asking), ~text), rows(own, ~text))


@torch.inference_mode()
def test_what_is_swapped_is_what_the_question_before_sees(parts):
    model, processor = parts
    records = records_of("colour")
    frames = [records[-1].image, *(record.image for record in records[:-1])]
    asked_about_others = [replace(record, image=image) for record, image in zip(records, frames, strict=True)]
    expected = fused_variants(model, processor, asked_about_others).own
    torch.testing.assert_close(fused_variants(model, processor, records).other.inputs_embeds, expected.inputs_embeds)


@torch.inference_mode()
def test_shuffling_moves_the_tokens_of_a_clip_and_leaves_its_text(parts):
    model, processor = parts
    asking = fused_variants(model, processor, clips_of_one_length())
    before, after = asking.own, shuffled_tokens(model, asking)
    frames = before.input_ids == model.config.image_token_id
    torch.testing.assert_close(rows(after, ~frames), rows(before, ~frames))
    for row in range(len(frames)):
        moved, tokens = after.inputs_embeds[row, frames[row]], before.inputs_embeds[row, frames[row]]
        assert not torch.allclose(moved, tokens)
        torch.testing.assert_close(moved.sort(0).values, tokens.sort(0).values)


@torch.inference_mode()
def test_answers_with_swapped_tokens_are_those_of_a_model_given_these_tokens(parts):
    model, processor = changed(parts, prefusion_num_layers=0)
    records = records_of("colour")
    swapped = swapped_tokens(model, fused_variants(model, processor, records))
    frames = [records[-1].image, *(record.image for record in records[:-1])]
    asked_about_others = [replace(record, image=image) for record, image in zip(records, frames, strict=True)]
    answers = answers_to(model, processor, swapped, max_new_tokens=8)
    assert answers == answer_records(model, processor, asked_about_others, max_new_tokens=8)
    assert answers != answer_records(model, processor, records, max_new_tokens=8)


def test_unchanged_prompts_get_the_marks_of_the_bench(parts):
    model, processor = parts
    found = carriers(model, processor, BENCH, batch_size=8)
    assert list(found) == [UNCHANGED, "tokens zeroed", "tokens shuffled", "tokens swapped", "text swapped", "text raw"]
    assert found[UNCHANGED].kept == {"colour": 1.0, "direction": 1.0}
    assert found["tokens shuffled"].kept.keys() == {"direction"}
    marks = {(one.turn.kind, one.index): one.right for one in run_bench(model, processor, BENCH)}
    assert found[UNCHANGED].right.keys() == {"colour", "direction", "images", "clips"}
    right = [mark for (kind, _), mark in marks.items() if kind == "colour"]
    assert found[UNCHANGED].right["colour"] == pytest.approx(sum(right) / len(right))


def test_every_question_is_asked_once_beside_others_of_as_many_frames():
    found = batches(BENCH, 3)
    questions = [question for batch in found for question in batch]
    assert len(questions) == len({*questions})
    assert {index for kind, index in questions if kind == "colour"} == set(range(8))
    assert all(2 <= len(batch) <= 3 for batch in found)
    for batch in found:
        assert len({len(BENCH.item(kind, index).frames) for kind, index in batch}) == 1


def test_a_model_is_asked_about_what_it_has(parts):
    model, _ = parts
    without = replace_fields(model.config, prefusion_num_layers=0)
    nowhere = replace_fields(model.config, vision_tokens_from="nowhere")
    assert [*spoils(without)] == ["tokens zeroed", "tokens shuffled", "tokens swapped"]
    assert [*spoils(nowhere)] == ["text swapped", "text raw"]


@torch.inference_mode()
def test_zeroing_and_swapping_tokens_change_nothing_where_no_token_is_read(parts):
    model, processor = changed(parts, vision_tokens_from="nowhere")
    asking = fused_variants(model, processor, records_of("colour"))
    read = asking.own.input_ids[asking.own.attention_mask.bool()]
    assert model.config.image_token_id not in read
    for spoil in (zeroed_tokens, swapped_tokens):
        assert torch.equal(spoil(model, asking).inputs_embeds, asking.own.inputs_embeds)
    raw, is_fused = raw_text(model, asking).inputs_embeds, asking.own.is_fused
    assert torch.equal(raw[is_fused], model.get_input_embeddings()(asking.own.input_ids[is_fused]))
    assert not torch.equal(swapped_text(model, asking).inputs_embeds, asking.own.inputs_embeds)


def replace_fields(config, **fields):
    return type(config).from_dict({**config.to_dict(), **fields})
