"""Between prompts and rows: which text is fused, how it is packed, and where everything returns to.

Shapes: B prompts, T tokens, S spliced length, F frames, Q reduced tokens, D language width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_mini.flow import FusedPrompt, ModelInputs
from llava_mini.model.reducers.base import Question, Reduced


@dataclass(frozen=True)
class PackedText:
    """The fused rows of every prompt, moved to the left and cut to the longest."""

    embeds: Tensor
    """[B, N, D]. Rows past a prompt's own number hold nothing of meaning."""
    source: Tensor
    """[B, N] int64: where each row came from, among the prompt's fusible tokens."""
    valid: Tensor
    """[B, N] bool: the rows that are a prompt's own."""


@dataclass(frozen=True)
class TextRows:
    """The text of some prompts before pre-fusion."""

    ids: Tensor
    """[B, T] int64."""
    mask: Tensor
    """[B, T], 0 at padding."""
    labels: Tensor | None
    """[B, T] int64, -100 at the places of frames."""
    is_image: Tensor
    """[B, T] bool: places of frames."""
    visible: Tensor
    """[B, T] bool: tokens that pre-fusion reads if there are frames."""
    embeds: Tensor
    """[B, T, D]."""
    packed: PackedText
    """The rows that pre-fusion reads."""
    question: Question | None = None
    """What each prompt asks about its frames. None: the reducer does not read it."""

    def with_fused(self, total: Tensor, frames: Tensor) -> Tensor:
        """Return embeds [B, T, D] with fused text in its places.

        Args:
            total: [B, N, D] float32, fused text summed over the frames of each prompt.
            frames: [B] int64, the number of these. Text of prompts without frames stays as it is.
        """
        return unpack(self.embeds, total / frames.clamp(min=1)[:, None, None], self.packed, frames > 0)


def fusible(inputs: ModelInputs, *, image_token_id: int, fuse_token_id_zero: bool, fuse_answers: bool) -> Tensor:
    """Tokens that pre-fusion reads: [B, T] bool.

    Never: places of frames, padding, and answers that carry labels. Earlier answers only with ``fuse_answers``.
    """
    ids = inputs.input_ids
    visible = ids != image_token_id
    if inputs.attention_mask is not None:
        visible &= inputs.attention_mask.bool()
    if not fuse_token_id_zero:
        visible &= ids != 0
    if inputs.labels is not None:
        visible &= inputs.labels == -100
    if inputs.answer_mask is not None and (inputs.labels is not None or not fuse_answers):
        visible &= ~inputs.answer_mask.bool()
    return visible


def pack(embeds: Tensor, visible: Tensor) -> PackedText:
    """Move the visible rows of each prompt to the left. embeds: [B, T, D], visible: [B, T] bool."""
    lengths = visible.sum(1)
    longest = max(int(lengths.max()), 1)  # pre-fusion needs a row, even one that nobody reads
    source = torch.argsort((~visible).int(), dim=1, stable=True)[:, :longest]  # [B, N]
    packed = embeds.gather(1, source[..., None].expand(-1, -1, embeds.shape[-1]))  # [B, N, D]
    valid = torch.arange(longest, device=embeds.device) < lengths[:, None]
    return PackedText(packed, source, valid)


def unpack(embeds: Tensor, text: Tensor, packed: PackedText, has_frames: Tensor) -> Tensor:
    """Put fused text [B, N, D] back into embeds [B, T, D], in the prompts that have frames ([B] bool)."""
    batch, row = (packed.valid & has_frames[:, None]).nonzero(as_tuple=True)
    place = packed.source[batch, row]
    return embeds.index_put((batch, place), text[batch, row].to(embeds.dtype))


def fused_prompt(text: TextRows, embeds: Tensor, frames: Sequence[Reduced], num_frames: Tensor) -> FusedPrompt:
    """Put everything together.

    Args:
        text: ids, masks and labels.
        embeds: [B, S, D], text after pre-fusion.
        frames: the tokens of all frames of the batch, in order, in parts.
        num_frames: [B] int64.
    """
    if frames:
        embeds = place_frames(embeds, text.is_image, torch.cat([part.tokens for part in frames]))
    prompt = FusedPrompt(
        inputs_embeds=embeds,
        attention_mask=text.mask,
        input_ids=text.ids,
        is_fused=text.visible & (num_frames > 0)[:, None],
        labels=text.labels,
        num_frames=tuple(num_frames.tolist()),
    )
    if all(part.valid is None for part in frames):
        return prompt
    valid = torch.cat([_valid(part) for part in frames]).flatten()
    keep = text.mask.bool().index_put(text.is_image.nonzero(as_tuple=True), valid)
    return keep_rows(prompt, keep)


def _valid(part: Reduced) -> Tensor:
    """Which tokens there are, [F, Q] bool."""
    everything = torch.ones(part.tokens.shape[:2], dtype=torch.bool, device=part.tokens.device)
    return everything if part.valid is None else part.valid


def keep_rows(prompt: FusedPrompt, keep: Tensor) -> FusedPrompt:
    """Leave rows out of some prompts and pad them anew, on the side where they were padded; without any, on the left.

    Args:
        prompt: the prompts.
        keep: [B, S] bool, no padding among them.
    """
    longest = int(keep.sum(1).max())
    at_end = prompt.labels is None and bool(prompt.attention_mask[:, -1].all())
    order = torch.argsort(keep.int() if at_end else (~keep).int(), dim=1, stable=True)
    order = order[:, -longest:] if at_end else order[:, :longest]  # [B, kept]

    def kept(values: Tensor) -> Tensor:
        return values.gather(1, order.view(*order.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:]))

    mask = keep.gather(1, order)
    ids = kept(prompt.input_ids)
    return replace(
        prompt,
        inputs_embeds=kept(prompt.inputs_embeds),
        attention_mask=mask.to(prompt.attention_mask.dtype),
        input_ids=ids,
        is_fused=kept(prompt.is_fused) & mask,
        labels=None if prompt.labels is None else kept(prompt.labels).masked_fill(~mask, -100),
    )


def place_frames(embeds: Tensor, is_image: Tensor, tokens: Tensor) -> Tensor:
    """Put vision tokens [F, Q, D] into their places in embeds [B, S, D], in order. is_image: [B, S] bool."""
    return embeds.index_put(is_image.nonzero(as_tuple=True), tokens.flatten(0, 1).to(embeds.dtype))


def widen(values: Tensor, is_image: Tensor, copies: list[int]) -> Tensor:
    """Repeat each place of a medium as often as its tokens need, the same in every prompt.

    Args:
        values: [B, T] or [B, T, D].
        is_image: [B, T] bool, one True for each image or video.
        copies: for each of these, how many tokens it takes.
    """
    repeats = torch.ones(is_image.shape, dtype=torch.long, device=values.device)
    repeats[is_image] = torch.tensor(copies * len(values), device=values.device)
    wide = values.flatten(0, 1).repeat_interleave(repeats.flatten(), dim=0)
    return wide.unflatten(0, (len(values), -1))  # [B, S] or [B, S, D]


def frames_of_prompts(is_image: Tensor, num_frames: int, tokens_per_frame: int) -> Tensor:
    """How many frames each prompt holds: [B] int64.

    Raises:
        ValueError: the places in the prompts and the frames that were given do not agree.
    """
    places = is_image.sum(1)
    if bool((places % tokens_per_frame).any()) or int(places.sum()) != num_frames * tokens_per_frame:
        raise ValueError(
            f"The prompts have places for {int(places.sum())} vision tokens ({places.tolist()} in each prompt), but "
            f"{num_frames} frames of {tokens_per_frame} tokens were given. Make input_ids and pixel_values with one "
            "call of the processor, saved with this model."
        )
    return places // tokens_per_frame
