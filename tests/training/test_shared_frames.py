from dataclasses import replace

import pytest
import torch

from llava_mini.flow import ModelInputs
from llava_mini.training.language_pretraining import answer_loss, row_loss
from llava_mini.training.shared_frames import answer_rows, fuse_shared, shares_much
from tests.tiny_models import IMAGE_TOKEN, batch, pixels, tiny_model

I = IMAGE_TOKEN  # noqa: E741


def wide(row, places):
    """Ids with as many image tokens as a frame has tokens."""
    return [token for one in row for token in [one] * (places if one == I else 1)]


def inputs_of(pixel_values):
    """Two questions about an image, then two about a clip of two frames, padded on the right; labels at the end."""
    i = IMAGE_TOKEN
    rows = [[5, i, 6, 7, 8, 9], [5, i, 9, 8, 3, 3], [5, i, i, 6, 10, 11], [5, i, i, 12, 11, 3]]
    ids = torch.tensor(rows)
    mask = (ids != 3).long()
    labels = torch.full_like(ids, -100)
    labels[:, 4] = torch.where(mask[:, 4] == 1, ids[:, 4], -100)
    return ModelInputs(input_ids=ids, attention_mask=mask, pixel_values=pixel_values, labels=labels)


def test_shared_frames_give_what_repeated_frames_give_and_the_same_gradients():
    model = tiny_model()
    image, clip = pixels(model.config, 1, seed=1), pixels(model.config, 2, seed=2)
    results = []
    for shared in (False, True):
        model.zero_grad()
        if shared:
            sources = torch.tensor([0, 0, 1, 2, 1, 2])
            fused = fuse_shared(model, inputs_of(torch.cat([image, clip])), sources)
        else:
            fused = model.fuse(inputs_of(torch.cat([image, image, clip, clip])))
        fused.inputs_embeds.square().sum().backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        results.append((fused, gradients))
    (plain, plain_gradients), (shared_prompt, shared_gradients) = results
    torch.testing.assert_close(shared_prompt.inputs_embeds, plain.inputs_embeds)
    assert shared_prompt.num_frames == plain.num_frames == (1, 1, 2, 2)
    assert plain_gradients.keys() == shared_gradients.keys()
    assert any(name.startswith("prefusion") for name in plain_gradients)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"reducer": "identity", "prefusion_num_layers": 0},
        {"reducer": "identity"},
        {"reducer": "voco", "reducer_tokens": 2, "prefusion_num_layers": 0},
        {"reducer": "fastv", "reducer_tokens": 4, "reducer_layer": 1, "prefusion_num_layers": 0},
        {"reducer": "query_inside", "reducer_layer": 1, "prefusion_num_layers": 0},
        {"reducer": "prumerge_plus", "prefusion_num_layers": 0},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_the_language_model_reads_what_questions_share_once_with_the_same_loss_and_gradients(fields):
    model = tiny_model(attn_implementation="eager", **fields).train()
    places = model.config.tokens_per_frame
    images = [5, I, 6, 7, 8], [5, I, 9, 8, 4, 10, 4], [5, I, 7, 4, 12]
    clips = [5, I, I, 6, 4, 11], [5, I, I, 12, 4, 9], [5, I, I, 7, 7, 10]
    prompts = [wide(row, places) for row in (*images, *clips)]
    tensors = batch(prompts)
    labels = torch.full_like(tensors["input_ids"], -100)
    for row, prompt in enumerate(prompts):
        labels[row, len(prompt) - 2 : len(prompt)] = torch.tensor(prompt[-2:])
    inputs = ModelInputs(**tensors, labels=labels, pixel_values=pixels(model.config, 3))
    sources, head = torch.tensor([0, 0, 0, *[1, 2] * 3]), model.language_model.lm_head

    def plain():
        fused = fuse_shared(model, inputs, sources)
        read = {"inputs_embeds": fused.inputs_embeds, "attention_mask": fused.attention_mask, **model.inside(fused)}
        hidden = model.language_model.model(**read)
        return answer_loss(head, hidden.last_hidden_state, fused.labels)

    def shared():
        fused = fuse_shared(model, inputs, sources)
        assert shares_much(model, fused, sources)
        return row_loss(head, *answer_rows(model, fused, sources))

    found = []
    for losses_of in (plain, shared):
        model.zero_grad()
        losses = losses_of()
        losses.total.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        found.append((float(losses.total.detach()), losses.right, gradients))
    (loss, right, gradients), (shared_loss, shared_right, shared_gradients) = found
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert shared_right == right
    assert gradients.keys() == shared_gradients.keys()
    assert any(name.startswith("vision_tower") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-4)


def test_nothing_is_shared_where_a_frame_is_one_token_or_none_or_its_answer_follows_at_once():
    sources = torch.tensor([0, 0, 1, 2, 1, 2])
    model = tiny_model(reducer="identity")
    tensors = batch([wide([5, I, 7], model.config.tokens_per_frame)] * 6)
    labels = tensors["input_ids"].masked_fill(tensors["input_ids"] != 7, -100)
    inputs = ModelInputs(**tensors, labels=labels, pixel_values=pixels(model.config, 1))
    assert not shares_much(model, fuse_shared(model, inputs, torch.zeros(6).long()), torch.zeros(6).long())
    for fields in ({}, {"vision_tokens_from": "nowhere"}):
        model = tiny_model(**fields)
        fused = fuse_shared(model, inputs_of(pixels(model.config, 3)), sources)
        assert not shares_much(model, fused, sources)


def test_nothing_is_shared_where_rows_are_chosen_by_the_question():
    model = tiny_model(reducer="quecc", prefusion_num_layers=0)
    tensors = batch([wide([5, I, 6, 7], model.config.tokens_per_frame)] * 6)
    labels = tensors["input_ids"].masked_fill(tensors["input_ids"] != 7, -100)
    inputs = ModelInputs(**tensors, labels=labels, pixel_values=pixels(model.config, 1))
    sources = torch.zeros(6).long()
    assert not shares_much(model, fuse_shared(model, inputs, sources), sources)


def test_features_give_what_their_pixels_give():
    model, sources = tiny_model(), torch.tensor([0, 0, 1, 2, 1, 2])
    inputs = inputs_of(pixels(model.config, 3))
    features = model.encode_frames(inputs.pixel_values)
    plain = fuse_shared(model, inputs, sources)
    stored = fuse_shared(model, replace(inputs, pixel_values=None, features=features), sources)
    assert torch.equal(stored.inputs_embeds, plain.inputs_embeds)
