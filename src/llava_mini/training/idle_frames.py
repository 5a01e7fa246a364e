"""A frame that teaches nothing, for micro-batches among several processes that would not run all parts.

Layers that are spread over processes are put together by all of them at once. A process whose micro-batch holds only
text would skip vision and pre-fusion, and the others would wait for it forever. One more prompt with a black frame and
without labels makes it take part: its gradients are exactly zero. The same helps where only the vision side trains, and
a loss on text alone has no gradient at all.

A micro-batch with kept features runs all parts but the vision tower, which another process may need at that moment for
a film. There the tower looks at a black frame, and what it says is thrown away.
"""

from dataclasses import replace

import torch
from torch import Tensor, distributed
from torch.nn import functional

from llava_mini.config import LlavaMiniConfig
from llava_mini.flow import ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration


def with_idle_frame(inputs: ModelInputs | None, config: LlavaMiniConfig, device: torch.device) -> ModelInputs:
    """Return inputs that hold a frame: as they are if they have one, or with one more prompt that teaches nothing.

    Args:
        inputs: Of a micro-batch, padded on the right. None: nothing of it is left.
        config: Of the model.
        device: Of the result.
    """
    if inputs is not None and (inputs.pixel_values is not None or inputs.features is not None):
        return inputs
    ids = torch.tensor([[config.image_token_id] * config.tokens_per_frame + [0]], device=device)  # [1, Q + 1]
    pixels = _black_frame(config, device)
    if inputs is None:
        return ModelInputs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            labels=torch.full_like(ids, -100),
        )
    length = max(inputs.input_ids.shape[1], ids.shape[1])

    def joined(values: Tensor | None, idle: Tensor, padding: int) -> Tensor | None:
        if values is None:
            return None
        rows = (functional.pad(part, (0, length - part.shape[1]), value=padding) for part in (values, idle))
        return torch.cat([row.to(device) for row in rows])  # [B + 1, T]

    old = inputs.input_ids
    mask = inputs.attention_mask if inputs.attention_mask is not None else torch.ones_like(old)
    input_ids = joined(old, ids, 0)
    assert input_ids is not None
    return ModelInputs(
        input_ids=input_ids,
        attention_mask=joined(mask, torch.ones_like(ids), 0),
        answer_mask=joined(inputs.answer_mask, torch.zeros_like(ids), 0),
        pixel_values=pixels,
        labels=joined(inputs.labels, torch.full_like(ids, -100), -100),
    )


def seen_together(inputs: ModelInputs, model: LlavaMiniForConditionalGeneration) -> ModelInputs:
    """Return inputs with features in the place of pixels, from a vision tower that runs in all processes or in none.

    Args:
        inputs: Of a micro-batch with pixels or features. All processes call this at the same time.
        model: Its vision tower is frozen.
    """
    pixels = inputs.pixel_values
    is_needed = torch.tensor(int(pixels is not None))  # on the CPU: no GPU has to wait for it
    distributed.all_reduce(is_needed, distributed.ReduceOp.MAX)
    if not is_needed:
        return inputs
    assert pixels is None or isinstance(pixels, Tensor)
    with torch.no_grad():
        features = model.encode_frames(_black_frame(model.config, model.device) if pixels is None else pixels)
    return inputs if pixels is None else replace(inputs, pixel_values=None, features=features)


def _black_frame(config: LlavaMiniConfig, device: torch.device) -> Tensor:
    """[1, V, 3, S, S]."""
    return torch.zeros((1, config.views_per_frame, 3, config.image_size, config.image_size), device=device)
