"""The orders of work of a training step that ``bench train`` compares: same weights, same loss, same gradients.

    released             the whole vision tower, in every pre-fusion layer all rows in one square, the answers among
                         them, whose rows are thrown away, and logits of every position
    here                 what ``llava-mini train`` runs
    here, kept features  the same from the vision features of the images, which never change

Shapes: B samples of one image each, T words, Q tokens of an image, D language width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from llava_mini.benchmarks.released import features_by_all_layers, fuse_in_one_square
from llava_mini.data.tuning_batch import IGNORED, TuningBatch
from llava_mini.flow import ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.prefusion import PrefusionLayer
from llava_mini.training.instruction import InstructionTask
from llava_mini.training.sharding import checkpoint_activations

OrderName = Literal["released", "here", "here, kept features"]
ORDERS: tuple[OrderName, ...] = ("released", "here", "here, kept features")


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """Words of a sample, beside its image."""

    asked: int
    """Before the answer."""
    answered: int
    """In the answer, all of them learned."""


def make_batch(model: LlavaMiniForConditionalGeneration, samples: int, text: SampleText) -> ModelInputs:
    """Random samples [image | question | answer] on the model's device, all equally long."""
    config, device = model.config, model.device
    views = (config.views_per_frame, 3, config.image_size, config.image_size)
    words = torch.randint(1, config.text.vocab_size, (samples, text.asked + text.answered), device=device)
    image = words.new_full((samples, config.tokens_per_frame), cast(int, config.image_token_id))
    ids = torch.cat([image, words], dim=1)  # [B, Q + T]
    labels = ids.clone()
    labels[:, : -text.answered] = IGNORED
    pixels = torch.randn(samples, *views, device=device, dtype=model.dtype)
    return ModelInputs(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, labels=labels)


def make_loss(order: OrderName, model: LlavaMiniForConditionalGeneration, inputs: ModelInputs) -> Callable[[], Tensor]:
    """What gives the mean loss of the answers, by an order of work.

    Args:
        order: which.
        model: shared with the other orders.
        inputs: from ``make_batch``.
    """
    if order == "released":
        return lambda: released_loss(model, inputs)
    if order == "here, kept features":
        assert isinstance(inputs.pixel_values, Tensor)
        with torch.no_grad():
            features = model.encode_frames(inputs.pixel_values)
        inputs = ModelInputs(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=inputs.labels, features=features
        )
    batch = TuningBatch(inputs=inputs)
    task = InstructionTask(model, lambda index: batch)
    return lambda: task.losses(batch).total


def released_loss(model: LlavaMiniForConditionalGeneration, inputs: ModelInputs) -> Tensor:
    """The loss in the order of the released code."""
    assert isinstance(inputs.pixel_values, Tensor)
    assert inputs.labels is not None
    features = features_by_all_layers(model, inputs.pixel_values)
    patches, reduced = model.reduce_frames(features)
    num_image = model.config.tokens_per_frame
    words = model.get_input_embeddings()(inputs.input_ids[:, num_image:])  # [B, T, D]
    vision, fused = fuse_in_one_square(model, patches, reduced, words)
    is_answer = inputs.labels[:, num_image:, None] != IGNORED
    embeds = torch.cat([vision, torch.where(is_answer, words, fused)], dim=1)  # [B, Q + T, D]
    hidden = model.language_model.model(
        inputs_embeds=embeds, attention_mask=inputs.attention_mask, use_cache=False
    ).last_hidden_state
    logits = model.get_output_embeddings()(hidden).float()  # [B, Q + T, vocabulary]
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs.labels[:, 1:].flatten(), ignore_index=IGNORED)


def recompute(model: LlavaMiniForConditionalGeneration, order: OrderName, layers: bool) -> None:
    """Keep the inputs of decoder layers only, or all that they compute.

    The released code calls its pre-fusion layers past what computes layers again, and so keeps all of them.
    """
    if not layers:
        model.gradient_checkpointing_disable()
        return
    checkpoint_activations(model)
    if order == "released" and model.prefusion is not None:
        for layer in model.prefusion.layers:
            cast(PrefusionLayer, layer).gradient_checkpointing = False
