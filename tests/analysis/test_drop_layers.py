"""Vision tokens that are dropped from layers are not seen there, and are what they were elsewhere."""

import pytest
import torch
from torch.nn import functional

from llava_mini.analysis.drop_layers import (
    DropMark,
    Dropped,
    answer_without,
    by_medium,
    drop_ranges,
    mark_dropped,
)
from llava_mini.analysis.kernels import MOST_WEIGHTS, hiding, kernel_in
from llava_mini.analysis.ours import our_subject
from llava_mini.analysis.peers import peer_subject
from tests.analysis.subjects import asked, our_parts, peer_parts


@pytest.fixture(scope="module", params=["identity", "query", "llava", "llava_next"])
def subject_and_head(request):
    if request.param.startswith("llava"):
        parts = peer_parts(request.param)
        return peer_subject(request.param, *parts, num_shown=1), parts[0].get_output_embeddings()
    parts = our_parts(reducer=request.param, reducer_grid=2, prefusion_num_layers=2 * (request.param == "query"))
    return our_subject("ours", *parts, num_frames=None, num_shown=1), parts[0].get_output_embeddings()


@pytest.fixture(scope="module")
def subject(subject_and_head):
    return subject_and_head[0]


@pytest.fixture(scope="module")
def head(subject_and_head):
    return subject_and_head[1]


@pytest.fixture(scope="module")
def prompted(subject):
    return subject.prompt(asked())


def hidden_states(subject, prompted, layers, most_pairs=MOST_WEIGHTS, **inputs):
    """Last hidden states [S, D] with vision tokens dropped in some layers."""
    modules = {subject.attentions[layer] for layer in layers}
    with kernel_in(subject.decoder, hiding(modules, prompted.is_vision, most_pairs)), torch.no_grad():
        return subject.decoder(use_cache=False, **inputs)[0][0]


def text_alone(subject, embeds, text):
    """Last hidden states of text at the places that it has in the whole prompt."""
    places = torch.arange(len(text))[None, text]
    mask = torch.ones_like(places)  # without one, transformers takes a gap in the places for another prompt
    with torch.no_grad():
        return subject.decoder(
            inputs_embeds=embeds[None, text], position_ids=places, attention_mask=mask, use_cache=False
        )[0][0]


def test_dropped_in_no_layers_nothing_changes(subject, prompted):
    with torch.no_grad():
        plain = subject.decoder(inputs_embeds=prompted.embeds[None], use_cache=False)[0][0]
    dropped = hidden_states(subject, prompted, [], inputs_embeds=prompted.embeds[None])
    torch.testing.assert_close(dropped, plain)
    assert answer_without(subject, prompted, 0, 0, 8) == subject.answer(prompted, 8)


def test_dropped_in_all_layers_the_text_is_that_of_a_model_that_reads_text_alone(subject, prompted):
    text = ~prompted.is_vision
    dropped = hidden_states(subject, prompted, range(3), inputs_embeds=prompted.embeds[None])
    alone = text_alone(subject, prompted.embeds, text)
    torch.testing.assert_close(dropped[text], alone, atol=1e-4, rtol=1e-4)


def test_dropped_in_one_layer_only_text_after_the_image_changes(subject, prompted):
    text = ~prompted.is_vision
    one = hidden_states(subject, prompted, [1], inputs_embeds=prompted.embeds[None])
    with torch.no_grad():
        whole = subject.decoder(inputs_embeds=prompted.embeds[None], use_cache=False)[0][0]
    before = int(prompted.is_vision.int().argmax())
    torch.testing.assert_close(one[:before], whole[:before])  # they never saw an image
    assert (one[text][before:] - whole[text][before:]).abs().max() > 1e-3


def test_vision_tokens_read_one_another_where_they_are_dropped(subject, prompted):
    before, count = int(prompted.is_vision.int().argmax()), int(prompted.is_vision.sum())
    if bool(prompted.is_vision[before : before + count].all()):
        dropped = hidden_states(subject, prompted, range(3), inputs_embeds=prompted.embeds[None])
        with torch.no_grad():
            whole = subject.decoder(inputs_embeds=prompted.embeds[None], use_cache=False)[0][0]
        torch.testing.assert_close(dropped[prompted.is_vision], whole[prompted.is_vision], atol=1e-4, rtol=1e-4)


def test_a_few_rows_at_a_time_hide_the_same_as_all_at_once(subject, prompted):
    inputs = {"inputs_embeds": prompted.embeds[None]}
    whole = hidden_states(subject, prompted, [0, 1], **inputs)
    for rows in (1, 3):
        few = hidden_states(subject, prompted, [0, 1], most_pairs=rows * len(prompted.embeds), **inputs)
        torch.testing.assert_close(few, whole, atol=1e-4, rtol=1e-4)


def test_they_stay_dropped_while_the_answer_is_made(subject, head, prompted):
    answer = answer_without(subject, prompted, 0, 3, 6)
    written = subject.decoder.get_input_embeddings()(torch.tensor(answer[:-1])).detach()
    text = ~functional.pad(prompted.is_vision, (0, len(written)))
    hidden = text_alone(subject, torch.cat([prompted.embeds, written]), text)
    logits = head(hidden)
    assert logits[-len(answer) :].argmax(-1).tolist() == list(answer)


def test_ranges_cover_all_layers_once():
    for num_layers in (1, 3, 4, 8, 9, 32, 40):
        ways = drop_ranges(num_layers)
        ranges = [way for way in ways if way.series == "in a range"]
        covered = [layer for way in ranges for layer in range(way.first, way.stop)]
        assert covered == list(range(num_layers))
        assert len(ranges) <= 8
        assert {way.stop for way in ways if way.series in ("everywhere", "from a layer on")} == {num_layers}
    assert [way.layers for way in drop_ranges(32) if way.series == "in a range"][:2] == ["1-4", "5-8"]
    assert [way.layers for way in drop_ranges(3)] == ["none", "1", "2", "3", "1-3", "2-3", "3"]


def test_every_way_gets_a_mark_of_every_question(subject, prompted):
    ways, question = drop_ranges(3), asked()
    own = subject.answer(prompted, 3)
    for _ in range(2):
        mark_dropped(subject, prompted, question, ways, own, 3)
    assert all(len(way.marks) == 2 for way in ways)
    assert all(way.interval[0] <= way.right <= way.interval[1] for way in ways)


def test_images_and_videos_are_counted_apart():
    marks = [DropMark(right=1.0, shows_video=False, guess=0.0), DropMark(right=0.0, shows_video=True, guess=1.0)]
    ways = [Dropped(series="nowhere", first=0, stop=0, marks=[*marks, marks[0]])]
    groups = by_medium(ways)
    assert {name: (way.right, way.guess, len(way.marks)) for name, (way,) in groups.items()} == {
        "images": (1.0, 0.0, 2),
        "videos": (0.0, 1.0, 1),
    }
    assert list(by_medium([Dropped(series="nowhere", first=0, stop=0, marks=marks[:1])])) == ["images"]
