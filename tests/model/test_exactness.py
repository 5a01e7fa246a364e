"""What may be kept of frames and prompts, and what may not: docs/exactness.md names these tests.

Prompts here are [system prompt | frames | question].
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from llava_mini.flow import ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.prefusion import Fused, KeysValues
from tests.tiny_models import pixels, prompt, tiny_model

SYSTEM = [1, 5, 6, 4]
QUESTIONS = ([7, 8], [9, 10, 11, 12, 13])
FORMS: list[dict[str, Any]] = [
    {},
    {"reducer_grid": 2, "position_codes": "resized_query_grid"},
    {"vision_tokens_from": "reducer"},
    {"reducer": "average_pool", "reducer_grid": 2},
    {"reducer": "identity"},
    {"reducer_grid": 2, "resolution_ratio": 2},
]

in_every_form = pytest.mark.parametrize(
    "fields", FORMS, ids=lambda fields: "-".join(map(str, fields.values())) or "query"
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def look(model: LlavaMiniForConditionalGeneration, frames: Tensor, text: Tensor | None = None) -> Fused:
    return model.read(*model.reduce_frames(model.encode_frames(frames)), text)


def embedded(model: LlavaMiniForConditionalGeneration, ids: list[int], num_frames: int = 1) -> Tensor:
    """[F, T, D]."""
    return model.get_input_embeddings()(torch.tensor(ids)).expand(num_frames, -1, -1)


def fused_rows(model: LlavaMiniForConditionalGeneration, frames: Tensor, question: list[int]) -> Tensor:
    """[S, D]."""
    ids = torch.tensor([prompt(model.config, SYSTEM, len(frames), question)])
    return model.fuse(ModelInputs(input_ids=ids, pixel_values=frames)).inputs_embeds[0]


def kept_by_language_model(model: LlavaMiniForConditionalGeneration, rows: Tensor) -> list[KeysValues]:
    """Keys and values of each layer, [H, S, C]."""
    cache = model.language_model(inputs_embeds=rows[None], use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # type: ignore[index]


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the order in which sums are taken."""
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def assert_every_row_differs(ours: Tensor, theirs: Tensor) -> None:
    """Rows are the last but one dimension."""
    difference = (ours - theirs).abs().amax(-1)
    assert difference.numel()
    assert difference.min() > 1e-3


@in_every_form
def test_vision_rows_are_the_same_for_every_question_and_for_none(fields: dict[str, Any]):
    model, frames = tiny_model(**fields), pixels(tiny_model(**fields).config, 2)
    unasked = look(model, frames)
    assert len(unasked.keys_values) == model.config.prefusion_num_layers
    for question in QUESTIONS:
        asked = look(model, frames, embedded(model, question, 2))
        assert torch.equal(asked.vision, unasked.vision)  # type: ignore[arg-type]
        for ours, theirs in zip(asked.keys_values, unasked.keys_values, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_rotation_that_depends_on_the_length_is_refused(rope_type: str):
    rotation = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 2.0}
    if rope_type == "longrope":
        rotation |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(ValueError, match=f"cannot rotate with rope_type '{rope_type}'"):
        tiny_model(text={"rope_parameters": rotation})


@in_every_form
def test_frames_of_a_batch_are_read_as_each_alone(fields: dict[str, Any]):
    model = tiny_model(**fields)
    frames, text = pixels(model.config, 3), embedded(model, QUESTIONS[1], 3)
    together = look(model, frames, text)
    for index in range(3):
        alone = look(model, frames[index : index + 1], text[:1])
        assert_alike(together.vision[index], alone.vision[0])  # type: ignore[index]
        assert_alike(together.text[index], alone.text[0])  # type: ignore[index]
        for ours, theirs in zip(together.keys_values, alone.keys_values, strict=True):
            assert_alike(ours[0][index], theirs[0][0])
            assert_alike(ours[1][index], theirs[1][0])


@in_every_form
def test_fused_rows_before_the_question_do_not_depend_on_it(fields: dict[str, Any]):
    model = tiny_model(**fields)
    frames = pixels(model.config, 2)
    first, second = (fused_rows(model, frames, question) for question in QUESTIONS)
    shared = len(SYSTEM) + 2 * model.config.tokens_per_frame
    assert_alike(first[:shared], second[:shared])
    assert_every_row_differs(first[shared:], second[shared:][: len(QUESTIONS[0])])


def test_the_system_prompt_can_be_read_with_the_frames_and_kept():
    model = tiny_model(reducer_grid=2)
    frames = pixels(model.config, 2)
    patches, reduced = model.reduce_frames(model.encode_frames(frames))
    assert patches is not None
    assert model.prefusion is not None
    rows = torch.cat([patches, reduced, embedded(model, SYSTEM, 2)], dim=1)
    kept = model.prefusion(rows, num_outputs=reduced.shape[1] + len(SYSTEM))
    for question in QUESTIONS:
        text = model.read_again(kept.keys_values, embedded(model, question, 2)).mean(0)
        expected = fused_rows(model, frames, question)
        assert_alike(kept.vision[:, reduced.shape[1] :].mean(0), expected[: len(SYSTEM)])  # type: ignore[index]
        assert_alike(text, expected[-len(question) :])


def test_fused_text_is_the_mean_of_what_each_frame_alone_makes_of_it():
    model = tiny_model()
    frames = pixels(model.config, 3)
    is_text = torch.tensor([True] * len(SYSTEM) + [False] + [True] * len(QUESTIONS[0]))
    alone = [fused_rows(model, frame[None], QUESTIONS[0])[is_text] for frame in frames]
    together = fused_rows(model, frames, QUESTIONS[0])
    together = torch.cat([together[: len(SYSTEM)], together[len(SYSTEM) + 3 :]])
    assert_alike(together, torch.stack(alone).mean(0))


@in_every_form
def test_one_more_frame_leaves_the_vision_tokens_and_changes_all_text(fields: dict[str, Any]):
    model = tiny_model(**fields)
    frames = pixels(model.config, 3)
    fewer, more = fused_rows(model, frames[:2], QUESTIONS[0]), fused_rows(model, frames, QUESTIONS[0])
    start, width = len(SYSTEM), model.config.tokens_per_frame
    assert_alike(fewer[start : start + 2 * width], more[start : start + 2 * width])
    assert_every_row_differs(fewer[:start], more[:start])
    assert_every_row_differs(fewer[start + 2 * width :], more[start + 3 * width :])


def test_the_language_models_prefix_is_the_same_for_two_questions_about_the_same_frames():
    model = tiny_model()
    frames = pixels(model.config, 3)
    first, second = (kept_by_language_model(model, fused_rows(model, frames, question)) for question in QUESTIONS)
    shared = len(SYSTEM) + 3
    for ours, theirs in zip(first, second, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one[:, :shared], other[:, :shared])
            assert_every_row_differs(one[:, shared:], other[:, shared : shared + len(QUESTIONS[0])])


def test_the_language_models_keys_change_from_the_first_row_when_a_frame_is_added():
    model = tiny_model()
    frames = pixels(model.config, 3)
    fewer = kept_by_language_model(model, fused_rows(model, frames[:2], QUESTIONS[0]))
    more = kept_by_language_model(model, fused_rows(model, frames, QUESTIONS[0]))
    for layer, (ours, theirs) in enumerate(zip(fewer, more, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            same = slice(
                len(SYSTEM), len(SYSTEM) + 2
            )  # the first two frames, which only deeper layers mix with the text
            assert_every_row_differs(one[:, : len(SYSTEM)], other[:, : len(SYSTEM)])
            assert torch.allclose(one[:, same], other[:, same], atol=2e-5) == (layer == 0)


def test_prompts_with_the_same_ids_and_other_frames_share_no_row():
    model = tiny_model()
    one, other = (pixels(model.config, 1, seed) for seed in (0, 1))
    ours, theirs = (fused_rows(model, frames, QUESTIONS[0]) for frames in (one, other))
    assert_every_row_differs(ours, theirs)
    for kept, rather in zip(kept_by_language_model(model, ours), kept_by_language_model(model, theirs), strict=True):
        assert_every_row_differs(kept[0], rather[0])


@pytest.mark.parametrize("fuse_answers", [False, True])
def test_a_later_turn_leaves_earlier_rows_and_only_raw_answers_stay_as_they_were_generated(fuse_answers: bool):
    model = tiny_model(fuse_answers=fuse_answers)
    frames, answer = pixels(model.config, 2), [20, 21, 22]
    first = fused_rows(model, frames, QUESTIONS[0])
    generated = torch.cat([first, embedded(model, answer)[0]])  # what the language model has read when the turn ends
    ids = torch.tensor([prompt(model.config, SYSTEM, 2, [*QUESTIONS[0], *answer, *QUESTIONS[1]])])
    is_answer = torch.zeros_like(ids)
    is_answer[0, len(first) : len(generated)] = 1
    second = model.fuse(ModelInputs(input_ids=ids, pixel_values=frames, answer_mask=is_answer)).inputs_embeds[0]
    assert_alike(second[: len(first)], first)
    before, after = kept_by_language_model(model, generated), kept_by_language_model(model, second)
    for ours, theirs in zip(before, after, strict=True):
        assert_alike(theirs[0][:, : len(first)], ours[0][:, : len(first)])
        if fuse_answers:
            assert_every_row_differs(theirs[0][:, len(first) : len(generated)], ours[0][:, len(first) :])
        else:
            assert_alike(theirs[0][:, : len(generated)], ours[0])
            assert_alike(theirs[1][:, : len(generated)], ours[1])


def test_a_picture_in_a_later_turn_changes_the_text_before_it():
    model = tiny_model()
    frames = pixels(model.config, 2)
    first = fused_rows(model, frames[:1], QUESTIONS[0])
    ids = torch.tensor([prompt(model.config, SYSTEM, 1, QUESTIONS[0], 1, QUESTIONS[1])])
    second = model.fuse(ModelInputs(input_ids=ids, pixel_values=frames)).inputs_embeds[0][: len(first)]
    assert_alike(second[len(SYSTEM)], first[len(SYSTEM)])  # the vision token
    assert_every_row_differs(second[: len(SYSTEM)], first[: len(SYSTEM)])
    assert_every_row_differs(second[len(SYSTEM) + 1 :], first[len(SYSTEM) + 1 :])
