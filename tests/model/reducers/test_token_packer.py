"""TokenPacker: against a plain form that goes region by region, and what it reads of the tower."""

import pytest
import torch
from torch.nn import functional

from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers.regions import in_regions, middle_layers
from llava_mini.model.reducers.token_packer import TokenPacker
from tests.tiny_models import pixels, tiny_config, tiny_model

PLAIN = {"reducer": "token_packer", "prefusion_num_layers": 0}


def plain(model: LlavaMiniForConditionalGeneration, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [F, M, E] and attention [F, M, N], one region after the other."""
    made, grid, side = model.reducer, model.config.reducer_grid, model.config.patches_per_side
    assert isinstance(made, TokenPacker)
    hidden = model.vision_tower(images[:, 0], output_hidden_states=True).hidden_states
    depth = len(hidden) - 1
    last = hidden[depth - 1][:, 1:]
    layers = torch.cat([*(hidden[index][:, 1:] for index in middle_layers(depth)), last], dim=-1)
    square = last.transpose(1, 2).unflatten(2, (side, side))
    small = functional.interpolate(square, size=(grid, grid), mode="bilinear", align_corners=False)
    keys, values = made.regions.key_map(layers), made.regions.value_map(layers)
    cell = side // grid
    tokens, attention = [], torch.zeros(len(images), grid**2, side**2)
    for number in range(grid**2):
        row, column = divmod(number, grid)
        inside = [(row * cell + down) * side + column * cell + right for down in range(cell) for right in range(cell)]
        query = made.query_norm(made.query_map(small[:, :, row, column]))[:, None]
        token, weights = made.regions.attend(query, keys[:, inside], values[:, inside])
        tokens.append(token)
        attention[:, number, inside] = weights[:, 0]
    return torch.cat(tokens, dim=1), attention


@pytest.mark.parametrize("grid", [1, 2, 4])
@torch.no_grad()
def test_batched_regions_equal_the_plain_form(grid):
    model = tiny_model(**PLAIN, reducer_grid=grid)
    images = pixels(model.config, 3)
    tokens, attention = plain(model, images)
    reduced = model.reducer(model.encode_frames(images)[:, 0])
    torch.testing.assert_close(reduced.tokens, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reduced.attention, attention, atol=1e-5, rtol=1e-5)


def test_regions_are_squares_in_reading_order():
    numbers = torch.arange(16)[None, :, None]
    assert in_regions(numbers, 2)[0, :, :, 0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_layers_are_the_published_ones_and_exist_at_every_depth():
    assert middle_layers(24) == (12, 16, 22)
    for depth in range(1, 60):
        assert all(0 <= number < depth for number in middle_layers(depth))


@torch.no_grad()
def test_crops_of_an_hd_frame_form_one_grid():
    model = tiny_model(reducer="token_packer", reducer_grid=4, resolution_ratio=2)
    patches, reduced = model.reduce_frames(model.encode_frames(pixels(model.config, 2)))
    assert patches is not None
    assert patches.shape == (2, 80, 32)
    assert reduced.shape == (2, 16, 32)


def test_a_grid_that_does_not_divide_the_patches_is_refused():
    with pytest.raises(ValueError, match="4 patches per side.*3 does not divide 4. Choose one of 1, 2, 4"):
        tiny_config(**PLAIN, reducer_grid=3)
