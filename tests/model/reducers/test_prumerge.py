"""PruMerge and PruMerge+ against a plain reading of their rules, one patch at a time."""

from math import isqrt

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from llava_mini.flow import ModelInputs
from llava_mini.model.reducers import build_reducer
from llava_mini.model.reducers.base import Reduced
from llava_mini.model.reducers.prumerge import PruMerge, num_outliers
from tests.model.test_class_attention import whole_tower
from tests.tiny_models import pixels, prompt, tiny_config, tiny_model


def kept_by_the_rule(attention: np.ndarray, *, plus: bool, training: bool) -> list[int]:
    num_patches = len(attention)
    by_attention = sorted(range(num_patches), key=lambda place: -attention[place])
    if training:
        sample = list(range(4, num_patches - 1, 8)) if plus else []
        return by_attention[: num_patches // 8] + sample
    lower, upper = np.percentile(attention, 25), np.percentile(attention, 75)
    count = int((attention > upper + 1.5 * (upper - lower)).sum())
    kept = by_attention[:count]
    if plus and count:
        step = max(int(int(1 / (count / num_patches)) / 3), 1)
        kept += [place for place in range(0, num_patches - 1, step) if place not in kept]
    return kept


def tokens_by_the_rule(
    values: np.ndarray, keys: np.ndarray, attention: np.ndarray, *, plus: bool, training: bool
) -> np.ndarray:
    """Tokens of one frame: patches [N, E], keys [N, E] and attention [N]."""
    places = range(len(values))
    kept = kept_by_the_rule(attention, plus=plus, training=training)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    tokens = []
    for place in kept:
        others = sorted((other for other in places if other != place), key=lambda other: -(unit[other] @ unit[place]))
        tokens.append(values[place] + sum(attention[other] * values[other] for other in others[:32]))
    rest = [attention[place] * values[place] for place in places if place not in kept]
    return np.stack([*tokens, sum(rest, np.zeros(values.shape[1]))])


def random_patches(num_frames: int, num_patches: int, seed: int = 0) -> Tensor:
    """[F, N, E + E + 1] with attention of a long tail."""
    drawn = torch.randn(num_frames, num_patches, 13, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    attention = (2 * drawn[..., -1:]).softmax(1)
    return torch.cat([drawn[..., :-1], attention], dim=-1)


def reducer(num_patches: int, *, plus: bool, training: bool = False) -> PruMerge:
    side = isqrt(num_patches)
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=side, patch_size=1
    )
    name = "prumerge_plus" if plus else "prumerge"
    method = build_reducer(tiny_config(reducer=name, vision_config=tower, prefusion_num_layers=0)).train(training)
    assert isinstance(method, PruMerge)
    return method


def of_frame(reduced: Reduced, frame: int) -> Tensor:
    assert reduced.valid is not None
    return reduced.tokens[frame, reduced.valid[frame]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("num_patches", [4, 16, 36, 144])
def test_frames_of_a_batch_are_reduced_as_the_rule_does_each(num_patches, plus, training):
    patches = random_patches(4, num_patches)
    reduced = reducer(num_patches, plus=plus, training=training)(patches)
    for frame, rows in enumerate(patches.numpy()):
        expected = tokens_by_the_rule(rows[:, :6], rows[:, 6:12], rows[:, 12], plus=plus, training=training)
        torch.testing.assert_close(of_frame(reduced, frame), torch.from_numpy(expected))


def test_a_patch_that_stands_out_takes_the_others_with_it():
    values = torch.tensor([[1.0, 0], [2, 0], [3, 0], [0, 1]])
    keys = torch.tensor([[1.0, 0], [1, 1], [0, 1], [1, 2]])
    attention = torch.tensor([0.1, 0.6, 0.1, 0.1])
    # Quartiles 0.1 and 0.225: only 0.6 is above 0.225 + 1.5 * 0.125. All three others are its neighbours.
    reduced = reducer(4, plus=False)(torch.cat([values, keys, attention[:, None]], dim=1)[None])
    others = 0.1 * values[0] + 0.1 * values[2] + 0.1 * values[3]
    torch.testing.assert_close(of_frame(reduced, 0), torch.stack([values[1] + others, others]))


def test_only_the_32_most_similar_keys_are_merged():
    angles = torch.arange(36) * 0.05
    keys = torch.stack([angles.cos(), angles.sin()], dim=1)
    attention = torch.full((36,), 0.01)
    attention[0] = 0.5
    values = torch.eye(36)
    rows = torch.cat([values, torch.nn.functional.pad(keys, (0, 34)), attention[:, None]], dim=1)
    first = of_frame(reducer(36, plus=False)(rows[None]), 0)[0]
    torch.testing.assert_close(first, torch.tensor([1.0] + [0.01] * 32 + [0.0] * 3))


def test_of_equal_keys_and_equal_attention_those_that_come_first_count():
    rows = torch.cat([torch.eye(36), torch.ones(36, 36), torch.full((36, 1), 0.01)], dim=1)
    rows[[7, 3], -1] = 0.3
    tokens = of_frame(reducer(36, plus=False)(rows[None]), 0)
    assert tokens[:2].argmax(1).tolist() == [3, 7]
    assert (tokens[0] > 0).nonzero()[:, 0].tolist() == list(range(33))


@pytest.mark.parametrize(
    ("outliers", "sample"),
    [
        ([9], [0, 5, 10]),  # 16 // 1 // 3, and the rule stops before place 15
        ([9, 5], [0, 2, 4, 6, 8, 10, 12, 14]),
        ([3, 12, 15], [*range(15)]),  # 16 // 3 // 3 is 1
        ([1, 2, 3, 4], [*range(15)]),
    ],
)
def test_plus_samples_the_grid_three_times_as_densely_as_outliers_are(outliers, sample):
    attention = torch.full((16,), 0.01)
    attention[outliers] = torch.linspace(0.2, 0.19, len(outliers))
    rows = torch.cat([torch.eye(16), torch.randn(16, 16), attention[:, None]], dim=1)
    tokens = of_frame(reducer(16, plus=True)(rows[None]), 0)
    assert tokens[:-1].argmax(1).tolist() == outliers + [place for place in sample if place not in outliers]


@pytest.mark.parametrize("plus", [False, True])
def test_a_frame_without_outliers_becomes_one_token(plus):
    rows = torch.cat([torch.eye(16), torch.eye(16), torch.full((16, 1), 0.05)], dim=1)
    torch.testing.assert_close(of_frame(reducer(16, plus=plus)(rows[None]), 0), torch.full((1, 16), 0.05))


@pytest.mark.parametrize("num_patches", [1, 4, 9, 16, 25, 36, 49, 64, 576])
def test_outliers_are_at_most_a_quarter(num_patches):
    most = (num_patches + 2) // 4
    spikes = torch.zeros(1, num_patches)
    spikes[0, :most] = 1
    assert num_outliers(spikes).tolist() == [most]
    drawn = torch.randn(200, num_patches, generator=torch.Generator().manual_seed(0)) ** 5
    assert int(num_outliers(drawn).max()) <= most


def test_training_keeps_a_fixed_number_at_full_size():
    rows = random_patches(1, 576)
    assert len(of_frame(reducer(576, plus=False, training=True)(rows), 0)) == 72 + 1
    assert len(of_frame(reducer(576, plus=True, training=True)(rows), 0)) == 72 + 72 + 1


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_patches_and_attention_and_not_the_choice(training):
    rows = random_patches(2, 16).requires_grad_()
    reduced = reducer(16, plus=True, training=training)(rows)
    assert reduced.valid is not None
    reduced.tokens[reduced.valid].square().sum().backward()
    assert rows.grad is not None
    values, keys, attention = rows.grad.split((6, 6, 1), dim=-1)
    assert bool((values != 0).all())
    assert bool((attention != 0).all())
    assert not keys.any()


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@torch.inference_mode()
def test_a_model_takes_keys_and_attention_from_the_last_layer_of_the_tower(name):
    model = tiny_model(reducer=name, prefusion_num_layers=0)
    images = pixels(model.config, 3)
    features = model.encode_frames(images)[:, 0]
    whole = whole_tower(model, images[:, 0])
    scores = whole["q2"] @ whole["k2"].transpose(1, 2) / 16**0.5
    torch.testing.assert_close(features[..., :16], whole["in2"][:, 1:])
    torch.testing.assert_close(features[..., 16:32], whole["k2"][:, 1:])
    torch.testing.assert_close(features[..., 32], scores.softmax(-1)[:, 0, 1:])


@torch.inference_mode()
def test_crops_of_an_hd_frame_are_compared_as_one_picture():
    model = tiny_model(reducer="prumerge", prefusion_num_layers=0, resolution_ratio=2)
    images = pixels(model.config, 1)
    ids = torch.tensor([prompt(model.config, [5], 1, [6])])
    taken = model.fuse(ModelInputs(input_ids=ids, pixel_values=images)).inputs_embeds.shape[1] - 2
    _, grid = model.reduce_frames(model.encode_frames(images))
    assert grid.shape[1] == 64
    assert taken == int(num_outliers(grid[..., 32])) + 1
