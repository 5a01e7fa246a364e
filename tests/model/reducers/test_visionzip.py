"""VisionZip against a plain reading of its rule, one patch at a time."""

from math import isqrt

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from llava_mini.model.reducers import build_reducer
from llava_mini.model.reducers.visionzip import VisionZip, num_contextual
from tests.model.test_class_attention import whole_tower
from tests.tiny_models import pixels, tiny_config, tiny_model


def tokens_by_the_rule(
    values: np.ndarray, keys: np.ndarray, attention: np.ndarray, class_token: np.ndarray, dominant: int, contextual: int
) -> np.ndarray:
    """Tokens of one frame: patches [N, E], keys [N, C], attention [N], class token [E]."""
    by_attention = sorted(range(len(values)), key=lambda place: -attention[place])
    kept = sorted(by_attention[: dominant - 1])
    remaining = [place for place in range(len(values)) if place not in kept]
    tokens = [class_token, *(values[place] for place in kept)]
    centres = remaining[:: len(remaining) // contextual][:contextual] if contextual else []
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    given: dict[int, list[np.ndarray]] = {centre: [] for centre in centres}
    for place in remaining:
        if centres and place not in centres:
            given[max(centres, key=lambda centre: unit[centre] @ unit[place])].append(values[place])
    tokens += [values[centre] + (np.mean(rows, axis=0) if rows else 0) for centre, rows in given.items()]
    return np.stack(tokens)


def rows_of(values: Tensor, keys: Tensor, attention: Tensor, class_token: Tensor) -> Tensor:
    """What the reducer reads: [F, N, E + C + 1 + E]."""
    return torch.cat([values, keys, attention[..., None], class_token[:, None].expand_as(values)], dim=-1)


def reducer(num_patches: int, num_tokens: int, width: int, num_heads: int = 1) -> VisionZip:
    tower = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=1,
        num_hidden_layers=3,
        num_attention_heads=num_heads,
        image_size=isqrt(num_patches),
        patch_size=1,
    )
    method = build_reducer(tiny_config(reducer="visionzip", reducer_tokens=num_tokens, vision_config=tower))
    assert isinstance(method, VisionZip)
    return method


@pytest.mark.parametrize(("num_patches", "num_tokens"), [(16, 1), (16, 7), (16, 17), (36, 13), (144, 64), (144, 145)])
def test_frames_of_a_batch_are_reduced_as_the_rule_does_each(num_patches, num_tokens):
    draw = torch.Generator().manual_seed(0)
    values, keys = (torch.randn(3, num_patches, n, generator=draw, dtype=torch.float64) for n in (6, 3))
    attention, class_token = (torch.rand(3, n, generator=draw, dtype=torch.float64) for n in (num_patches, 6))
    tokens = reducer(num_patches, num_tokens, 6, 2)(rows_of(values, keys, attention, class_token)).tokens
    contextual = num_contextual(num_tokens)
    for frame in range(3):
        parts = (one[frame].numpy() for one in (values, keys, attention, class_token))
        expected = tokens_by_the_rule(*parts, num_tokens - contextual, contextual)
        torch.testing.assert_close(tokens[frame], torch.from_numpy(expected))


def reduced_numbers(values: list[float], keys: list[list[float]], attention: list[float]) -> list[float]:
    """Thirteen tokens of 16 patches, two of them contextual; a patch is its number and the negative of it."""
    numbers = torch.tensor(values)
    rows = rows_of(
        torch.stack([numbers, -numbers], dim=1)[None],
        torch.tensor([keys]),
        torch.tensor([attention]),
        torch.tensor([[-1.0, 1.0]]),
    )
    tokens = reducer(16, 13, 2)(rows).tokens[0]
    assert torch.equal(tokens[:, 0], -tokens[:, 1])
    return tokens[:, 0].tolist()


def test_what_resembles_a_spaced_patch_is_averaged_into_it():
    right, up = [1.0, 0.0], [0.0, 3.0]
    values = [1.0, 2, 4, 8, 16, 32, *range(100, 110)]
    keys = [right, up, right, up, up, right, *[right] * 10]
    attention = [0.0] * 6 + [float(place) for place in range(1, 11)]
    # Ten patches dominate. Of the first six each third is a centre: 1, whose key points right, and 8, up.
    contextual = [1 + (4 + 32) / 2, 8 + (2 + 16) / 2]
    assert reduced_numbers(values, keys, attention) == [-1, *range(100, 110), *contextual]


def test_of_equal_attention_and_equal_keys_those_that_come_first_count():
    values = [float(place) for place in range(16)]
    # The first ten dominate, 10 and 13 are the centres, and all others are given to the first of these.
    contextual = [10 + (11 + 12 + 14 + 15) / 4, 13]
    assert reduced_numbers(values, [[1.0, 1.0]] * 16, [0.5] * 16) == [-1, *range(10), *contextual]


@pytest.mark.parametrize(("total", "contextual"), [(64, 10), (128, 20), (192, 30), (1, 0), (6, 0), (7, 1)])
def test_tokens_are_divided_as_in_the_paper(total, contextual):
    assert num_contextual(total) == contextual


@torch.no_grad()
def test_a_model_makes_the_number_of_tokens_that_its_configuration_has_by_then():
    model, other = (tiny_model(reducer="visionzip", reducer_tokens=count) for count in (7, 16))
    other.load_state_dict(model.state_dict())
    frames = pixels(model.config, 2)
    features = model.encode_frames(frames)
    model.config.reducer_tokens = 16
    torch.testing.assert_close(model.reduce_frames(features)[1], other.reduce_frames(features)[1])


def test_more_tokens_than_there_are_patches_and_the_class_token_are_refused():
    assert tiny_config(reducer="visionzip", reducer_tokens=17).tokens_per_frame == 17
    with pytest.raises(ValueError, match="'visionzip' makes at most 17 tokens.*reducer_tokens is 18"):
        tiny_config(reducer="visionzip", reducer_tokens=18)


def test_gradients_reach_every_patch_and_the_class_token():
    rows = torch.randn(2, 16, 6 + 3 + 1 + 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reducer(16, 12, 6, 2)(rows).tokens.square().sum().backward()
    assert rows.grad is not None
    values, choice, class_token = rows.grad.split((6, 4, 6), dim=-1)
    assert bool((values != 0).all())
    assert bool((class_token != 0).all())
    assert not choice.any()


@torch.inference_mode()
def test_a_model_takes_keys_and_attention_from_the_last_layer_that_is_run():
    model = tiny_model(reducer="visionzip", reducer_tokens=7)
    images = pixels(model.config, 3)
    features = model.encode_frames(images)[:, 0]
    whole = whole_tower(model, images[:, 0])
    values, keys, attention, class_token = features.split((16, 8, 1, 16), dim=-1)
    torch.testing.assert_close(values, whole["in2"][:, 1:])
    torch.testing.assert_close(keys, (whole["k1"][:, 1:, :8] + whole["k1"][:, 1:, 8:]) / 2)
    torch.testing.assert_close(attention[..., 0], whole["attention1"].sum(1)[:, 0, 1:])
    torch.testing.assert_close(class_token, whole["in2"][:, :1].expand(-1, 16, -1))


@torch.inference_mode()
def test_the_class_tokens_of_hd_crops_are_averaged():
    model = tiny_model(reducer="visionzip", reducer_tokens=7, resolution_ratio=2)
    images = pixels(model.config, 1)
    _, reduced = model.reduce_frames(model.encode_frames(images))
    crops = whole_tower(model, images[0, :4])["in2"][:, 0]
    torch.testing.assert_close(reduced[0, 0], model.projector(crops.mean(0)), atol=1e-5, rtol=1e-5)
