"""Many questions about the same frames for the price of one look.

The vision side of pre-fusion does not see the question, so in training, too, it runs once for each
image or clip, and the questions read its keys and values: each in a prompt of its own, as it is asked
later, and not as turns of a conversation in which one question gives the answer of another away.
"""

import torch
from torch import Tensor

from llava_mini.flow import FusedPrompt, ModelInputs
from llava_mini.model import splice
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration


def fuse_shared(model: LlavaMiniForConditionalGeneration, inputs: ModelInputs, frame_sources: Tensor) -> FusedPrompt:
    """Do what ``model.fuse`` does for prompts whose frames occur in several of them.

    Args:
        model: The model.
        inputs: Prompts with places for all their frames; ``pixel_values`` holds each frame once.
        frame_sources: [F] int64: for each frame of the prompts, in order, its row of ``pixel_values``.

    Raises:
        ValueError: If the prompts have places for another number of frames.
    """
    config, ids, pixels = model.config, inputs.input_ids, inputs.pixel_values
    assert isinstance(pixels, Tensor)
    image_token_id = config.image_token_id
    assert image_token_id is not None
    is_image = ids == image_token_id
    embeds = model.get_input_embeddings()(ids.masked_fill(is_image, 0))  # [B, T, D]
    visible = splice.fusible(
        inputs,
        image_token_id=image_token_id,
        fuse_token_id_zero=config.fuse_token_id_zero,
        fuse_answers=config.fuse_answers,
    )
    packed = splice.pack(embeds, visible)
    frames = splice.frames_of_prompts(is_image, len(frame_sources), config.tokens_per_frame)  # [B]
    prompt_of_frame = torch.arange(len(ids), device=ids.device).repeat_interleave(frames)  # [F]

    patches, reduced = model.reduce_frames(model.encode_frames(pixels))
    seen = model.read(patches, reduced, None)
    assert seen.vision is not None
    stored = tuple((keys[frame_sources], values[frame_sources]) for keys, values in seen.keys_values)
    text = model.read_again(stored, packed.embeds[prompt_of_frame])  # [F, N, D]
    total = torch.zeros_like(packed.embeds, dtype=torch.float32).index_add(0, prompt_of_frame, text.float())
    embeds = splice.unpack(embeds, total / frames.clamp(min=1)[:, None, None], packed, frames > 0)
    embeds = splice.place_frames(embeds, is_image, seen.vision[frame_sources])
    return FusedPrompt(
        inputs_embeds=embeds,
        attention_mask=inputs.attention_mask if inputs.attention_mask is not None else torch.ones_like(ids),
        input_ids=ids,
        is_fused=visible & (frames > 0)[:, None],
        labels=inputs.labels,
        num_frames=tuple(frames.tolist()),
    )
