"""How published weights were run: what the processor has to know that their configurations do not say."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from llava_mini.config import RELEASED_MODEL_TYPE, LlavaMiniConfig


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How prompts of a family of language models are written."""

    template: str
    """Chat template, by name."""
    num_begin_tokens: int
    """Begin-of-text tokens with which LLaVA-Mini's authors ran it; 1 for those that they did not."""


_LLAMA_3_1 = Backbone(template="llama_3_1", num_begin_tokens=2)

BACKBONES: dict[str, Backbone] = {
    "<|eot_id|>": _LLAMA_3_1,
    "<|end_of_text|>": _LLAMA_3_1,
    "</s>": Backbone(template="vicuna_v1", num_begin_tokens=1),
    "<|im_end|>": Backbone(template="chatml", num_begin_tokens=1),
}
"""Backbones by the end token of their tokenizer: Llama 3.1, Vicuna, and the chat models of Qwen and SmolLM2."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""Any of these makes a folder one of a tokenizer."""


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


def read_published(
    name: str | os.PathLike[str], **hub_arguments: Any
) -> tuple[LlavaMiniConfig, PreTrainedTokenizerBase, dict[str, Any]] | None:
    """What a released model, which comes without a processor, says about it. None: ``name`` has a processor.

    Args:
        name: a folder, or a repository on the hub.
        **hub_arguments: as in transformers.

    Returns:
        Configuration, tokenizer, and arguments of ``LlavaMiniProcessor.from_config``.

    Raises:
        ValueError: there is neither a processor nor a released model with a tokenizer.
    """

    def has(file: str) -> bool:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub_arguments) is not None

    if has("processor_config.json"):
        return None
    published = PreTrainedConfig.get_config_dict(name, **hub_arguments)[0] if has("config.json") else {}
    if published.get("model_type") != RELEASED_MODEL_TYPE or not any(has(file) for file in TOKENIZER_FILES):
        raise ValueError(
            f"{str(name)!r} holds no processor_config.json, and is no released model with its tokenizer either. Save a "
            "processor there: LlavaMiniProcessor.from_config(config, tokenizer, template).save_pretrained(folder)."
        )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **hub_arguments)
    config = LlavaMiniConfig.from_pretrained(name, **hub_arguments)
    end_token = tokenizer.eos_token
    return config, tokenizer, published_settings(published, end_token if isinstance(end_token, str) else None)


def require_tokenizer(name: str | os.PathLike[str]) -> None:
    """Refuse a folder without a tokenizer; a name on the hub is looked at when it is fetched.

    Raises:
        ValueError: none of the files is there.
    """
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). Copy its files there from "
            "where the model came."
        )
