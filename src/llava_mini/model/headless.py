"""The model without its head, in the place where tools of training look for it.

transformers calls it ``base_model``: TRL takes hidden states from there, and makes of them no more logits than its
loss needs.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration


class Headless:
    """Hidden states of a batch that is trained on. It owns nothing: everything belongs to the model."""

    _tp_plan: None = None
    """transformers asks for these two: there is no plan for several devices here."""
    _pp_plan: None = None

    def __init__(self, owner: "LlavaMiniForConditionalGeneration") -> None:
        self._owner = owner

    def __call__(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        answer_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Last hidden states [B, S, D]; the arguments are those of the model's ``forward``.

        Answers are not fused, as wherever there are labels.
        """
        labels = None if input_ids is None else torch.full_like(input_ids, -100)
        read, _ = self._owner.language_inputs(
            input_ids, pixel_values, attention_mask, answer_mask, labels, inputs_embeds, position_ids, past_key_values
        )
        return self._owner.language_model.model(**read, **kwargs)
