"""The engine: a loaded model and its processor, answering questions about images and video.

Everything goes through ``stream_messages``. Frames pass through the model chunk by chunk while they
are decoded, so memory does not grow with the film.
"""

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from threading import Lock
from typing import Self, cast

import torch
from torch import Tensor

from llava_mini.flow import FrameChunk, FusedPrompt, ModelInputs
from llava_mini.inference.answer import Answer, AnswerStream
from llava_mini.inference.conversation import Conversation
from llava_mini.inference.detokenize import text_pieces
from llava_mini.inference.loading import load
from llava_mini.inference.media import Media, Message, Part, media_parts, user_message
from llava_mini.inference.stats import Clock, Stats, timed_parts
from llava_mini.inference.torch_backend import generate_tokens, stop_ids
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.video import FrameSampling

Progress = Callable[[int], None]
"""Called after each chunk of frames with the number of frames read so far."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How an answer is made."""

    max_tokens: int = 512
    """Stop after so many tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0, tokens are drawn."""
    num_frames: int | None = None
    """Frames of a video, evenly spread. None: as ``fps`` and ``all_frames`` say."""
    fps: float | None = None
    """Frames of a video per second. None: one."""
    all_frames: bool = False
    """Every frame of a video."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}.")
        FrameSampling(num_frames=self.num_frames, fps=self.fps, all_frames=self.all_frames)  # refuses what is wrong


class Engine:
    """A model that answers. ``Engine.load`` makes one from a name; or give a model and its processor."""

    def __init__(self, model: LlavaMiniForConditionalGeneration, processor: LlavaMiniProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self._fusing = Lock()

    @classmethod
    def load(
        cls,
        model: str = "tiny",
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
    ) -> Self:
        """Load a model and its processor.

        Args:
            model: ``tiny`` (embedded), a folder, or a repository on the Hugging Face Hub.
            device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None: the fastest there is.
            dtype: ``float32``, ``bfloat16`` or ``float16``. None: what suits device and size.
            quantization: ``int8`` for a language model in 8 bits. None: no quantization.

        Raises:
            ValueError: no such model, device or number format; weights that do not fit the configuration; or not
                enough memory.
        """
        return cls(*load(model, device, dtype, quantization))

    def ask(
        self,
        question: str,
        media: Media = (),
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        num_frames: int | None = None,
        fps: float | None = None,
        all_frames: bool = False,
    ) -> Answer:
        """Answer a question about images and videos.

        Args:
            question: what to ask.
            media: files, PIL images, arrays, iterators of frames, in the order in which the question speaks of them.
            max_tokens: stop after so many.
            temperature: 0 takes the likeliest token each time; above 0, tokens are drawn.
            num_frames: frames of a video, evenly spread.
            fps: frames of a video per second; without any of the three, one.
            all_frames: every frame of a video.

        Raises:
            ValueError: a file that cannot be read, an empty question, or a prompt longer than the model's context.
        """
        stream = self.stream(
            question,
            media,
            max_tokens=max_tokens,
            temperature=temperature,
            num_frames=num_frames,
            fps=fps,
            all_frames=all_frames,
        )
        with stream:
            for _ in stream:
                pass
        return Answer(stream.text, stream.stats)

    def stream(
        self,
        question: str,
        media: Media = (),
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        num_frames: int | None = None,
        fps: float | None = None,
        all_frames: bool = False,
        progress: Progress | None = None,
    ) -> AnswerStream:
        """As ``ask``, piece by piece. Frames are read and errors of files come with the first piece.

        Args:
            question: as in ``ask``, like all but the last.
            media: as in ``ask``.
            max_tokens: as in ``ask``.
            temperature: as in ``ask``.
            num_frames: as in ``ask``.
            fps: as in ``ask``.
            all_frames: as in ``ask``.
            progress: called with the number of frames read so far.
        """
        settings = AnswerSettings(
            max_tokens=max_tokens, temperature=temperature, num_frames=num_frames, fps=fps, all_frames=all_frames
        )
        return self.stream_messages([user_message(question, media_parts(media))], settings, progress)

    def chat(
        self, media: Media = (), settings: AnswerSettings | None = None, progress: Progress | None = None
    ) -> Conversation:
        """Begin a conversation about some images and videos.

        Args:
            media: as in ``ask``, but no iterators: each turn reads them again.
            settings: how all its answers are made.
            progress: called with the number of frames read so far.
        """
        return Conversation(lambda messages: self.stream_messages(messages, settings, progress), media)

    def stream_messages(
        self, messages: list[Message], settings: AnswerSettings | None = None, progress: Progress | None = None
    ) -> AnswerStream:
        """Answer the last of some messages in transformers' chat format, piece by piece."""
        stats = Stats()
        return AnswerStream(self._pieces(messages, settings or AnswerSettings(), progress, stats), stats)

    def _pieces(
        self, messages: list[Message], settings: AnswerSettings, progress: Progress | None, stats: Stats
    ) -> Generator[str]:
        fused = self._fuse(messages, settings, progress, stats)
        room = self._context - fused.inputs_embeds.shape[1]
        if settings.max_tokens > room:
            warnings.warn(
                f"max_tokens is cut from {settings.max_tokens} to {room}: the prompt has "
                f"{fused.inputs_embeds.shape[1]} tokens and the model's context {self._context}.",
                stacklevel=2,
            )
        with closing(self._tokens(fused, min(settings.max_tokens, room), settings.temperature, stats)) as tokens:
            yield from text_pieces(tokens, self._decode)

    @torch.inference_mode()
    def _fuse(
        self, messages: list[Message], settings: AnswerSettings, progress: Progress | None, stats: Stats
    ) -> FusedPrompt:
        """Everything before the language model. Fills the counts and times of ``stats`` up to there."""
        clock = Clock(stats.seconds, self.model.device)
        inputs = self.processor.stream(
            messages, num_frames=settings.num_frames, fps=settings.fps, all_frames=settings.all_frames
        )
        inputs = _to_device(inputs, self.model.device)
        tokens_per_frame = self.model.config.tokens_per_frame
        num_slots = int((inputs.input_ids == self.model.config.image_token_id).sum())
        stats.text_tokens = inputs.input_ids.shape[1] - num_slots

        def count(num_frames: int) -> None:
            stats.frames += num_frames
            stats.vision_tokens += num_frames * tokens_per_frame
            self._check_length(stats, num_slots)
            if progress is not None:
                progress(stats.frames)

        self._check_length(stats, num_slots)
        if settings.num_frames is not None and any(part["type"] == "video" for part in _parts(messages)):
            promised = settings.num_frames * tokens_per_frame
            self._check_length(replace(stats, frames=settings.num_frames, vision_tokens=promised), num_slots)
        if inputs.pixel_values is not None:
            chunks = _CountedChunks(cast("Iterator[FrameChunk]", inputs.pixel_values), clock, count)
            inputs = replace(inputs, pixel_values=chunks)
        with self._fusing, timed_parts(self.model, clock):
            return self.model.fuse(inputs)

    def _check_length(self, stats: Stats, num_slots: int) -> None:
        """Refuse a prompt as soon as it is longer than the model's context less one place for the answer."""
        length, most = stats.text_tokens + stats.vision_tokens, self._context - 1
        if length <= most:
            return
        per_frame = self.model.config.tokens_per_frame
        fitting = (most - stats.text_tokens) // per_frame // max(num_slots, 1)
        advice = (
            f"Use fewer frames: --frames {fitting} on the command line, num_frames={fitting} in Python."
            if fitting > 0 and stats.frames > num_slots
            else "Ask about fewer images, or shorten the question or the conversation."
        )
        raise ValueError(
            f"The prompt has at least {length} tokens ({stats.text_tokens} of text, {per_frame} for each of "
            f"{stats.frames} frames so far), but the model's context holds {self._context}, one of them for the "
            f"answer. {advice}"
        )

    def _tokens(self, fused: FusedPrompt, max_tokens: int, temperature: float, stats: Stats) -> Generator[int]:
        """Ids of the answer. Fills the rest of ``stats``."""
        token_id, before = -1, time.perf_counter()
        made = generate_tokens(self.model, fused, max_tokens=max_tokens, temperature=temperature)
        with closing(made):
            for token_id, at in made:
                stats.seconds["generation" if stats.answer_tokens else "prefill"] += at - before
                stats.answer_tokens += 1
                before = at
                yield token_id
        stats.finish_reason = "stop" if token_id in stop_ids(self.model) else "length"

    def _decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def _context(self) -> int:
        return self.model.config.text.max_position_embeddings


def _parts(messages: list[Message]) -> Iterator[Part]:
    """All typed parts of some messages."""
    for message in messages:
        yield from (part for part in message["content"] if isinstance(part, dict))


class _CountedChunks(Iterator[FrameChunk]):
    """Chunks of frames on their way to the model, none of them held back, with the time they take to make."""

    def __init__(self, chunks: Iterator[FrameChunk], clock: Clock, count: Callable[[int], None]) -> None:
        self._next = clock.timed("media", iter(chunks).__next__)
        self._count = count

    def __next__(self) -> FrameChunk:
        chunk = self._next()
        self._count(chunk.pixel_values.shape[0])
        return chunk


def _to_device(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    """The ids and masks on ``device``; frames follow chunk by chunk."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return replace(
        inputs,
        input_ids=inputs.input_ids.to(device),
        attention_mask=moved(inputs.attention_mask),
        answer_mask=moved(inputs.answer_mask),
    )
