"""Fusion of prompts with frames that come one after another.

Text is averaged over all frames of a prompt, so its sum over the frames so far and their vision tokens are all that
has to be kept: memory grows by the tokens alone, 8 kB a frame at 8B. The mean is exact at any moment, and more frames
may come after it.

Shapes: B prompts, T tokens, N fused tokens, S spliced length, F frames, Q reduced tokens, D language width.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_mini.flow import FrameChunk, FusedPrompt, ModelInputs, SeenChunk, SeenFrames, sent
from llava_mini.model import splice
from llava_mini.model.reducers.base import Reduced

if TYPE_CHECKING:
    from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration


class StreamedFusion:
    """Prompts about the same images and videos, while their frames come."""

    def __init__(self, model: "LlavaMiniForConditionalGeneration", inputs: ModelInputs) -> None:
        """Begin without any frame.

        Args:
            model: reads the frames.
            inputs: prompts with one image token for each image or video; ``pixel_values`` is not looked at.

        Raises:
            ValueError: the prompts have different numbers of places for images and videos.
        """
        places = (inputs.input_ids == model.config.image_token_id).sum(1).tolist()
        if len({*places}) > 1:
            raise ValueError(
                f"Prompts that share streamed frames have a place for each image or video, but they have {places} "
                "places. Fuse prompts about different media one by one."
            )
        self._model = model
        self._inputs = inputs
        self._text = model.text_rows(inputs)
        self._total = torch.zeros_like(self._text.packed.embeds, dtype=torch.float32)  # [B, N, D]
        self._tokens: list[list[Reduced]] = [[] for _ in self._text.ids]
        self.counts = [0] * places[0]
        """Frames of each image or video so far."""

    @property
    def length(self) -> int:
        """Most tokens of a prompt with the frames so far."""
        text = self._text.ids.shape[1] - len(self.counts)
        return text + sum(self.counts) * self._model.config.tokens_per_frame

    def add(self, chunk: FrameChunk | SeenChunk) -> None:
        """Let the text read a few more frames.

        Raises:
            ValueError: they belong to a medium that the prompt does not have, or to an earlier one than the last.
        """
        last = max((slot for slot, count in enumerate(self.counts) if count), default=0)
        if not last <= chunk.slot < len(self.counts):
            raise ValueError(
                f"A chunk of frames belongs to medium {chunk.slot}, after medium {last}, but the prompt has "
                f"{len(self.counts)}. Stream the media in the order of their places in the prompt."
            )
        frames, device = chunk.seen if isinstance(chunk, SeenChunk) else chunk.pixel_values, self._model.device
        for part in frames.split(self._model.frames_per_pass):
            self._read(sent(part, device) if isinstance(part, Tensor) else part.to(device))
        self.counts[chunk.slot] += len(frames)

    def _read(self, frames: Tensor | SeenFrames) -> None:
        text = self._text.packed.embeds
        seen = frames if isinstance(frames, SeenFrames) else self._model.see(frames, text[0, :0])
        num_known = seen.text.shape[1]
        known = seen.text.float().sum(0).expand(len(text), -1, -1)
        new = text[:, num_known:].flatten(0, 1).expand(len(seen), -1, -1)  # [F, B * (N - known), D]
        new = self._model.read_again(seen.keys_values, new, num_texts=len(text)).float().sum(0)
        self._keep_tokens(seen.vision)
        self._total = self._total + torch.cat([known, new.unflatten(0, (len(text), -1))], dim=1)  # [B, N, D]

    def _keep_tokens(self, vision: Tensor) -> None:
        """Keep the tokens of some frames for each prompt: the same ones, unless they depend on what is asked."""
        differs = self._model.reducer.reads_question
        prompts = range(len(self._tokens)) if differs else range(1)
        owners = [torch.full((len(vision),), prompt, device=vision.device) for prompt in prompts]
        parts = [self._model.frame_tokens(vision, self._text, owner) for owner in owners]  # [prompts] of [F, Q, D]
        for tokens, part in zip(self._tokens, parts if differs else parts * len(self._tokens), strict=True):
            tokens.append(part)

    def prompt(self) -> FusedPrompt:
        """Return the prompts with the frames so far.

        Raises:
            ValueError: no frame came for an image or video.
        """
        if 0 in self.counts:
            raise ValueError(
                f"No frame came for medium {self.counts.index(0)} of the prompt. Is the video empty or the iterator "
                "already used?"
            )
        text, copies = self._text, [count * self._model.config.tokens_per_frame for count in self.counts]
        frames = torch.full((len(text.ids),), sum(self.counts), device=text.ids.device)
        embeds = splice.widen(text.with_fused(self._total, frames), text.is_image, copies)  # [B, S, D]
        ids, mask, visible = (
            splice.widen(values, text.is_image, copies) for values in (text.ids, text.mask, text.visible)
        )
        labels = None if text.labels is None else splice.widen(text.labels, text.is_image, copies)
        is_image = ids == self._model.config.image_token_id
        wide = replace(text, ids=ids, mask=mask, labels=labels, is_image=is_image, visible=visible)
        return splice.fused_prompt(wide, embeds, [part for parts in self._tokens for part in parts], frames)
