"""Small random models and inputs for tests: every size as small as the property allows."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

VOCABULARY = 64
IMAGE_TOKEN = VOCABULARY


def tiny_config(family: str = "llama", text: dict[str, Any] | None = None, **fields: Any) -> LlavaMiniConfig:
    """A configuration with 16 patches, language width 32 and two pre-fusion layers."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=2
    )
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        **(text or {}),
    }
    text_config = AutoConfig.for_model(family, **sizes)
    return LlavaMiniConfig(**{"vision_config": vision, "text_config": text_config, "prefusion_num_layers": 2, **fields})


def tiny_model(family: str = "llama", seed: int = 0, **fields: Any) -> LlavaMiniForConditionalGeneration:
    """A model with weights large enough that every mistake shows."""
    torch.manual_seed(seed)
    model = LlavaMiniForConditionalGeneration(tiny_config(family, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "query_codes" not in name:
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5 * 2)
    return model


def pixels(config: LlavaMiniConfig, num_frames: int, seed: int = 0) -> Tensor:
    """[F, V, 3, H, W]."""
    shape = (num_frames, config.views_per_frame, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients_of(model: LlavaMiniForConditionalGeneration, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of the loss of a batch, by parameter; ids below 9 have labels."""
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] >= 9, -100)).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def prompt(config: LlavaMiniConfig, *parts: list[int] | int) -> list[int]:
    """Ids: a list is text, a number is an image or video of so many frames."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE_TOKEN] * (part * config.tokens_per_frame) if isinstance(part, int) else part
    return ids


def batch(prompts: list[list[int]], side: str = "right") -> dict[str, Tensor]:
    """input_ids and attention_mask, padded."""
    longest = max(map(len, prompts))
    ids, mask = [], []
    for one in prompts:
        padding = longest - len(one)
        before, after = (padding, 0) if side == "left" else (0, padding)
        ids.append([3] * before + one + [3] * after)
        mask.append([0] * before + [1] * len(one) + [0] * after)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
