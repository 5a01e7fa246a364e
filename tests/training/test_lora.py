"""Low-rank updates: they start as nothing, and come back from disk as they were, merged or not."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from llava_mini.checkpoint.convert import convert
from llava_mini.inference.quantization import KEPT
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.training import lora
from llava_mini.training.lora import LoraSettings, add_lora, four_bit_config, save_lora
from tests.tiny_engine import save_tiny
from tests.tiny_models import batch, pixels, prompt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


def load(folder):
    return LlavaMiniForConditionalGeneration.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model):
    image = model.config.image_token_id
    ids = [image if token == 64 else token for token in prompt(model.config, [5, 6], 2, [7, 8, 9])]
    return model(**batch([ids]), pixel_values=pixels(model.config, 2)).logits


def tuned(base, settings):
    """A model whose updates and full parts have moved."""
    model = load(base)
    add_lora(model, settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or name.startswith(("projector.", "reducer.q")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()  # the dropout of updates comes switched on


def test_fresh_updates_change_nothing(base):
    model = load(base)
    before = logits(model)
    add_lora(model, LoraSettings(rank=2, prefusion=True))
    assert isinstance(model, LlavaMiniForConditionalGeneration)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("prefusion", [False, True])
def test_saved_updates_give_equal_logits_under_peft_and_merged(base, tmp_path, prefusion):
    settings = LoraSettings(rank=2, alpha=6.0, prefusion=prefusion)
    model = tuned(base, settings)
    expected = logits(model)
    assert (expected - logits(load(base))).abs().max() > 0.1
    save_lora(model, settings, tmp_path / "adapter", str(base), model.state_dict())
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    convert(tmp_path / "adapter", tmp_path / "merged", base=base)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


def test_the_adapter_holds_no_weights_of_the_language_model(base, tmp_path):
    settings = LoraSettings(rank=2)
    model = tuned(base, settings)
    save_lora(model, settings, tmp_path, str(base), model.state_dict())
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    of_language = [name for name in names if ".language_model." in name]
    assert len(of_language) == 3 * 7 * 2
    assert all(".lora_" in name for name in of_language)
    assert {name.split(".")[2] for name in names} == {"language_model", "projector", "reducer", "prefusion"}


def test_an_adapter_trained_on_4_bits_belongs_to_16(base, tmp_path):
    model = tuned(base, LoraSettings(rank=2))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    save_lora(model, LoraSettings(rank=2), tmp_path, str(base), model.state_dict())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert hasattr(model.config, "quantization_config")


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"rank": 0}, "rank of low-rank updates is 0"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        LoraSettings(**fields)


def test_a_missing_library_is_named_with_the_extra_that_has_it(base, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llava-mini\[peft\]"):
        add_lora(load(base), LoraSettings())
    with pytest.raises(ValueError, match=r"llava-mini\[quantize-cuda\]"):
        four_bit_config()


def test_four_bits_are_for_the_layers_of_the_language_model_alone(monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: name)
    monkeypatch.setattr("transformers.BitsAndBytesConfig.post_init", lambda self: None)  # asks for bitsandbytes
    config = four_bit_config()
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.llm_int8_skip_modules == list(KEPT)
