"""Prompts into batches and out of them again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_mini.flow import FusedPrompt, ModelInputs
from llava_mini.inference.prompt_cache import PromptKey


@dataclass(frozen=True, kw_only=True)
class KeyedPrompt:
    """One prompt before the language model."""

    fused: FusedPrompt
    key: PromptKey | None
    """Under which the language model's keys and values are kept. None: they are not."""


def joined(inputs: Sequence[ModelInputs]) -> ModelInputs:
    """Put prompts into one batch, padded on the right."""
    if len(inputs) == 1:
        return inputs[0]

    def padded(name: str) -> Tensor:
        rows = [getattr(one, name)[0] for one in inputs]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return replace(
        inputs[0],
        input_ids=padded("input_ids"),
        attention_mask=padded("attention_mask"),
        answer_mask=padded("answer_mask"),
    )


def left_padded(prompts: Sequence[FusedPrompt]) -> FusedPrompt:
    """Put single prompts into one batch, padded on the left."""

    def padded(name: str) -> Tensor:
        rows = [getattr(prompt, name)[0].flip(0) for prompt in prompts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).flip(1)

    return FusedPrompt(
        inputs_embeds=padded("inputs_embeds"),
        attention_mask=padded("attention_mask"),
        input_ids=padded("input_ids"),
        is_fused=padded("is_fused"),
        num_frames=tuple(count for prompt in prompts for count in prompt.num_frames),
    )


def keyed_prompt(fused: FusedPrompt, row: int, context: tuple[str, ...] | None) -> KeyedPrompt:
    """Take one prompt out of a batch that is padded on the right.

    Args:
        fused: the batch.
        row: which prompt.
        context: what else its keys and values depend on. None: they serve no other prompt.
    """
    length = int(fused.attention_mask[row].sum())
    one = FusedPrompt(
        inputs_embeds=fused.inputs_embeds[row : row + 1, :length],
        attention_mask=fused.attention_mask[row : row + 1, :length],
        input_ids=fused.input_ids[row : row + 1, :length],
        is_fused=fused.is_fused[row : row + 1, :length],
        num_frames=fused.num_frames[row : row + 1],
    )
    if context is None:
        return KeyedPrompt(fused=one, key=None)
    key = PromptKey(context=context, ids=one.input_ids[0].cpu(), fused=one.is_fused[0].cpu())
    return KeyedPrompt(fused=one, key=key)
