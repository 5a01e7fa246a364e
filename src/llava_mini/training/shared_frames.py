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
        inputs: Prompts with places for all their frames; ``pixel_values``, or ``features``, holds each frame once.
        frame_sources: [F] int64: for each frame of the prompts, in order, its row there.

    Raises:
        ValueError: If the prompts have places for another number of frames.
    """
    features, text = inputs.features, model.text_rows(inputs)
    if features is None:
        assert isinstance(inputs.pixel_values, Tensor)
        features = model.encode_frames(inputs.pixel_values)
    frames = splice.frames_of_prompts(text.is_image, len(frame_sources), model.config.tokens_per_frame)  # [B]
    prompt_of_frame = torch.arange(len(text.ids), device=text.ids.device).repeat_interleave(frames)  # [F]

    patches, reduced = model.reduce_frames(features)
    seen = model.read(patches, reduced, None)
    assert seen.vision is not None
    stored = tuple((keys[frame_sources], values[frame_sources]) for keys, values in seen.keys_values)
    rows = text.packed.embeds
    read = model.read_again(stored, rows[prompt_of_frame])  # [F, N, D]
    total = torch.zeros_like(rows, dtype=torch.float32).index_add(0, prompt_of_frame, read.float())  # [B, N, D]
    tokens = model.frame_tokens(seen.vision[frame_sources], text, prompt_of_frame)
    return splice.fused_prompt(text, text.with_fused(total, frames), [tokens], frames)
