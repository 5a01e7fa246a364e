"""Every parameter of every model has one rule, in both stages."""

import pytest

from llava_mini.training.lora import LoraSettings, add_lora
from llava_mini.training.stages import apply_stage
from llava_mini.training.tuning_stages import STAGE_1, STAGE_2, tuning_stage
from tests.tiny_models import tiny_model

MODELS = {
    "stage 1": {"reducer": "identity", "prefusion_num_layers": 0},
    "LLaVA-Mini": {},
    "without pre-fusion": {"prefusion_num_layers": 0},
    "average pool": {"reducer": "average_pool"},
    "pre-fusion alone": {"reducer": "identity"},
    "tied": {"text": {"tie_word_embeddings": True}},
}


def rates_of(model, rates):
    """Peak rates by part of what trains."""
    names = [name for name, _ in model.named_parameters()]
    found = {}
    for group in apply_stage(model.named_parameters(), tuning_stage("stage", names, rates)):
        for name in group.names:
            found.setdefault(name.partition(".")[0], set()).add(group.rate)
    return found


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_stage_2_trains_everything_but_the_tower_and_the_codes(fields, family):
    model = tiny_model(family, **fields)
    rates = rates_of(model, STAGE_2)
    parts = {name.partition(".")[0] for name, _ in model.named_parameters()} - {"vision_tower"}
    assert rates == {part: {1e-4 if part == "language_model" else 1e-5} for part in parts}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith("vision_tower.") or name == "reducer.query_codes" for name in frozen)
    assert model.get_input_embeddings().weight.requires_grad


def test_stage_1_trains_the_projector_alone():
    assert rates_of(tiny_model(**MODELS["stage 1"]), STAGE_1) == {"projector": {1e-3}}


@pytest.mark.parametrize("prefusion", [False, True])
def test_low_rank_updates_train_and_what_they_are_added_to_does_not(prefusion):
    model = tiny_model()
    add_lora(model, LoraSettings(rank=2, prefusion=prefusion))
    rates = rates_of(model, STAGE_2)
    assert rates == {
        "projector": {1e-5},
        "reducer": {1e-5},
        "prefusion": {2e-4 if prefusion else 1e-5},
        "language_model": {2e-4},
    }
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in trained if name.startswith("language_model."))


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match="learning rate of projector is -1"):
        type(STAGE_2)(projector=-1)
