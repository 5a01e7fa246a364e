"""The configuration refuses what no model could be."""

from pathlib import Path
from typing import Any

import pytest

from llava_mini.config import PRESETS, LlavaMiniConfig, preset
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"reducer": "qformer"}, "one of identity, average_pool, query"),
        ({"vision_tokens_from": "tower"}, "one of prefusion, reducer"),
        ({"position_codes": "none"}, "one of patch_grid"),
        ({"reducer_grid": 0}, "at least 1, got 0"),
        ({"reducer_grid": 2.0}, "whole number, got 2.0"),
        ({"prefusion_num_layers": -1}, "at least 0"),
        ({"fuse_answers": "no"}, "True or False, got 'no'"),
        ({"image_token_id": 5}, "an id of the vocabulary"),
        ({"reducer_gird": 2}, "Did you mean 'reducer_grid'"),
        ({"text_config": "llama"}, "a configuration or a dictionary"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "only 'clip_vision_model'"),
    ],
)
def test_impossible_fields_are_named(fields: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("reducer", "field", "value", "match"),
    [
        ("mqt", "reducer_tokens", 0, "at least 1, got 0"),
        ("mqt", "reducer_tokens", 999, "at most 4 tokens"),
        ("divprune", "reducer_tokens", 17, "at most 16 tokens"),
        ("m3", "reducer_grid", 3, "3 does not divide 4"),
        ("average_pool", "reducer_grid", 8, "8 does not divide 4"),
    ],
)
def test_an_impossible_number_set_later_is_named_where_places_are_counted(reducer, field, value, match):
    config = tiny_config(reducer=reducer, reducer_tokens=2, prefusion_num_layers=0)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=match):
        _ = config.tokens_per_frame


def test_a_misspelt_released_field_is_named():
    with pytest.raises(ValueError, match="Did you mean 'compressor_size'"):
        LlavaMiniConfig.from_dict(
            {"model_type": "llava_mini_llama", "vision_config": {"hidden_size": 8}, "compresor_size": 2}
        )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_from_disk(name: str, tmp_path: Path):
    config = preset(name)
    config.save_pretrained(tmp_path)
    assert LlavaMiniConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_presets_have_the_papers_tokens():
    tokens = {name: preset(name).tokens_per_frame for name in PRESETS}
    assert tokens == {
        "tiny": 1,
        "llava-v1.5-7b": 576,
        "llava-mini-vicuna-7b": 1,
        "llava-mini-hd-vicuna-7b": 64,
        "llava-mini-llama-3.1-8b": 1,
    }


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="The presets are: tiny, llava-v1.5-7b"):
        preset("llava-2")
