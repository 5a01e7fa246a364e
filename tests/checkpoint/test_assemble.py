"""Models that a training starts from: what is loaded stays, and what is new is drawn with a seed."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava_mini.checkpoint.assemble import (
    NewParts,
    add_parts,
    build_generation,
    build_model,
    build_processor,
    join_parts,
    parts_config,
    read_model,
    with_parts,
)
from llava_mini.config import preset
from llava_mini.processor.processor import LlavaMiniProcessor
from tests.checkpoint.folders import FIXTURES, copy_released
from tests.tiny_engine import save_tiny
from tests.tiny_models import tiny_model
from tests.tuning_world import save_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tuple(map(str, save_parts(tmp_path_factory.mktemp("parts"))))


def test_a_stage_1_model_is_its_language_model_its_tower_and_a_projector(parts):
    language = AutoModelForCausalLM.from_pretrained(parts[0]).eval()
    model = build_model(join_parts(*parts), torch.float32).eval()
    assert (model.config.reducer, model.config.prefusion_num_layers) == ("identity", 0)
    ids = torch.tensor([[5, 9, 40, 7]])
    assert torch.equal(model(input_ids=ids).logits, language(input_ids=ids).logits)
    source = join_parts(*parts)
    assert {name.partition(".")[0] for name in source.tensors} == {"language_model", "vision_tower", "projector"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.tensors[name]), name


def test_the_projector_follows_its_seed(parts):
    weights = [join_parts(*parts, seed=seed).tensors["projector.linear_1.weight"] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_configuration_of_two_parts_needs_no_weights(parts):
    assert parts_config(*parts).to_dict() == join_parts(*parts).config.to_dict()
    vicuna = parts_config("vicuna-7b", None)
    assert vicuna.text.to_dict() == preset("llava-mini-vicuna-7b").text.to_dict()
    assert vicuna.patches_per_frame == 576


def test_new_parts_change_nothing_that_was_there_and_copy_the_first_layers(parts):
    before = join_parts(*parts)
    before.config.reducer_tokens = 5  # what is not asked for stays as well
    new = NewParts(prefusion_num_layers=2)
    after = add_parts(before, new)
    assert after.config.to_dict() == with_parts(before.config, new).to_dict()
    for name, value in before.tensors.items():
        assert after.tensors[name] is value
    for layer in range(2):
        for inner in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
            copy = after.tensors[f"prefusion.layers.{layer}.block.{inner}.weight"]
            assert torch.equal(copy, before.tensors[f"language_model.model.layers.{layer}.{inner}.weight"])


def test_random_prefusion_is_drawn_with_the_seed_and_touches_nothing_else(parts):
    before = join_parts(*parts)
    copied, one, same, other = (
        add_parts(before, new).tensors
        for new in (
            NewParts(prefusion_num_layers=2),
            *(NewParts(prefusion_num_layers=2, prefusion_start="random", seed=seed) for seed in (0, 0, 1)),
        )
    )
    drawn = "prefusion.layers.1.block.self_attn.q_proj.weight"
    assert torch.equal(one[drawn], same[drawn])
    assert not torch.equal(one[drawn], other[drawn])
    assert one[drawn].std() == pytest.approx(0.02, rel=0.2)
    differing = {name for name in copied if not torch.equal(copied[name], one[name])}
    assert differing
    assert all(name.startswith("prefusion.") for name in differing)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_random_prefusion_can_be_drawn_for_every_family(tmp_path, family):
    model = tiny_model(family)
    model.language_model.save_pretrained(tmp_path / "language")
    model.vision_tower.save_pretrained(tmp_path / "tower")
    before = join_parts(str(tmp_path / "language"), str(tmp_path / "tower"))
    drawn, copied = (
        add_parts(before, NewParts(prefusion_num_layers=2, prefusion_start=start)).tensors
        for start in ("random", "language-model")
    )
    shapes = {name: value.shape for name, value in copied.items() if name.startswith("prefusion.layers.1.")}
    assert shapes
    assert all(drawn[name].shape == shape for name, shape in shapes.items())


def test_the_copies_in_memory_share_nothing(parts):
    source = add_parts(join_parts(*parts), NewParts(prefusion_num_layers=1))
    model = build_model(source, torch.float32)
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.up_proj.weight.zero_()
    assert model.prefusion.layers[0].block.mlp.up_proj.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("own", "named", "opening"),
    [("tiny", None, "<|user|>"), ("tiny", "chatml", "<|im_start|>system"), (None, "vicuna_v1", "A chat between")],
)
def test_the_chat_template_is_the_named_one_or_the_tokenizers_own(tmp_path, own, named, opening):
    source = join_parts(*map(str, save_parts(tmp_path, template=own)))
    text = build_processor(source, named).apply_chat_template([{"role": "user", "content": "Hello"}])
    assert opening in text


def test_a_tokenizer_without_a_known_template_is_refused(tmp_path):
    source = join_parts(*map(str, save_parts(tmp_path, template=None)))
    with pytest.raises(ValueError, match="No chat template is known for a tokenizer whose end token"):
        build_processor(source)


def test_a_model_of_ours_keeps_its_processor_and_its_generation_settings(tmp_path):
    source = read_model(str(save_tiny(tmp_path / "model")))
    processor = build_processor(source)
    assert processor.chat_template == LlavaMiniProcessor.from_pretrained(source.folder).chat_template
    assert processor.tokens_per_frame == source.config.tokens_per_frame
    assert (
        build_generation(source, processor).to_dict() == build_model(source, torch.float32).generation_config.to_dict()
    )


def test_training_goes_on_with_one_begin_token_where_the_authors_asked_with_two(tmp_path):
    folder = copy_released(tmp_path / "released")
    shutil.copytree(FIXTURES / "tokenizers" / "llama3_tiny", folder, dirs_exist_ok=True)
    source = read_model(str(folder))
    assert source.layout == "released"
    processor = build_processor(source)
    assert processor.num_begin_tokens == 1
    ids = processor.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=True)
    assert ids[0].count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("nowhere", "tower"), "There is no model 'nowhere'"),
        (("language", None), "A language model alone does not see"),
        (("tower", "tower"), "not a Llama-like language model"),
        (("language", "language"), "holds a model of the type|no vision tower|missing"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, names, message):
    places = {"language": parts[0], "tower": parts[1]}
    with pytest.raises(ValueError, match=message):
        join_parts(*(places.get(name, name) for name in names))


def test_parts_are_not_added_twice(parts):
    source = add_parts(join_parts(*parts), NewParts(prefusion_num_layers=1))
    with pytest.raises(ValueError, match="has the reducer 'query' and 1 pre-fusion layers already"):
        add_parts(source, NewParts())
    with pytest.raises(ValueError, match="starts from language-model or random, got 'zeros'"):
        add_parts(join_parts(*parts), replace(NewParts(), prefusion_start="zeros"))
