"""DivPrune against a plain reading of its rule."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_mini.model.reducers.divprune import DivPrune, most_diverse
from tests.tiny_models import pixels, tiny_config, tiny_model

THREE = tiny_config(reducer="divprune", reducer_tokens=3)


def chosen_by_the_rule(patches: np.ndarray, count: int) -> list[int]:
    """Numbers of the patches [N, D] in the order in which they are chosen."""
    unit = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    places = range(len(patches))

    def gap(place: int, others: list[int]) -> float:
        return min(1 - float(unit[place] @ unit[other]) for other in others)

    chosen = [max(places, key=lambda place: gap(place, [other for other in places if other != place]))]
    while len(chosen) < count:
        left = [place for place in places if place not in chosen]
        chosen.append(max(left, key=lambda place: gap(place, chosen)))
    return chosen


def at_angles(*degrees: float) -> Tensor:
    """Patches [1, N, 2] that point in these directions, each of another length."""
    turns = [math.radians(one) for one in degrees]
    rows = [[(1 + place) * math.cos(turn), (1 + place) * math.sin(turn)] for place, turn in enumerate(turns)]
    return torch.tensor([rows])


@pytest.mark.parametrize(("num_patches", "count"), [(2, 1), (16, 5), (36, 36), (144, 14)])
def test_frames_of_a_batch_are_chosen_as_the_rule_does_each(num_patches, count):
    patches = torch.randn(3, num_patches, 8, generator=torch.Generator().manual_seed(0))
    for found, rows in zip(most_diverse(patches, count).tolist(), patches.double().numpy(), strict=True):
        assert found == chosen_by_the_rule(rows, count)


def test_the_first_is_farthest_from_its_nearest_and_the_next_from_what_is_chosen():
    # Nearest others are 10, 10, 40, 40 and 60 degrees away: 150 is first. Then 0, at 150; then 90, at 60; then 50.
    patches = at_angles(0, 10, 50, 90, 150)
    assert most_diverse(patches, 5).tolist() == [[4, 0, 3, 2, 1]]


def test_of_equal_distances_the_first_counts():
    assert most_diverse(at_angles(0, 90, 180, 270), 4).tolist() == [[0, 2, 1, 3]]
    assert most_diverse(torch.ones(1, 4, 2), 4).tolist() == [[0, 1, 2, 3]]


def test_kept_patches_stay_as_they_are_in_the_order_of_the_grid():
    patches = at_angles(0, 10, 50, 90, 150)
    assert torch.equal(DivPrune(THREE)(patches).tokens, patches[:, [0, 3, 4]])


def test_gradients_reach_what_is_kept_and_nothing_else():
    patches = at_angles(0, 10, 50, 90, 150).requires_grad_()
    DivPrune(THREE)(patches).tokens.sum().backward()
    assert patches.grad is not None
    assert patches.grad[0].tolist() == [[1, 1], [0, 0], [0, 0], [1, 1], [1, 1]]


def test_more_tokens_than_there_are_patches_are_refused():
    assert tiny_config(reducer="divprune", reducer_tokens=64, resolution_ratio=2).tokens_per_frame == 64
    with pytest.raises(ValueError, match="'divprune' makes at most 16 tokens.*reducer_tokens is 17"):
        tiny_config(reducer="divprune", reducer_tokens=17)


@torch.inference_mode()
def test_a_model_keeps_rows_that_an_all_token_model_has():
    model = tiny_model(reducer="divprune", reducer_tokens=5, prefusion_num_layers=0)
    everything = tiny_model(reducer="identity", prefusion_num_layers=0)
    everything.load_state_dict(model.state_dict())
    images = pixels(model.config, 2)
    _, kept = model.reduce_frames(model.encode_frames(images))
    _, rows = everything.reduce_frames(everything.encode_frames(images))
    same = (kept[:, :, None] == rows[:, None]).all(-1)  # [F, Q, N]
    assert same.sum(2).tolist() == [[1] * 5] * 2
