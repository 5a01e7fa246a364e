"""The order of work of the released code, from this model's own modules: what the fast order is measured against.

Everything is done for every question: each frame alone, through all layers of the vision tower, and in every
pre-fusion layer all rows in one square, [patches | reduced | text]. The result is that of ``model.fuse``.
"""

from typing import cast

import torch
from torch import Tensor

from llava_mini.benchmarks.timing import Laps, Part
from llava_mini.flow import FusedPrompt, ModelInputs
from llava_mini.model import splice
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.prefusion import PrefusionLayer


def fuse_as_released(
    model: LlavaMiniForConditionalGeneration, inputs: ModelInputs, laps: Laps | None = None
) -> FusedPrompt:
    """One prompt, as ``model.fuse`` gives it.

    Args:
        model: any.
        inputs: one prompt with all its frames.
        laps: told the ends of the parts, frame by frame.

    Raises:
        ValueError: there are several prompts, or frames that are streamed or missing.
    """
    config, ids, pixels = model.config, inputs.input_ids, inputs.pixel_values
    if len(ids) != 1 or not isinstance(pixels, Tensor):
        raise ValueError(
            f"The released order runs one prompt with its frames in a tensor; got {len(ids)} prompts and frames as "
            f"{type(pixels).__name__}. Give ModelInputs with one row and pixel_values."
        )
    is_image = ids == config.image_token_id
    splice.frames_of_prompts(is_image, len(pixels), config.tokens_per_frame)
    text_rows = model.text_rows(inputs)
    tokens, texts = [], []
    for frame in pixels.split(1):
        features = features_by_all_layers(model, frame)
        _lap(laps, "vision")
        patches, reduced = model.reduce_frames(features)
        _lap(laps, "reduction")
        vision, text = fuse_in_one_square(model, patches, reduced, text_rows.packed.embeds)
        _lap(laps, "pre-fusion")
        tokens.append(vision)  # [1, Q, D]
        texts.append(text.float())  # [1, N, D]
    total = torch.stack(texts).sum(0)
    embeds = text_rows.with_fused(total, torch.tensor([len(pixels)], device=ids.device))
    return FusedPrompt(
        inputs_embeds=splice.place_frames(embeds, is_image, torch.cat(tokens)),
        attention_mask=text_rows.mask,
        input_ids=ids,
        is_fused=text_rows.visible,
        num_frames=(len(pixels),),
    )


def features_by_all_layers(model: LlavaMiniForConditionalGeneration, frames: Tensor) -> Tensor:
    """Features of frames [F, V, 3, H, W] by all layers of the tower, of which the last changes nothing."""
    tower = model.vision_tower
    views = frames.flatten(0, 1).to(tower.embeddings.patch_embedding.weight.dtype)
    hidden = tower.pre_layrnorm(tower.embeddings(views))
    features = hidden
    for layer in tower.encoder.layers:
        features, hidden = hidden, layer(hidden, None)
    return features[:, 1:].unflatten(0, frames.shape[:2])  # [F, V, patches, E]


def fuse_in_one_square(
    model: LlavaMiniForConditionalGeneration, patches: Tensor | None, reduced: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """Pre-fusion with all rows in every layer: vision tokens [F, Q, D] and text [F, N, D]."""
    if model.prefusion is None:
        return reduced, text
    assert patches is not None
    from_prefusion = model.config.vision_tokens_from == "prefusion"
    enters = from_prefusion and model.config.reducer != "identity"
    rows = torch.cat([patches, reduced, text] if enters else [patches, text], dim=1)  # [F, P + Q + N, D]
    num_rows, num_vision = rows.shape[1], rows.shape[1] - text.shape[1]
    rotation = model.prefusion.rotary(rows, torch.arange(num_rows, device=rows.device)[None])
    for layer in model.prefusion.layers:
        made, _, _ = cast(PrefusionLayer, layer)(rows, None, None, rotation, num_rows, 1)
        rows = cast(Tensor, made)
    vision = rows[:, num_vision - reduced.shape[1] : num_vision] if from_prefusion else reduced
    return vision, rows[:, num_vision:]


def _lap(laps: Laps | None, part: Part) -> None:
    if laps is not None:
        laps(part)
