"""Many questions about the same frames for the price of one look.

The vision side of pre-fusion does not see the question, so in training, too, it runs once for each
image or clip, and the questions read its keys and values: each in a prompt of its own, as it is asked
later, and not as turns of a conversation in which one question gives the answer of another away.

The same holds in the language model for all that stands before the question. With one token for a frame that is next to
nothing; where all patches are tokens it is nearly everything.

Shapes: B prompts, S spliced length, F frames, N fused or supervised tokens, D language width.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

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


def shares_much(model: LlavaMiniForConditionalGeneration, fused: FusedPrompt, frame_sources: Tensor) -> bool:
    """Whether ``answer_rows`` runs less than half of the rows that the language model would run for whole prompts."""
    reducer = model.reducer
    drops_apart = reducer.drops_inside and reducer.drops_in_training and not reducer.drops_alike
    if reducer.reads_question or drops_apart or 0 in fused.num_frames:
        return False
    if model.config.vision_tokens_from == "nowhere":
        return False
    assert fused.labels is not None
    groups = _groups(model, fused, frame_sources)
    if any(bool((fused.labels[group.prompts, group.end] != -100).any()) for group in groups):
        return False  # an answer that follows a frame at once
    return 2 * sum(group.num_rows for group in groups) < fused.input_ids.numel()


def supervised_rows(
    model: LlavaMiniForConditionalGeneration, fused: FusedPrompt, frame_sources: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the last hidden state before each token with a label, [N, D], and these tokens, [N], prompt by prompt."""
    if shares_much(model, fused, frame_sources):
        return answer_rows(model, fused, frame_sources)
    assert fused.labels is not None
    hidden = model.language_model.model(
        inputs_embeds=fused.inputs_embeds.to(model.dtype), attention_mask=fused.attention_mask, **model.inside(fused)
    ).last_hidden_state  # [B, S, D]
    chosen = fused.labels[:, 1:] != -100
    return hidden[:, :-1][chosen], fused.labels[:, 1:][chosen]


def answer_rows(
    model: LlavaMiniForConditionalGeneration, fused: FusedPrompt, frame_sources: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the last hidden state before each token with a label, [N, D], and these tokens, [N], prompt by prompt.

    What stands up to the last frame of a prompt runs once for each image or clip, and the rest of every prompt reads
    its keys and values. Up to rounding that is what whole prompts give.

    Args:
        model: Its vision tokens, and what is done to them in the language model, do not depend on the question.
        fused: Prompts with labels, padded on the right, all with frames.
        frame_sources: [F], as in ``fuse_shared``.
    """
    assert fused.labels is not None
    decoder = model.language_model.model
    embeds, rows, targets, places = fused.inputs_embeds.to(model.dtype), [], [], []
    for group in _groups(model, fused, frame_sources):
        shared, stop = _beginning(fused, group), group.end + group.length
        inside, cache = model.inside(shared), DynamicCache()
        decoder(inputs_embeds=shared.inputs_embeds.to(model.dtype), past_key_values=cache, use_cache=True, **inside)
        hidden = decoder(
            inputs_embeds=embeds[group.prompts, group.end : stop],
            past_key_values=_repeated(cache, group.shared),
            attention_mask=fused.attention_mask[group.prompts, :stop],
            position_ids=torch.arange(group.end, stop, device=embeds.device)[None],
            use_cache=True,
            **{name: one.going_on(group.shared) for name, one in inside.items()},
        ).last_hidden_state  # [prompts, length, D]
        labels = fused.labels[group.prompts, group.end + 1 : stop]
        chosen = labels != -100
        rows.append(hidden[:, :-1][chosen])
        targets.append(labels[chosen])
        place = fused.labels.shape[1] * group.prompts[:, None] + torch.arange(group.end + 1, stop, device=embeds.device)
        places.append(place[chosen])
    order = torch.cat(places).argsort()
    return torch.cat(rows)[order], torch.cat(targets)[order]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Prompts whose frames end at the same place."""

    prompts: Tensor
    """[prompts] int64."""
    first_prompts: Tensor
    """[media] int64: for each image or clip, one prompt about it."""
    shared: Tensor
    """[prompts] int64: which of these each prompt is about."""
    end: int
    """Where the frames end."""
    length: int
    """Longest rest of a prompt."""

    @property
    def num_rows(self) -> int:
        return len(self.first_prompts) * self.end + len(self.prompts) * self.length


def _beginning(fused: FusedPrompt, group: _Group) -> FusedPrompt:
    """What stands up to the last frame, once for each image or clip."""
    first = group.first_prompts
    return FusedPrompt(
        inputs_embeds=fused.inputs_embeds[first, : group.end],
        attention_mask=fused.attention_mask[first, : group.end],
        input_ids=fused.input_ids[first, : group.end],
        is_fused=fused.is_fused[first, : group.end],
        num_frames=tuple(fused.num_frames[prompt] for prompt in first.tolist()),
    )


def _groups(model: LlavaMiniForConditionalGeneration, fused: FusedPrompt, frame_sources: Tensor) -> list[_Group]:
    is_image = (fused.input_ids == model.config.image_token_id) & fused.attention_mask.bool()
    ends = (is_image.shape[1] - is_image.flip(1).int().argmax(1)).tolist()
    lengths, sources = fused.attention_mask.sum(1).tolist(), frame_sources.tolist()
    members: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # of each end and medium
    frame = 0
    for prompt, (end, num_frames) in enumerate(zip(ends, fused.num_frames, strict=True)):
        members[end][sources[frame]].append(prompt)
        frame += num_frames
    groups = []
    for end, media in members.items():
        prompts = [prompt for some in media.values() for prompt in some]
        shared = [medium for medium, some in enumerate(media.values()) for _ in some]
        first = [some[0] for some in media.values()]
        tensors = (torch.tensor(values, device=is_image.device) for values in (prompts, first, shared))
        length = max(lengths[prompt] for prompt in prompts) - end
        groups.append(
            _Group(**dict(zip(("prompts", "first_prompts", "shared"), tensors, strict=True)), end=end, length=length)
        )
    return groups


def _repeated(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Keys and values of these rows of the batch, in this order, with their gradients."""
    made = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        made.update(layer.keys[rows], layer.values[rows], index)
    return made
