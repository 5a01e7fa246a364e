"""Low-rank updates through PEFT: the language model, and by choice pre-fusion; the other parts train in full.

The updates are put into the model itself, which stays a ``LlavaMiniForConditionalGeneration`` with the same names, so
that stages, sharding and ``fuse`` know no difference. They are saved in PEFT's own layout, together with the parts that
trained in full: ``PeftModel.from_pretrained`` loads it, and ``llava-mini convert ADAPTER DST --base MODEL`` merges it.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from llava_mini.inference.quantization import KEPT
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

if TYPE_CHECKING:
    from peft import LoraConfig

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a decoder layer, all of which get updates."""
FULL_PARTS = ("projector", "reducer", "prefusion")
"""Parts that train in full unless they have updates; with an adapter they are saved whole."""

_PEFT_PREFIX = "base_model.model."
_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """How low-rank updates are made. The defaults are those of LLaVA-1.5's recipe."""

    rank: int = 128
    alpha: float = 256.0
    """An update is multiplied by alpha / rank."""
    dropout: float = 0.05
    prefusion: bool = False
    """Whether pre-fusion gets updates too, instead of training in full."""
    four_bit: bool = False
    """QLoRA: the language model's frozen matrices in 4 bits, by bitsandbytes on CUDA."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"The rank of low-rank updates is {self.rank}; it must be 1 or more.")
        if not self.alpha > 0:
            raise ValueError(f"The alpha of low-rank updates is {self.alpha}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"The dropout of low-rank updates is {self.dropout}; it must lie between 0 and 1.")


def add_lora(model: LlavaMiniForConditionalGeneration, settings: LoraSettings) -> None:
    """Put fresh updates, which change nothing yet, into a model. Works on the meta device too.

    Args:
        model: Is changed in place.
        settings: Which updates.

    Raises:
        ValueError: PEFT is not installed, or pre-fusion is to get updates and the model has none.
    """
    if settings.prefusion and model.prefusion is None:
        raise ValueError("Low-rank updates of pre-fusion were asked for, but this model has no pre-fusion.")
    peft = _peft()
    peft.inject_adapter_in_model(_config(settings), model, _ADAPTER, low_cpu_mem_usage=_is_meta(model))
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.device.type != "meta":
            parameter.data = parameter.data.to(next(model.projector.parameters()).dtype)


def save_lora(
    model: LlavaMiniForConditionalGeneration,
    settings: LoraSettings,
    folder: Path,
    base: str,
    tensors: Mapping[str, Tensor],
) -> None:
    """Save the updates and all parts that trained in full, in PEFT's layout, with the model's configuration.

    Args:
        model: Tells the names of parts.
        settings: With which the updates were made.
        folder: Is made if it is missing.
        base: What the updates belong to, for PEFT's configuration.
        tensors: The state of the model, whole tensors under its names; those of the language model and the vision tower
            that are no updates are not read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        f"{_PEFT_PREFIX}{name.replace(f'.{_ADAPTER}.', '.').replace('.base_layer.', '.')}": tensor
        for name, tensor in tensors.items()
        if ".lora_" in name or name.startswith(tuple(f"{part}." for part in FULL_PARTS))
    }
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in stored.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _config(settings)
    config.modules_to_save = [part for part in FULL_PARTS if part not in _parts(settings) and _has(model, part)]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    whole = deepcopy(model.config)
    vars(whole).pop("quantization_config", None)  # updates belong to weights of 16 bits, whatever they were trained on
    whole.save_pretrained(folder)


def four_bit_config() -> BitsAndBytesConfig:
    """Return what ``from_pretrained`` needs for QLoRA: the language model's matrices in 4 bits, all else in 16.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "4-bit weights need bitsandbytes, which is not installed: pip install 'llava-mini[quantize-cuda]'."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(KEPT),
    )


def _config(settings: LoraSettings) -> "LoraConfig":
    """PEFT's configuration of the updates."""
    return _peft().LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=rf"({'|'.join(_parts(settings))})\..*\.({'|'.join(MATRICES)})",
    )


def _parts(settings: LoraSettings) -> tuple[str, ...]:
    """Parts with updates."""
    return ("language_model", "prefusion") if settings.prefusion else ("language_model",)


def _has(model: LlavaMiniForConditionalGeneration, part: str) -> bool:
    module = getattr(model, part)
    return module is not None and any(True for _ in module.parameters())


def _is_meta(model: LlavaMiniForConditionalGeneration) -> bool:
    return next(model.projector.parameters()).device.type == "meta"


def _peft() -> Any:
    """Import PEFT, a guest.

    Raises:
        ValueError: It is not installed.
    """
    if find_spec("peft") is None:
        raise ValueError("Low-rank updates need PEFT, which is not installed: pip install 'llava-mini[peft]'.")
    import peft

    return peft
