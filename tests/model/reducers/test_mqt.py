"""MQT: the fast path against the plain attention, numbers of tokens in training and after it."""

import pytest
import torch

from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.flow import ModelInputs
from llava_mini.model.positions import resize_codes
from llava_mini.model.reducers.mqt import MatryoshkaQueries
from llava_mini.reducer_settings import matryoshka_side
from tests.tiny_models import IMAGE_TOKEN, batch, pixels, prompt, tiny_config, tiny_model


def reducer(side: int = 6, **fields) -> MatryoshkaQueries:
    """With random weights, for ``side`` patches per side and width 32."""
    text = tiny_config().text
    vision = {**tiny_config().vision.to_dict(), "hidden_size": 32, "image_size": 2 * side}
    config = LlavaMiniConfig(
        vision_config=vision,
        text_config=text,
        reducer="mqt",
        prefusion_num_layers=0,
        **{"reducer_tokens": 16, **fields},
    )
    torch.manual_seed(0)
    made = MatryoshkaQueries(config).eval()
    made.init_weights()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def plain(made: MatryoshkaQueries, patches: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As published: keys and values of every patch of every frame."""
    side = round(patches.shape[1] ** 0.5)
    queries = made.query_norm(made.queries[:num_tokens] + made.query_codes[:num_tokens])
    keys = made.key_norm(resize_codes(made.query_codes, made.side, side))
    frames = len(patches)
    return made.attend(
        queries.expand(frames, -1, -1), keys.expand(frames, -1, -1), made.value_norm(patches), need_weights=True
    )


@pytest.mark.parametrize("side", [6, 12])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16])
@torch.no_grad()
def test_shared_attention_equals_the_plain_form(num_tokens, side):
    made = reducer(reducer_tokens=num_tokens)
    patches = torch.randn(3, side**2, 32)
    tokens, attention = plain(made, patches, num_tokens)
    reduced = made(patches)
    assert reduced.attention is not None
    torch.testing.assert_close(reduced.tokens, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reduced.attention, attention, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fewer_tokens_are_the_first_of_more():
    made, patches = reducer(), torch.randn(2, 36, 32)
    many = made(patches).tokens
    made.config.reducer_tokens = 5
    torch.testing.assert_close(made(patches).tokens, many[:, :5])


@torch.no_grad()
def test_training_draws_all_even_numbers_and_the_most_and_marks_the_rest_as_absent():
    made, patches = reducer(reducer_tokens=7), torch.randn(2, 36, 32)
    all_tokens = made(patches).tokens
    made.train()
    numbers = set()
    for _ in range(40):
        reduced = made(patches)
        assert reduced.valid is not None
        assert reduced.valid.shape == reduced.tokens.shape[:2] == (2, 7)
        drawn = int(reduced.valid[0].sum())
        assert torch.equal(reduced.valid, torch.arange(7).expand(2, 7) < drawn)
        torch.testing.assert_close(reduced.tokens[:, :drawn], all_tokens[:, :drawn], atol=1e-5, rtol=1e-5)
        numbers.add(drawn)
    assert numbers == {2, 4, 6, 7}


@torch.no_grad()
def test_training_with_one_token_takes_it():
    made = reducer(reducer_tokens=1).train()
    valid = made(torch.randn(2, 36, 32)).valid
    assert valid is not None
    assert valid.shape == (2, 1)
    assert bool(valid.all())


@torch.no_grad()
def test_prompts_in_training_hold_the_tokens_that_were_drawn():
    model = tiny_model(reducer="mqt", reducer_tokens=4, prefusion_num_layers=0)
    tensors = batch([prompt(model.config, [5, 6], 2, [7, 8, 9]), prompt(model.config, [5], 1, [9])])
    images = pixels(model.config, 3)
    torch.manual_seed(1)
    found = set()
    for _ in range(12):
        fused = model.train().fuse(ModelInputs(**tensors, pixel_values=images))
        counts = ((fused.input_ids == IMAGE_TOKEN) & fused.attention_mask.bool()).sum(1).tolist()
        assert counts[0] == 2 * counts[1]
        assert fused.attention_mask.sum(1).tolist() == [5 + counts[0], 2 + counts[1]]
        found.add(counts[1])
    assert found == {2, 4}


def test_attention_does_not_depend_on_what_is_shown():
    made = reducer()
    first, second = (made(torch.randn(1, 36, 32)).attention for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_the_projector_is_one_linear_map_without_bias():
    projector = tiny_model(reducer="mqt", reducer_tokens=4, prefusion_num_layers=0).projector
    assert [(name, tuple(one.shape)) for name, one in projector.named_parameters()] == [("weight", (32, 16))]


@pytest.mark.parametrize(("side", "queries"), [(24, 16), (12, 8), (16, 10), (4, 2), (1, 2)])
def test_the_grid_of_queries_has_two_thirds_of_the_patches_side(side, queries):
    config = LlavaMiniConfig(vision_config={**preset("tiny").vision.to_dict(), "image_size": 8 * side})
    assert matryoshka_side(config) == queries


def test_more_tokens_than_queries_are_refused():
    with pytest.raises(ValueError, match="'mqt' makes at most 4 tokens.*reducer_tokens is 5"):
        tiny_config(reducer="mqt", reducer_tokens=5, prefusion_num_layers=0)


def test_prefusion_is_refused_where_numbers_of_tokens_are_drawn():
    with pytest.raises(ValueError, match="'mqt'.*prefusion_num_layers=0"):
        tiny_model(reducer="mqt", reducer_tokens=4)
