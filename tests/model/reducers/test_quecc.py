"""QueCC: against a plain form with keys and values of every patch, and what it is told of the question."""

import pytest
import torch
from torch import nn

from llava_mini.flow import ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers.base import Question
from llava_mini.model.reducers.quecc import QueCC
from llava_mini.model.reducers.regions import in_regions
from tests.tiny_models import IMAGE_TOKEN, batch, pixels, prompt, tiny_model


def quecc(grid: int = 1) -> LlavaMiniForConditionalGeneration:
    return tiny_model(reducer="quecc", reducer_grid=grid, prefusion_num_layers=0)


def plain(made: QueCC, features: torch.Tensor, asked: torch.Tensor, grid: int) -> torch.Tensor:
    """As published. features: [F, N, 4 * E], asked: [F, D]."""
    width, frames = features.shape[-1] // 4, len(features)
    text = made.question_norm(made.question_map(asked))[:, None]
    queries = made.query_map(features[..., :width] + text)
    layers = torch.cat([features[..., width:], features[..., :width]], dim=-1)
    cells = in_regions(queries, grid)  # [F, M, R, E]
    kernel = made.downsample.weight[:, 0].flatten(1).T  # [R, E]
    queries = (cells * kernel).sum(2) + made.downsample.bias
    keys, values = (in_regions(change(layers), grid) for change in (made.regions.key_map, made.regions.value_map))
    tokens, _ = made.regions.attend(queries.reshape(-1, 1, width), keys.flatten(0, 1), values.flatten(0, 1))
    return tokens.reshape(frames, grid**2, width)


@pytest.mark.parametrize("grid", [1, 2, 4])
@torch.no_grad()
def test_tokens_equal_the_plain_form(grid):
    model = quecc(grid)
    features = model.encode_frames(pixels(model.config, 3))[:, 0]
    embeds, lengths = torch.randn(3, 5, 32), torch.tensor([5, 1, 3])
    question = Question(embeds, torch.arange(5) < lengths[:, None])
    assert isinstance(model.reducer, QueCC)
    expected = plain(model.reducer, features, embeds[torch.arange(3), lengths - 1], grid)
    torch.testing.assert_close(model.reducer(features, question).tokens, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_language_model_reads_each_question_alone():
    model = quecc()
    rows = [prompt(model.config, [5, 6], 1, [7, 8, 9]), prompt(model.config, [5], 2, [11, 12, 13, 14])]
    question = model.text_rows(ModelInputs(**batch(rows, "left"))).question
    assert question is not None
    for row, words in enumerate(([7, 8, 9], [11, 12, 13, 14])):
        alone = model.language_model(input_ids=torch.tensor([words]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(question.embeds[row, : len(words)], alone[0], atol=1e-5, rtol=1e-4)
        assert question.valid[row].tolist() == [place < len(words) for place in range(4)]


@torch.no_grad()
def test_without_words_after_the_frame_nothing_is_added():
    model = quecc()
    image = pixels(model.config, 1)
    with_text = [prompt(model.config, text, 1) for text in ([5, 6], [9, 10, 11])]
    tokens = [
        model.fuse(ModelInputs(input_ids=torch.tensor([ids]), pixel_values=image)).inputs_embeds[0, -1]
        for ids in with_text
    ]
    assert torch.equal(*tokens)
    assert bool(tokens[0].isfinite().all())


def test_no_gradient_passes_through_the_first_reading():
    model = quecc().train()
    inputs = ModelInputs(**batch([prompt(model.config, [5], 1, [7, 8])]), pixel_values=pixels(model.config, 1))
    fused = model.fuse(inputs)
    fused.inputs_embeds[fused.input_ids == IMAGE_TOKEN].sum().backward()
    assert all(one.grad is None for one in model.language_model.model.layers.parameters())
    assert isinstance(model.reducer, QueCC)
    assert isinstance(model.reducer.question_map, nn.Linear)
    assert model.reducer.question_map.weight.grad is not None
