"""The sizes that benchmarks run at, and random models of them made where they run.

A weight's value changes neither what a model computes nor how long it takes, so nothing is downloaded.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers import LlamaConfig

from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.inference.memory import available_memory, check_memory, memory_need, meta_model
from llava_mini.model.cost import parameters
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

Size = Literal["tiny", "middle", "7b", "8b"]
Model = TypeVar("Model", bound=nn.Module)


def size_config(size: str, *, tokens: int = 1, hd: bool = False) -> LlavaMiniConfig:
    """LLaVA-Mini at one of the sizes.

    Args:
        size: one of ``SIZES``.
        tokens: Q, what a frame costs the language model: a square number.
        hd: five views of a frame, with twice as many pixels a side (672 instead of 336).

    Raises:
        ValueError: there is no such size, or the number of tokens is no square.
    """
    if size not in SIZES:
        raise ValueError(f"There is no size {size!r}. The sizes are: {', '.join(SIZES)}.")
    grid = round(tokens**0.5) if tokens > 0 else 0
    if tokens < 1 or grid**2 != tokens:
        raise ValueError(f"The tokens of an image form a square, so 1, 4, 16, 64 and the like; got {tokens}.")
    return changed(SIZES[size](), reducer_grid=grid, reducer_tokens=tokens, resolution_ratio=2 if hd else 1)


def changed(config: LlavaMiniConfig, **fields: object) -> LlavaMiniConfig:
    """A copy of a configuration with other values in some fields."""
    return LlavaMiniConfig.from_dict({**config.to_dict(), **fields})


def random_model(
    config: LlavaMiniConfig, device: torch.device, dtype: torch.dtype
) -> LlavaMiniForConditionalGeneration:
    """A model with random weights, made on ``device``.

    Raises:
        ValueError: it does not fit there.
    """
    need, name = memory_need(meta_model(config), dtype), f"{parameters(config).total / 1e9:.2g} billion random weights"
    check_memory(name, need, available_memory(device), f"{device} in {str(dtype).removeprefix('torch.')}", {})
    try:
        with made_on(device, dtype):
            return settled(LlavaMiniForConditionalGeneration(config), dtype)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"A model with {name} does not fit into the memory limit. Take a smaller size.") from error


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is built in this context stands on ``device`` in ``dtype`` from the start, with the same random numbers."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def settled(model: Model, dtype: torch.dtype) -> Model:
    """The model ready to be asked: no training, no gradients, all weights in one number format."""
    return model.to(dtype).eval().requires_grad_(False)


def with_parts(module: Model, **parts: nn.Module | None) -> Model:
    """A copy that has other parts under some names, and shares all others with ``module``, which stays as it is."""
    made = copy.copy(module)
    made._modules = {**module._modules, **parts}
    return made


def _middle() -> LlavaMiniConfig:
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlavaMiniConfig(text_config=text, dtype="bfloat16")


SIZES: dict[str, Callable[[], LlavaMiniConfig]] = {
    "tiny": lambda: preset("tiny"),
    "middle": _middle,
    "7b": lambda: preset("llava-mini-vicuna-7b"),
    "8b": lambda: preset("llava-mini-llama-3.1-8b"),
}
"""Configurations by size. ``middle`` is the real vision tower before a language model of 0.9 billion parameters."""


def limit_memory(gibibytes: float | None, device: torch.device) -> None:
    """Let this process use no more than so many GiB of a GPU's memory, as if it were a smaller card.

    Raises:
        ValueError: the device is no GPU, or does not have so much.
    """
    if gibibytes is None:
        return
    if device.type != "cuda":
        raise ValueError(f"A memory limit is for CUDA, but the device is {device.type}. Leave the limit out.")
    total = torch.cuda.get_device_properties(device).total_memory
    if not 0 < gibibytes * 2**30 <= total:
        raise ValueError(f"The memory limit is between 0 and the GPU's {total / 2**30:.1f} GiB, got {gibibytes:g}.")
    torch.cuda.set_per_process_memory_fraction(gibibytes * 2**30 / total, device.index)  # None: the current one
