"""How published weights were run: what the processor has to know that their configurations do not say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_mini.config import RELEASED_MODEL_TYPE


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How prompts of a family of language models are written."""

    template: str
    """Chat template, by name."""
    num_begin_tokens: int
    """Begin-of-text tokens with which LLaVA-Mini's authors ran it."""


_LLAMA_3_1 = Backbone(template="llama_3_1", num_begin_tokens=2)

BACKBONES: dict[str, Backbone] = {
    "<|eot_id|>": _LLAMA_3_1,
    "<|end_of_text|>": _LLAMA_3_1,
    "</s>": Backbone(template="vicuna_v1", num_begin_tokens=1),
}
"""Backbones by the end token of their tokenizer: Llama 3.1 and Vicuna."""


def published_settings(published: Mapping[str, Any], end_token: str | None) -> dict[str, Any]:
    """Arguments of ``LlavaMiniProcessor.from_config`` for published weights.

    Args:
        published: their configuration, of LLaVA-Mini or LLaVA-1.5.
        end_token: of their tokenizer.

    Raises:
        ValueError: no backbone is known by this end token.
    """
    if end_token not in BACKBONES:
        raise ValueError(
            f"No chat template is known for a tokenizer whose end token is {end_token!r}; the known ones are "
            f"{', '.join(BACKBONES)}. Make a processor with LlavaMiniProcessor.from_config, which takes a template."
        )
    backbone, is_mini = BACKBONES[end_token], published.get("model_type") == RELEASED_MODEL_TYPE
    return {
        "template": backbone.template,
        "image_mode": "pad" if published.get("image_aspect_ratio") == "pad" else "center_crop",
        "frame_resize": "nearest" if is_mini else "image_mode",
        "num_begin_tokens": backbone.num_begin_tokens if is_mini else 1,
    }
