"""M3: averages of projected patches, and the scales of training."""

import itertools

import pytest
import torch
from torch.nn import functional

from llava_mini.model.reducers.m3 import MatryoshkaPool, scales
from tests.tiny_models import pixels, tiny_config, tiny_model

PLAIN = {"reducer": "m3", "prefusion_num_layers": 0}


@torch.no_grad()
def test_tokens_are_averages_of_projected_patches():
    model = tiny_model(**PLAIN, reducer_grid=2)
    features = model.encode_frames(pixels(model.config, 3))
    _, tokens = model.reduce_frames(features)
    square = model.projector(features[:, 0]).unflatten(1, (2, 2, 2, 2))  # [F, row, down, column, right, D]
    torch.testing.assert_close(tokens, square.mean((2, 4)).flatten(1, 2))
    before = model.projector(features[:, 0].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2))
    assert not torch.allclose(tokens, before, atol=1e-3)  # the projector is not linear


@torch.no_grad()
def test_a_trained_model_is_asked_with_any_scale():
    model = tiny_model(**PLAIN, reducer_grid=4)
    features = model.encode_frames(pixels(model.config, 2))
    _, all_tokens = model.reduce_frames(features)
    model.config.reducer_grid = 1
    _, one = model.reduce_frames(features)
    torch.testing.assert_close(one, all_tokens.mean(1, keepdim=True))
    assert model.config.tokens_per_frame == 1


def test_scales_are_the_published_ones_and_nest_at_every_side():
    assert scales(24) == (24, 12, 6, 3, 1)
    assert scales(1) == (1,)
    for side in range(1, 50):
        found = scales(side)
        assert found[-1] == 1
        assert all(large % small == 0 for large, small in itertools.pairwise(found))


@torch.no_grad()
def test_training_draws_every_scale_and_marks_the_rest_as_absent():
    made, patches = MatryoshkaPool(tiny_config(**PLAIN, reducer_grid=4)), torch.randn(2, 16, 32)
    square, numbers = patches.transpose(1, 2).unflatten(2, (4, 4)), set()
    torch.manual_seed(0)
    for _ in range(30):
        reduced = made(patches)
        assert reduced.valid is not None
        assert reduced.tokens.shape == (2, 16, 32)
        drawn = int(reduced.valid[0].sum())
        assert torch.equal(reduced.valid, torch.arange(16).expand(2, 16) < drawn)
        pooled = functional.adaptive_avg_pool2d(square, int(drawn**0.5)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(reduced.tokens[:, :drawn], pooled)
        numbers.add(drawn)
    assert numbers == {1, 4, 16}


def test_a_grid_that_does_not_divide_the_patches_is_refused():
    with pytest.raises(ValueError, match="m3.*3 does not divide 4"):
        tiny_config(**PLAIN, reducer_grid=3)
