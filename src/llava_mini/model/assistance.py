"""Drafts of an answer, which transformers makes by other means than the model itself."""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig


def refuse_assistance(arguments: Mapping[str, Any], default: GenerationConfig | None) -> None:
    """Refuse what transformers cannot do exactly with embedded prompts.

    Raises:
        ValueError: drafts by another model or by look-up are asked for.
    """
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        sources = (arguments, *(vars(one) for one in (arguments.get("generation_config"), default) if one is not None))
        if any(source.get(name) is not None for source in sources):
            raise ValueError(
                f"generate() was given {name}. transformers' assisted decoding does not start from embeddings, as "
                "every prompt here does, and would change answers. Leave it out."
            )
