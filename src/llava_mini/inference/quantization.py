"""8-bit weights, through transformers: torchao on a CPU, bitsandbytes on CUDA.

Only the linear layers of the language model become 8-bit. What makes the few vision tokens keeps
its 16 bits, and so does the head: little memory, and every answer depends on it.
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

METHODS = ("int8",)
"""Kinds of quantization by name."""

KEPT = ("vision_tower", "projector", "reducer", "prefusion", "language_model.lm_head")
"""Modules that are not quantized."""


def quantization_config(name: str, device: torch.device) -> TorchAoConfig | BitsAndBytesConfig:
    """What ``from_pretrained`` needs to quantize while it loads.

    Raises:
        ValueError: there is no such method, none for this device, or its library is not installed.
    """
    if name not in METHODS:
        raise ValueError(f"There is no quantization {name!r}. The quantizations are {', '.join(METHODS)}.")
    if device.type == "cpu":
        _require("torchao", extra="quantize")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=list(KEPT))
    if device.type == "cuda":
        _require("bitsandbytes", extra="quantize-cuda")
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    raise ValueError(
        f"Quantization {name!r} runs on cpu and cuda, not on {device.type}. Leave it out, or change device."
    )


def quantized_weights(model: LlavaMiniForConditionalGeneration) -> set[str]:
    """Names of the weights that are, or would be, 8-bit."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == kept or name.startswith(f"{kept}.") for kept in KEPT)
    }


def _require(library: str, *, extra: str) -> None:
    if find_spec(library) is None:
        raise ValueError(f"8-bit weights need {library}, which is not installed: pip install 'llava-mini[{extra}]'.")
