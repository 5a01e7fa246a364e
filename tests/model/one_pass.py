"""Pre-fusion in one pass over one square, with an explicit mask: the plain form the two passes must equal.

It follows the released code: [patches | reduced | text], hidden text rows masked as columns and
replaced by their plain embeddings, positions counted over visible rows only.
"""

from typing import cast

import torch
from torch import Tensor

from llava_mini.flow import FusedPrompt, ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.prefusion import PrefusionLayer


def fuse_one_pass(model: LlavaMiniForConditionalGeneration, inputs: ModelInputs, visible: Tensor) -> FusedPrompt:
    """The same result as ``model.fuse``, one frame and one prompt at a time. visible: [B, T] bool."""
    config, ids = model.config, inputs.input_ids
    is_image = ids == config.image_token_id
    embeds = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
    pixels = inputs.pixel_values if isinstance(inputs.pixel_values, Tensor) else torch.empty(0)
    frame, rows, num_frames = 0, [], []
    for b in range(len(ids)):
        count = int(is_image[b].sum()) // config.tokens_per_frame
        num_frames.append(count)
        tokens, texts = [], []
        for pixel_values in pixels[frame : frame + count]:
            vision, text = _one_frame(model, pixel_values[None], embeds[b : b + 1], visible[b : b + 1])
            tokens.append(vision[0])
            texts.append(torch.where(visible[b][:, None], text[0], embeds[b]))
        frame += count
        row = torch.stack(texts).float().mean(0).to(embeds.dtype) if texts else embeds[b]
        if tokens:
            row = row.masked_scatter(is_image[b][:, None], torch.cat(tokens))
        rows.append(row)
    mask = inputs.attention_mask if inputs.attention_mask is not None else torch.ones_like(ids)
    return FusedPrompt(
        inputs_embeds=torch.stack(rows),
        attention_mask=mask,
        input_ids=ids,
        is_fused=visible & (torch.tensor(num_frames) > 0)[:, None],
        labels=inputs.labels,
        num_frames=tuple(num_frames),
    )


def _one_frame(
    model: LlavaMiniForConditionalGeneration, pixel_values: Tensor, text: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    config = model.config
    patches, reduced = model.reduce_frames(model.encode_frames(pixel_values))
    if model.prefusion is None:
        return reduced, text
    assert patches is not None
    enter = config.vision_tokens_from == "prefusion" and config.reducer != "identity"
    vision = torch.cat([patches, reduced], dim=1) if enter else patches
    hidden = torch.cat([vision, text], dim=1)
    seen = torch.cat([torch.ones(1, vision.shape[1], dtype=torch.bool), visible], dim=1)
    positions = torch.where(seen, seen.long().cumsum(1) - 1, 1)
    size = hidden.shape[1]
    square = torch.ones(size, size, dtype=torch.bool).tril() & seen[0][None, :]
    window = getattr(config.text, "sliding_window", None)
    mask = torch.zeros(size, size).masked_fill(~square, torch.finfo(torch.float32).min)[None, None]
    rotation = model.prefusion.rotary(hidden, positions)
    for layer in cast("list[PrefusionLayer]", model.prefusion.layers):
        if window is not None and _is_windowed(layer.block.self_attn, config.text.model_type):
            near = positions[0][:, None] - positions[0][None, :] < window
            layer_mask = mask.masked_fill(~near[None, None], torch.finfo(torch.float32).min)
        else:
            layer_mask = mask
        hidden = layer.block(hidden, attention_mask=layer_mask, position_embeddings=rotation)
    num_vision = vision.shape[1]
    text = hidden[:, num_vision:]
    if config.vision_tokens_from == "reducer":
        return reduced, text
    return hidden[:, num_vision - reduced.shape[1] : num_vision], text


def _is_windowed(attention: torch.nn.Module, family: str) -> bool:
    return family == "mistral" or getattr(attention, "sliding_window", None) is not None
