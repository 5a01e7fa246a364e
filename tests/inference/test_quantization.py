"""8-bit weights: which library, which weights, and what is said where it cannot be."""

import pytest
import torch

from llava_mini.inference import quantization
from llava_mini.inference.engine import Engine
from llava_mini.inference.quantization import KEPT, quantization_config, quantized_weights
from tests.tiny_engine import save_tiny
from tests.tiny_models import tiny_model


def test_only_the_layers_of_the_language_model_are_quantized():
    names = quantized_weights(tiny_model())
    assert len(names) == 3 * 7
    assert all(name.startswith("language_model.model.layers.") for name in names)


def test_a_cpu_takes_torchao_and_cuda_bitsandbytes(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda library: library)
    cpu, cuda = (quantization_config("int8", torch.device(kind)) for kind in ("cpu", "cuda"))
    assert cpu.quant_method == "torchao"
    assert cpu.modules_to_not_convert == list(KEPT)
    assert cuda.quant_method == "bitsandbytes"
    assert cuda.load_in_8bit
    assert cuda.llm_int8_skip_modules == list(KEPT)


@pytest.mark.parametrize(
    ("device", "message"), [("cpu", r"torchao.*llava-mini\[quantize\]"), ("cuda", r"bitsandbytes.*\[quantize-cuda\]")]
)
def test_a_missing_library_is_named_with_the_extra_that_has_it(monkeypatch, device, message):
    monkeypatch.setattr(quantization, "find_spec", lambda library: None)
    with pytest.raises(ValueError, match=message):
        quantization_config("int8", torch.device(device))


def test_a_device_without_8_bits_is_refused():
    with pytest.raises(ValueError, match="runs on cpu and cuda, not on mps"):
        quantization_config("int8", torch.device("mps"))


def test_8_bits_on_a_cpu_need_no_accelerate(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda *_: False)
    engine = Engine.load(str(save_tiny(tmp_path / "tiny")), device="cpu", quantization="int8")
    assert engine.ask("what?", max_tokens=2).stats.answer_tokens == 2
