"""Costs of methods that act inside the language model equal those that torch counts, and those that peers print."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.flow import ModelInputs
from llava_mini.model import cost
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from tests.model.inside_by_hand import METHODS
from tests.model.test_cost import ROTATION, counted, stored
from tests.tiny_models import batch, pixels, prompt, tiny_config


def config_of(method: str, **fields: Any) -> LlavaMiniConfig:
    return tiny_config(
        attn_implementation="eager", **{"reducer": method, "prefusion_num_layers": 0, **METHODS[method][0], **fields}
    )


def vicuna(method: str, **fields: Any) -> LlavaMiniConfig:
    return LlavaMiniConfig(
        text_config=preset("llava-mini-vicuna-7b").text, reducer=method, prefusion_num_layers=0, **fields
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fields", [{}, {"reducer_layer": 1}, {"resolution_ratio": 2}])
@pytest.mark.parametrize("num_frames", [0, 1, 3])
def test_flops_equal_those_of_a_counted_forward(method: str, fields: dict[str, Any], num_frames: int):
    config = config_of(method, **fields)
    computed = cost.flops(config, num_frames=num_frames, num_text_tokens=11)
    counts = counted(config, num_frames, 11)
    if method == "query_inside":  # which runs inside the language model
        counts["language_model"] -= counts["reducer"]
        counts["vision_tower"] += counts["reducer"]  # which is what no other part has
    assert counts == pytest.approx(computed.as_dict(), rel=ROTATION)


@pytest.mark.parametrize("method", METHODS)
def test_a_later_question_costs_what_torch_counts(method: str):
    config = config_of(method)
    model = LlavaMiniForConditionalGeneration(config).eval()
    ids = batch([prompt(config, [5, 6], 2, [7] * 9)])
    with torch.no_grad():
        fused = model.fuse(ModelInputs(**ids, pixel_values=pixels(config, 2)))
        cache = None
        if not model.reducer.drops_inside:
            rows = fused.inputs_embeds[:, :-9]
            cache = model(inputs_embeds=rows, use_cache=True, **model.inside(fused)).past_key_values
        rows = fused.inputs_embeds if cache is None else fused.inputs_embeds[:, -9:]
        with FlopCounterMode(display=False) as counter:
            model(inputs_embeds=rows, past_key_values=cache, logits_to_keep=1, **model.inside(fused))
    computed = cost.later_question_flops(config, num_frames=2, num_text_tokens=9, num_kept_tokens=2)
    assert counter.get_total_flops() == pytest.approx(computed.total, rel=ROTATION)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_equal_those_of_the_model(method: str):
    assert stored(config := config_of(method)) == cost.parameters(config).as_dict()


@pytest.mark.parametrize(
    ("method", "fields", "trillions"),
    [
        ("fastv", {"reducer_tokens": 576}, 8.55),
        ("fastv", {"reducer_tokens": 288}, 4.98),
        ("fastv", {"reducer_tokens": 144}, 3.19),
        ("voco", {"reducer_tokens": 2}, 8.58),
        ("query_inside", {"reducer_layer": 4}, 1.89),
    ],
)
def test_the_papers_counting_of_peers(method: str, fields: dict[str, Any], trillions: float):
    assert round(cost.paper_flops(vicuna(method, **fields)).total / 1e12, 2) == trillions


def test_table_12_is_1888_billion_in_the_papers_own_counting():
    assert round(cost.paper_flops(vicuna("query_inside", reducer_layer=4)).total / 1e9) == 1888
