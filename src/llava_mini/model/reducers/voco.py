"""VoCo-LLaMA (arXiv 2406.12275): the language model itself gathers a frame in a few rows, through its attention mask.

A frame stands in the prompt as all its patches, projected, and after them ``reducer_tokens`` copies of one learned row.
In the source a prompt is one image, these rows, then everything else, and with f and l the first and the last of them a
row q sees a row k that is not after it if

    k <= l  where q <= l,      k >= f  where q > l

so what is said after the image sees it through the learned rows alone. Here text may come before a frame, and there may
be many frames, so:

* text sees all text and all learned rows before it, never a patch;
* rows of a frame see the text before the first frame of the prompt, and what stands before them in their own frame.

With an image and no text before it that is the mask of the source. Frames do not see one another nor what is asked, as
the paper has it for video; text between frames is not seen by frames either, so each frame's rows depend on nothing but
the frame, its place, and how the prompt begins. Positions are those of the whole prompt.

The rows see what they see in every layer, so keys and values of a beginning stay valid for any other prompt that begins
so. What comes after the frames needs none of the patches: ``gather_frames`` keeps the rest alone.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import initialization as init

from llava_mini.config import LlavaMiniConfig
from llava_mini.flow import FusedPrompt
from llava_mini.model.inside import KEYWORD, Inside, LayerInput, PromptRows, restrict
from llava_mini.model.reducers.base import Cost, Reduced, Reducer


class VoCo(Reducer):
    """Patches, and learned rows after them in which the language model gathers what they say."""

    reads_projected = True
    acts_inside = True

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        self.row = nn.Parameter(torch.empty(config.text.hidden_size))

    def init_weights(self) -> None:
        """Draw the row as a word's embedding is drawn."""
        init.normal_(self.row, mean=0.0, std=self.config.text.initializer_range)

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, D]."""
        rows = self.row.expand(len(patches), self.config.reducer_tokens, -1)
        return Reduced(torch.cat([patches, rows.to(patches.dtype)], dim=1))  # [F, N + reducer_tokens, D]

    def inside(self, rows: PromptRows) -> Inside:
        """Hide patches from everything but their own frame."""
        return _Gathered(rows, self.config.reducer_tokens)

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """The learned rows are not projected. A mask saves nothing: all rows run in all layers."""
        patches = config.reduced_patches
        return Cost(parameters=config.text.hidden_size, projected=patches, published_projected=patches)


def gather_frames(language_model: nn.Module, fused: FusedPrompt, config: LlavaMiniConfig) -> tuple[DynamicCache, int]:
    """Read a prompt up to the end of its last frame, frame by frame, and keep what anything after it can see.

    The first of two phases that equal reading the prompt at once. In the second, any text is read on top of these keys
    and values, without a mask, at positions that go on where the frames end: ``language_model(inputs_embeds=rows,
    position_ids=..., past_key_values=cache, inside=Inside())``.

    Args:
        language_model: of a model with this reducer.
        fused: one prompt without padding.
        config: of the model.

    Returns:
        Keys and values of the text and of the learned rows, and the position after the last frame.

    Raises:
        ValueError: there are several prompts, or one with padding.
    """
    if len(fused.input_ids) > 1 or not bool(fused.attention_mask.all()):
        raise ValueError(
            f"Frames are gathered for one prompt without padding, got {len(fused.input_ids)} prompts of "
            f"{fused.attention_mask.sum(1).tolist()} rows in {fused.input_ids.shape[1]} places. Fuse them one by one."
        )
    kept, beginning = DynamicCache(config=config.text), None
    decoder, stop = cast(Any, language_model).get_decoder(), 0
    for frame, start, stop in _segments(PromptRows.of(fused, config)):
        if frame >= 0 and beginning is None:
            beginning = deepcopy(kept)
        cache = kept if frame < 0 else deepcopy(beginning)
        decoder(
            inputs_embeds=fused.inputs_embeds[:, start:stop].to(decoder.dtype),
            position_ids=torch.arange(start, stop, device=fused.inputs_embeds.device)[None],
            past_key_values=cache,
            use_cache=True,
            **{KEYWORD: Inside()},
        )
        if frame >= 0:
            for index, layer in enumerate(cast(Any, cache).layers):
                last = slice(-config.reducer_tokens, None)
                kept.update(layer.keys[:, :, last], layer.values[:, :, last], index)
    return kept, stop


def _segments(rows: PromptRows) -> Iterator[tuple[int, int, int]]:
    """The frames of one prompt and the text before and between them: number, or -1 for text, first row, row after."""
    frames, start = rows.frames[0].tolist(), 0
    end = max((place + 1 for place, frame in enumerate(frames) if frame >= 0), default=0)
    for frame, members in groupby(frames[:end]):
        stop = start + len(list(members))
        yield frame, start, stop
        start = stop


class _Gathered(Inside):
    """The mask."""

    def __init__(self, rows: PromptRows, num_tokens: int) -> None:
        self._rows, self._num_tokens = rows, num_tokens
        self._frames = rows.frames  # [B, S]
        self._is_open = ~rows.is_image | rows.last_of_frame(num_tokens)  # what text sees
        self._is_beginning = rows.is_image.cumsum(1) == 0  # what frames see besides themselves
        self._mask: Tensor  # of this call, the same in all layers

    def before(self, given: LayerInput) -> LayerInput:
        """Hide what is not to be seen."""
        if given.index == 0:
            self._mask = self._make_mask(given)
        return replace(given, mask=self._mask.to(given.hidden.device))

    def going_on(self, prompts: Tensor) -> "_Gathered":
        """The mask of prompts with text behind the frames."""
        return _Gathered(self._rows.take(prompts), self._num_tokens)

    def _make_mask(self, given: LayerInput) -> Tensor:
        start, end = given.num_before, given.num_before + given.hidden.shape[1]
        mask = given.explicit_mask(start)  # [B or 1, 1, R, C]
        length = max(end, mask.shape[3])
        frames = self._rows.fitted(self._frames, given.hidden, length, fill=-1)
        is_open = self._rows.fitted(self._is_open, given.hidden, length, fill=True)
        is_beginning = self._rows.fitted(self._is_beginning, given.hidden, length)
        keys = slice(mask.shape[3])
        row_frames = frames[:, start:end, None]  # [B, R, 1]
        of_frame = (row_frames == frames[:, None, keys]) | is_beginning[:, None, keys]
        seen = torch.where(row_frames < 0, is_open[:, None, keys], of_frame)  # [B, R, C]
        return restrict(mask, seen[:, None])
