"""What carries the answer: a trained model is asked again with its vision tokens or its fused text spoiled.

All of it happens to ``FusedPrompt``s, between vision and an untouched language model. Where spoiling something
changes nothing, the model does not use it. What is swapped comes from another picture, or from another clip of as many
frames, of the same batch; the question stays.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import cast

import torch
from torch import Tensor

from llava_mini.config import LlavaMiniConfig
from llava_mini.data.records import Record
from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.exact_match import CAPTION_KINDS, Mark, asked, scores, texts
from llava_mini.flow import FusedPrompt, ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor

UNCHANGED = "unchanged"


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The same questions three times."""

    own: FusedPrompt
    """About their own frames."""
    other: FusedPrompt
    """About as many frames of the question before each."""
    disordered: FusedPrompt
    """About their own frames in another order. Fused text is a mean over frames, so it differs by rounding alone."""


Spoil = Callable[[LlavaMiniForConditionalGeneration, Variants], FusedPrompt]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What came of asking in one way."""

    right: dict[str, float]
    """By kind of question, the share of right answers; and of all ``images`` and ``clips``, weighted as in scores."""
    kept: dict[str, float]
    """By kind of question, the share of answers that are as they were with nothing changed, right or wrong."""


def zeroed_tokens(model: LlavaMiniForConditionalGeneration, asking: Variants) -> FusedPrompt:
    """Vision tokens become zeros."""
    embeds = asking.own.inputs_embeds.masked_fill(_of_frames(model, asking.own)[..., None], 0.0)
    return replace(asking.own, inputs_embeds=embeds)


def shuffled_tokens(model: LlavaMiniForConditionalGeneration, asking: Variants) -> FusedPrompt:
    """The vision tokens of a clip stand in another order of its frames."""
    return asking.disordered


def swapped_tokens(model: LlavaMiniForConditionalGeneration, asking: Variants) -> FusedPrompt:
    """Vision tokens are those of the other frames."""
    if not model.config.prefusion_num_layers:
        return asking.other  # whose text is the same; its tokens may be more or fewer
    return _mixed(asking, _of_frames(model, asking.own))


def swapped_text(model: LlavaMiniForConditionalGeneration, asking: Variants) -> FusedPrompt:
    """Text is the same text fused with the other frames."""
    return _mixed(asking, asking.own.is_fused)


def raw_text(model: LlavaMiniForConditionalGeneration, asking: Variants) -> FusedPrompt:
    """Text is what it was before pre-fusion."""
    own = asking.own
    is_image = own.input_ids == model.config.image_token_id  # also where a frame has fewer tokens than room
    raw = model.get_input_embeddings()(own.input_ids.masked_fill(is_image, 0))
    return replace(own, inputs_embeds=torch.where(own.is_fused[..., None], raw, own.inputs_embeds))


TOKENS: dict[str, Spoil] = {
    "tokens zeroed": zeroed_tokens,
    "tokens shuffled": shuffled_tokens,
    "tokens swapped": swapped_tokens,
}
"""For models whose language model reads vision tokens; the second one for clips."""

TEXT: dict[str, Spoil] = {"text swapped": swapped_text, "text raw": raw_text}
"""For models with pre-fusion."""


def spoils(config: LlavaMiniConfig) -> dict[str, Spoil]:
    """Return what can be spoiled in the prompts of a model."""
    tokens = {} if config.vision_tokens_from == "nowhere" else TOKENS
    return {**tokens, **(TEXT if config.prefusion_num_layers else {})}


@torch.inference_mode()
def carriers(
    model: LlavaMiniForConditionalGeneration, processor: LlavaMiniProcessor, bench: Bench, *, batch_size: int = 32
) -> dict[str, Carried]:
    """Ask all questions of a bench, and ask them again with something spoiled.

    A clip with as many frames as no other of the bench is left out in all ways, since nothing can be swapped with it.

    Args:
        model: In evaluation mode, on any device.
        processor: The model's.
        bench: What to ask. Descriptions are left out.
        batch_size: Most questions that are answered together, at least 2.

    Returns:
        By way of asking: ``unchanged``, then those of ``spoils``.
    """
    ways: dict[str, Spoil | None] = {UNCHANGED: None, **spoils(model.config)}
    answers: dict[str, dict[tuple[str, int], str]] = {way: {} for way in ways}
    for batch in batches(bench, batch_size):
        variants = fused_variants(model, processor, [bench.item(kind, index).record() for kind, index in batch])
        for way, spoil in ways.items():
            if spoil is shuffled_tokens and variants.own.num_frames[0] == 1:
                continue
            fused = variants.own if spoil is None else spoil(model, variants)
            answers[way].update(zip(batch, answers_to(model, processor, fused), strict=True))
    return {way: _carried(bench, found, answers[UNCHANGED]) for way, found in answers.items() if found}


def batches(bench: Bench, batch_size: int) -> list[list[tuple[str, int]]]:
    """Return kind and index of questions in batches of 2 and more, all about equally many frames."""
    by_frames: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for index in range(bench.questions):
        for kind in _kinds(bench):  # kinds alternate, so that what is swapped comes from all sorts of pictures
            if index < bench.asked(kind):
                by_frames[len(bench.item(kind, index).frames)].append((kind, index))
    found = []
    for group in by_frames.values():
        number = -(-len(group) // batch_size)
        found += [group[start::number] for start in range(number)]
    return [batch for batch in found if len(batch) > 1]


def fused_variants(
    model: LlavaMiniForConditionalGeneration, processor: LlavaMiniProcessor, records: Sequence[Record]
) -> Variants:
    """Return the prompts of records, fused in three ways.

    Args:
        model: The model.
        processor: The model's.
        records: All with equally many frames.
    """
    tensors = asked(model, processor, records)
    pixels = tensors.pop("pixel_values")
    features = torch.cat([model.encode_frames(part) for part in pixels.split(model.frames_per_pass)])
    frames = torch.arange(len(features), device=features.device).view(len(records), -1)  # [B, frames]
    orders = torch.tensor(
        [_other_order(frames.shape[1], seed=row) for row in range(len(records))], device=frames.device
    )

    def fused(order: Tensor) -> FusedPrompt:
        return model.fuse(ModelInputs(features=features[order.flatten()], **tensors))

    return Variants(
        own=fused(frames),
        other=fused(frames.roll(1, dims=0)),
        disordered=fused(frames.gather(1, orders)),
    )


def answers_to(
    model: LlavaMiniForConditionalGeneration,
    processor: LlavaMiniProcessor,
    fused: FusedPrompt,
    *,
    max_new_tokens: int = 20,
) -> list[str]:
    """Return the model's greedy answers to prompts that are padded on the left."""
    ids = model.generate(fused=fused, max_new_tokens=max_new_tokens, do_sample=False)
    return texts(processor, cast(Tensor, ids)[:, fused.input_ids.shape[1] :])


def _carried(bench: Bench, answers: Mapping[tuple[str, int], str], unchanged: Mapping[tuple[str, int], str]) -> Carried:
    kinds = [kind for kind in _kinds(bench) if any(kind == asked_kind for asked_kind, _ in answers)]
    marks, kept = [], {}
    for kind in kinds:
        mine = {index: answer for (asked_kind, index), answer in sorted(answers.items()) if asked_kind == kind}
        turns = {index: bench.item(kind, index).turns[0] for index in mine}
        marks += [Mark(turn=turns[index], index=index, answer=answer, guess="") for index, answer in mine.items()]
        kept[kind] = sum(unchanged[kind, index] == answer for index, answer in mine.items()) / len(mine)
    found = scores(marks, bench.weights)
    return Carried(right={name: found[name].exact for name in (*kinds, "images", "clips") if name in found}, kept=kept)


def _kinds(bench: Bench) -> list[str]:
    """Kinds of questions that are answered in a few words."""
    return [kind for kind in bench.weights.kinds if kind not in CAPTION_KINDS]


def _of_frames(model: LlavaMiniForConditionalGeneration, fused: FusedPrompt) -> Tensor:
    """The places of vision tokens: [B, S] bool. Frames may have fewer than their prompt has room for."""
    return (fused.input_ids == model.config.image_token_id) & fused.attention_mask.bool()


def _mixed(asking: Variants, places: Tensor) -> FusedPrompt:
    """The prompts with the rows of others in some places, [B, S] bool."""
    own, other = asking.own.inputs_embeds, asking.other.inputs_embeds
    return replace(asking.own, inputs_embeds=torch.where(places[..., None], other, own))


def _other_order(num_frames: int, seed: int) -> list[int]:
    """Return an order that is not their own, if there are two frames and more."""
    order, random = list(range(num_frames)), Random(seed)
    while num_frames > 1 and order == sorted(order):
        random.shuffle(order)
    return order
