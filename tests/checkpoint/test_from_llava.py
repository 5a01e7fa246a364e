"""LLaVA-1.5, as transformers and as its authors publish it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.checkpoint.convert import convert
from llava_mini.flow import ModelInputs
from llava_mini.model.reducers import REDUCERS
from llava_mini.reducer_settings import REDUCER_SETTINGS
from tests.checkpoint.folders import assert_same_tensors, edit_json, stored_tensors, write_tensors

IMAGE_TOKEN = 60
TRAINING_FREE = {"prumerge": None, "prumerge_plus": None, "visionzip": 9, "divprune": 5}
"""Reducers without weights, and how many tokens they are asked for."""


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    """A small LLaVA-1.5 of transformers, whose image token is inside the vocabulary."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1 / parameter.shape[-1] ** 0.5)
    return model


def transformers_folder(model: LlavaForConditionalGeneration, folder: Path, layout: str) -> Path:
    """The folder that transformers saves ("saved"), or one with the names in memory ("today")."""
    model.save_pretrained(folder, save_original_format=layout == "saved")
    return folder


def original_folder(model: LlavaForConditionalGeneration, folder: Path, *, tower: bool) -> Path:
    """The folder that LLaVA's authors would publish."""
    folder.mkdir()
    names = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        theirs, original = next(pair for pair in names.items() if name.startswith(pair[0]))
        if tower or theirs != "model.vision_tower.":
            tensors[original + name.removeprefix(theirs)] = tensor
    write_tensors(folder, tensors)
    text = model.config.get_text_config().to_dict()
    config = {
        **{key: value for key, value in text.items() if key not in {"model_type", "rope_parameters", "architectures"}},
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip",
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    clip: Any = model.model.vision_tower
    clip.save_pretrained(folder.parent / "clip")
    return folder


def logits_of_both(
    theirs: LlavaForConditionalGeneration, ours: LlavaMiniForConditionalGeneration
) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 7, *[IMAGE_TOKEN] * 16, 9], [1, *[IMAGE_TOKEN] * 16, 9, 8]])
    expected = theirs(input_ids=ids, pixel_values=pixels).logits
    places = torch.where(ids == IMAGE_TOKEN, torch.tensor(ours.config.image_token_id), ids)
    return ours(places, pixels[:, None]).logits, expected


SOURCES = ["transformers saved", "transformers today", "original with tower", "original without tower"]


def make(source: str, llava: LlavaForConditionalGeneration, folder: Path) -> Path:
    publisher, _, kind = source.partition(" ")
    if publisher == "transformers":
        return transformers_folder(llava, folder, kind)
    return original_folder(llava, folder, tower=kind == "with tower")


@pytest.mark.parametrize("source", SOURCES)
def test_it_becomes_a_model_with_identity_and_without_prefusion_and_computes_the_same(tmp_path, llava, source):
    convert(make(source, llava, tmp_path / "llava"), tmp_path / "ours")
    ours = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert (ours.config.reducer, ours.config.prefusion_num_layers) == ("identity", 0)
    assert ours.config.image_token_id == 64
    assert len(stored_tensors(tmp_path / "ours")) == len(llava.state_dict())
    found, expected = logits_of_both(llava, ours)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_names_of_older_transformers_are_known(tmp_path, llava):
    transformers_folder(llava, tmp_path / "llava", "saved")
    names = list(stored_tensors(tmp_path / "llava"))
    assert any(name.startswith("language_model.model.layers.") for name in names)
    old = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value
        for name, value in stored_tensors(tmp_path / "llava").items()
    }
    shutil.copytree(tmp_path / "llava", tmp_path / "old")
    write_tensors(tmp_path / "old", old)
    convert(tmp_path / "llava", tmp_path / "ours")
    convert(tmp_path / "old", tmp_path / "ours of old")
    assert_same_tensors(stored_tensors(tmp_path / "ours of old"), stored_tensors(tmp_path / "ours"))


def test_a_new_llava_mini_starts_from_the_first_layers_of_the_language_model(tmp_path, llava):
    transformers_folder(llava, tmp_path / "llava", "saved")
    for name in ("mini", "again"):
        convert(tmp_path / "llava", tmp_path / name, reducer="query", reducer_grid=2, prefusion_num_layers=2)
    assert_same_tensors(stored_tensors(tmp_path / "again"), stored_tensors(tmp_path / "mini"))
    mini = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "mini")
    assert (mini.config.reducer, mini.config.tokens_per_frame, mini.config.position_codes) == ("query", 4, "patch_grid")
    assert mini.prefusion is not None
    assert len(mini.prefusion.layers) == 2
    copies: Any = mini.prefusion.layers
    originals: Any = llava.model.language_model.layers
    for copy, original in zip(copies, originals, strict=False):
        assert_same_tensors(copy.block.state_dict(), original.state_dict())
    stored = stored_tensors(tmp_path / "mini")
    codes = stored["reducer.query_codes"]
    assert codes.abs().max() <= 1
    assert not torch.equal(codes[0], codes[1])
    assert 0.01 < float(stored["reducer.queries"].std()) < 0.03
    assert torch.equal(stored["reducer.query_norm.weight"], torch.ones(16))


TRAINED = sorted(set(REDUCERS) - {"identity", "average_pool", "m3", "fastv", *TRAINING_FREE})


@pytest.mark.parametrize("reducer", TRAINED)
def test_every_reducer_starts_with_the_weights_of_any_new_model(tmp_path, llava, reducer):
    transformers_folder(llava, tmp_path / "llava", "saved")
    reads_tokens = REDUCER_SETTINGS[reducer].most_tokens is not None
    fields = {"reducer_grid": 2, **({"reducer_tokens": 3} if reads_tokens else {})}
    convert(tmp_path / "llava", tmp_path / "new", reducer=reducer, prefusion_num_layers=0, **fields)
    started = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "new")
    any_new = LlavaMiniForConditionalGeneration(started.config)
    for name, tensor in any_new.reducer.state_dict().items():
        found = started.reducer.state_dict()[name]
        assert found.shape == tensor.shape, name
        assert float(found.std()) == pytest.approx(float(tensor.std()), rel=0.5, abs=0.01), name
        assert float(found.mean()) == pytest.approx(float(tensor.mean()), abs=0.05), name
    assert (started.config.reducer_grid, started.config.reducer_tokens) == (2, 3 if reads_tokens else 16)


def test_a_model_without_reduction_can_be_given_prefusion(tmp_path, llava):
    transformers_folder(llava, tmp_path / "llava", "saved")
    convert(tmp_path / "llava", tmp_path / "ours", prefusion_num_layers=1)
    ours = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert (ours.config.reducer, ours.config.prefusion_num_layers) == ("identity", 1)


@pytest.mark.parametrize(("reducer", "tokens"), TRAINING_FREE.items())
@torch.inference_mode()
def test_a_method_without_training_changes_the_configuration_alone(tmp_path, llava, reducer, tokens):
    transformers_folder(llava, tmp_path / "llava", "saved")
    convert(tmp_path / "llava", tmp_path / "ours")
    convert(tmp_path / "llava", tmp_path / "method", reducer=reducer, reducer_tokens=tokens)
    assert_same_tensors(stored_tensors(tmp_path / "method"), stored_tensors(tmp_path / "ours"))
    fields = LlavaMiniConfig.from_pretrained(tmp_path / "ours").to_dict()
    changed = LlavaMiniConfig(**{**fields, "reducer": reducer, **({"reducer_tokens": tokens} if tokens else {})})
    models = (
        LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "method"),
        LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours", config=changed),
    )
    pixels = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 7, *[64] * changed.tokens_per_frame, 9], [1, *[64] * changed.tokens_per_frame, 9, 8]])
    fused, again = (model.fuse(ModelInputs(input_ids=ids, pixel_values=pixels)) for model in models)
    assert torch.equal(fused.inputs_embeds, again.inputs_embeds)
    assert fused.inputs_embeds.shape[1] < 3 + 16 if tokens else fused.inputs_embeds.shape[1] <= ids.shape[1]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"reducer": "divprune", "reducer_tokens": 17}, "'divprune' makes at most 16 tokens"),
        ({"reducer": "query", "reducer_tokens": 5}, "the reducer 'query' does not read it: a frame takes 1"),
        ({"reducer_tokens": 5}, "reducer_tokens is 5, but no reducer is named"),
        ({"reducer": "prumerge", "prefusion_num_layers": 2}, "'prumerge' .* Set prefusion_num_layers=0"),
        ({"reducer": "prune"}, "is one of identity, .* got 'prune'"),
    ],
)
def test_a_new_model_that_cannot_be_is_refused(tmp_path, llava, fields, told):
    transformers_folder(llava, tmp_path / "llava", "saved")
    with pytest.raises(ValueError, match=told):
        convert(tmp_path / "llava", tmp_path / "ours", **fields)
    assert not (tmp_path / "ours").exists()


def test_a_new_start_from_what_has_started_already_is_refused(tmp_path, llava):
    transformers_folder(llava, tmp_path / "llava", "saved")
    with pytest.raises(ValueError, match="first 4 layers of a language model that has 3"):
        convert(tmp_path / "llava", tmp_path / "mini", reducer="query", prefusion_num_layers=4)
    convert(tmp_path / "llava", tmp_path / "mini", reducer="query", prefusion_num_layers=2)
    with pytest.raises(ValueError, match="has the reducer 'query' and 2 pre-fusion layers already"):
        convert(tmp_path / "mini", tmp_path / "again", reducer="average_pool")


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("transformers saved", {"vision_feature_layer": -1}),
        ("transformers saved", {"projector_hidden_act": "relu"}),
        ("transformers saved", {"vision_config": {"model_type": "siglip_vision_model"}}),
        ("original with tower", {"mm_patch_merge_type": "spatial_unpad"}),
        ("original with tower", {"mm_projector_type": "linear"}),
        ("original with tower", {"mm_vision_tower": "someone/other-tower"}),
    ],
)
def test_another_llava_is_refused(tmp_path, llava, source, changed):
    folder = make(source, llava, tmp_path / "llava")
    edit_json(folder / "config.json", **changed)
    value: Any = next(iter(changed.values()))
    with pytest.raises(ValueError, match=value["model_type"] if isinstance(value, dict) else str(value)):
        convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
