"""What stands beside the weights: tokenizer, processor and generation settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from llava_mini import LlavaMiniProcessor
from llava_mini.checkpoint.convert import convert
from llava_mini.checkpoint.export import export
from tests.checkpoint.folders import FIXTURES, copy_released, edit_json, stored_tensors
from tests.checkpoint.test_convert import assert_same_files
from tests.tiny_models import tiny_model

BACKBONES = {"llama_c1": ("llama3_tiny", 2, 521), "vicuna_c2": ("vicuna_tiny", 1, 2)}


def with_tokenizer(folder: Path, model: str = "llama_c1") -> Path:
    """A released folder as it is published: weights, configuration and tokenizer."""
    copy_released(folder, source=FIXTURES / "models" / model)
    for file in (FIXTURES / "tokenizers" / BACKBONES[model][0]).iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.parametrize("model", BACKBONES)
def test_a_converted_model_has_the_processor_that_it_was_published_for(tmp_path, model):
    convert(with_tokenizer(tmp_path / "model", model), tmp_path / "ours")
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(processor) is LlavaMiniProcessor
    _, num_begin_tokens, stop = BACKBONES[model]
    assert processor.num_begin_tokens == num_begin_tokens
    assert (processor.image_mode, processor.frame_resize) == ("center_crop", "nearest")
    begin = processor.tokenizer.bos_token_id
    ids = list(processor(text="What is it?")["input_ids"][0])
    assert ids.count(begin) == num_begin_tokens
    assert GenerationConfig.from_pretrained(tmp_path / "ours").eos_token_id == [stop]


@pytest.mark.parametrize("model", BACKBONES)
@pytest.mark.parametrize("cls", [AutoProcessor, LlavaMiniProcessor])
def test_a_released_folder_gives_the_processor_that_its_conversion_has(tmp_path, model, cls):
    folder = with_tokenizer(tmp_path / "model", model)
    convert(folder, tmp_path / "ours")
    released: Any = cls.from_pretrained(folder)
    released.save_pretrained(tmp_path / "processor")
    assert len(list((tmp_path / "processor").iterdir())) >= 4
    for file in (tmp_path / "processor").iterdir():
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes()


def test_a_folder_without_processor_or_tokenizer_says_what_to_do(tmp_path):
    tiny_model().save_pretrained(tmp_path / "ours")
    for folder in (copy_released(tmp_path / "model"), tmp_path / "ours"):
        with pytest.raises(ValueError, match=r"holds no processor_config.json.*LlavaMiniProcessor.from_config"):
            LlavaMiniProcessor.from_pretrained(folder)


def test_the_padding_of_a_released_config_is_kept(tmp_path):
    folder = with_tokenizer(tmp_path / "model")
    edit_json(folder / "config.json", image_aspect_ratio="pad")
    convert(folder, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "processor_config.json").read_text())["image_mode"] == "pad"


def test_a_tokenizer_without_a_known_template_is_refused(tmp_path):
    folder = with_tokenizer(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", eos_token="<|eom_id|>")
    with pytest.raises(ValueError, match=r"end token is '<\|eom_id\|>'.*the known ones are <\|eot_id\|>"):
        convert(folder, tmp_path / "ours")


def test_converting_twice_changes_no_file(tmp_path):
    convert(with_tokenizer(tmp_path / "model"), tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    assert len(list((tmp_path / "once").iterdir())) >= 6
    assert_same_files(tmp_path / "once", tmp_path / "twice")


def test_a_new_reducer_changes_the_tokens_per_frame_of_the_processor(tmp_path):
    model = tiny_model(reducer="identity", prefusion_num_layers=0)
    model.save_pretrained(tmp_path / "llava")
    settings = {"tokens_per_frame": 16, "image_token_id": 64, "image_size": 8}
    (tmp_path / "llava" / "processor_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "llava", tmp_path / "mini", reducer="query", prefusion_num_layers=2)
    written = json.loads((tmp_path / "mini" / "processor_config.json").read_text())
    assert written == {**settings, "tokens_per_frame": 1}


def test_export_gives_both_parts_the_tokenizer_and_convert_brings_it_back(tmp_path):
    convert(with_tokenizer(tmp_path / "model"), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "parts")
    plain = AutoTokenizer.from_pretrained(tmp_path / "parts" / "language_model")
    assert plain("What is it?").input_ids == AutoTokenizer.from_pretrained(tmp_path / "ours")("What is it?").input_ids
    assert not (tmp_path / "parts" / "language_model" / "processor_config.json").exists()
    assert GenerationConfig.from_pretrained(tmp_path / "parts" / "language_model").eos_token_id == [521]
    convert(tmp_path / "parts", tmp_path / "joined")
    assert stored_tensors(tmp_path / "joined").keys() == stored_tensors(tmp_path / "ours").keys()
    names = [
        path.name for path in (tmp_path / "ours").iterdir() if path.name not in {"config.json", "model.safetensors"}
    ]
    assert len(names) >= 5
    for name in names:
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
