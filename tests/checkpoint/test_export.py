"""``export``: a plain language model and a front end, which together are the model again."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava_mini import LlavaMiniForConditionalGeneration, ModelInputs
from llava_mini.checkpoint.convert import convert
from llava_mini.checkpoint.export import export
from tests.checkpoint.folders import RELEASED, assert_same_tensors, stored_tensors
from tests.tiny_models import pixels, tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_two_parts_are_the_model_again(tmp_path, family, tied):
    model = tiny_model(family, text={"tie_word_embeddings": tied})
    export(model, tmp_path / "parts")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["front_end", "language_model"]
    convert(tmp_path / "parts", tmp_path / "joined")
    again = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "joined")
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert again.config.text.to_diff_dict() == {
        **model.config.text.to_diff_dict(),
        **{key: value for key, value in again.config.text.to_diff_dict().items() if key in {"_name_or_path", "dtype"}},
    }


def test_a_folder_is_exported_in_any_layout(tmp_path):
    export(RELEASED, tmp_path / "parts", max_shard_size="300KB")
    assert len(list((tmp_path / "parts" / "front_end").glob("model-*.safetensors"))) >= 2
    convert(tmp_path / "parts", tmp_path / "joined")
    expected = LlavaMiniForConditionalGeneration.from_pretrained(RELEASED)
    assert_same_tensors(stored_tensors(tmp_path / "joined"), expected.state_dict())


def test_the_language_model_is_plain_and_continues_prompts_of_the_front_end(tmp_path):
    model = tiny_model(text={"eos_token_id": None})
    export(model, tmp_path / "parts")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "language_model")
    assert type(plain).__module__.startswith("transformers.")
    assert json.loads((tmp_path / "parts" / "language_model" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert_same_tensors(plain.state_dict(), model.language_model.state_dict())
    ids = torch.tensor([[1, model.config.image_token_id, 5, 6]])
    frames = pixels(model.config, 1)
    fused = model.fuse(ModelInputs(input_ids=ids, pixel_values=frames))
    expected = model.generate(ids, frames, max_new_tokens=8, do_sample=False)
    answer = plain.generate(inputs_embeds=fused.inputs_embeds, max_new_tokens=8, do_sample=False)
    assert expected[0, 4:].tolist() == answer[0].tolist()


def test_the_front_end_has_its_own_tensors_and_the_embedding_table(tmp_path):
    model = tiny_model()
    export(model, tmp_path / "parts")
    embeddings = "language_model.model.embed_tokens.weight"
    assert_same_tensors(
        stored_tensors(tmp_path / "parts" / "front_end"),
        {k: v for k, v in model.state_dict().items() if not k.startswith("language_model.") or k == embeddings},
    )


def test_a_model_with_bfloat16_language_keeps_its_dtypes(tmp_path):
    model = tiny_model()
    model.language_model.bfloat16()
    export(model, tmp_path / "parts")
    convert(tmp_path / "parts", tmp_path / "joined")
    assert_same_tensors(stored_tensors(tmp_path / "joined"), model.state_dict())


def test_an_existing_destination_is_refused(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        export(RELEASED, tmp_path)


def test_a_model_whose_reducer_acts_inside_the_language_model_is_refused(tmp_path):
    model = tiny_model(reducer="fastv", prefusion_num_layers=0)
    with pytest.raises(ValueError, match="'fastv' acts inside the language model"):
        export(model, tmp_path / "parts")
