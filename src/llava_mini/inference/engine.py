"""The engine: a loaded model and its processor, answering questions about images and video.

Frames pass through the model chunk by chunk while they are decoded, so memory does not grow with the film. What
frames need only once is kept for the next question, and so are the language model's keys and values; answers
are those of an engine that keeps nothing.
"""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from llava_mini.flow import ModelInputs
from llava_mini.inference.answer import Answer, AnswerStream
from llava_mini.inference.conversation import Conversation
from llava_mini.inference.detokenize import text_pieces
from llava_mini.inference.frame_reader import FrameReader, Reading
from llava_mini.inference.loading import load
from llava_mini.inference.media import Media, Message, Part, media_parts, user_message
from llava_mini.inference.prompt_batches import KeyedPrompt, joined, keyed_prompt, left_padded
from llava_mini.inference.prompt_cache import PromptCache
from llava_mini.inference.settings import AnswerSettings, Caching, Request
from llava_mini.inference.stats import Clock, Stats
from llava_mini.inference.tensor_cache import TensorCache
from llava_mini.inference.torch_backend import generate_batch, generate_tokens, stop_ids
from llava_mini.inference.video_stream import LiveSource
from llava_mini.inference.watch import Watch
from llava_mini.inference.weights import ModelState
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.streamed import StreamedFusion
from llava_mini.processor.media_stream import MediaStream
from llava_mini.processor.processor import LlavaMiniProcessor

Progress = Callable[[int, int | None], None]
"""Called for each chunk of frames with the number of frames read so far, and of all of them; None: not known."""


class Engine:
    """A model that answers. ``Engine.load`` makes one from a name; or give a model and its processor."""

    def __init__(
        self, model: LlavaMiniForConditionalGeneration, processor: LlavaMiniProcessor, caching: Caching | None = None
    ) -> None:
        """Put the parts together.

        Args:
            model: answers.
            processor: the model's.
            caching: what is kept for later questions. None: what ``Caching()`` says.

        Raises:
            ValueError: a budget is negative, or the folder is a file.
        """
        caching = caching or Caching()
        self._model = model.eval()
        self.processor = processor
        self.frames = TensorCache(caching.frame_bytes, Path(caching.folder) if caching.folder is not None else None)
        """What is kept of frames; ``frames.stats`` has the hit rate, ``frames.clear()`` forgets."""
        self.prompts = PromptCache(caching.prompt_bytes)
        """What is kept of earlier prompts; ``prompts.clear()`` forgets."""
        self._state = ModelState(self.model)
        self._reader = FrameReader(self.model, self._state, self.frames, caching.kept)

    @property
    def model(self) -> LlavaMiniForConditionalGeneration:
        """What answers. Another model takes another engine."""
        return self._model

    @classmethod
    def load(
        cls,
        model: str = "tiny",
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        caching: Caching | None = None,
    ) -> Self:
        """Load a model and its processor.

        Args:
            model: ``tiny`` (embedded), a folder, or a repository on the Hugging Face Hub.
            device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None: the fastest there is.
            dtype: ``float32``, ``bfloat16`` or ``float16``. None: what suits device and size.
            quantization: ``int8`` for a language model in 8 bits. None: no quantization.
            caching: what is kept for later questions. None: what ``Caching()`` says.

        Raises:
            ValueError: no such model, device or number format; weights that do not fit the configuration; or not
                enough memory.
        """
        return cls(*load(model, device, dtype, quantization), caching)

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
            progress: called with the numbers of frames read so far and in all.
        """
        settings = AnswerSettings(
            max_tokens=max_tokens, temperature=temperature, num_frames=num_frames, fps=fps, all_frames=all_frames
        )
        return self.stream_messages([user_message(question, media_parts(media))], settings, progress)

    def ask_all(
        self,
        questions: Sequence[str],
        media: Media = (),
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        num_frames: int | None = None,
        fps: float | None = None,
        all_frames: bool = False,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answer several questions about the same images and videos, which are read once for all of them.

        The answers are those of ``ask``, each question standing alone.

        Args:
            questions: what to ask.
            media: as in ``ask``, like all others.
            max_tokens: as in ``ask``.
            temperature: as in ``ask``.
            num_frames: as in ``ask``.
            fps: as in ``ask``.
            all_frames: as in ``ask``.
            progress: called with the numbers of frames read so far and in all.
        """
        if isinstance(questions, str) or not questions:
            raise ValueError("ask_all takes a list of questions with at least one. For a single question there is ask.")
        settings = AnswerSettings(
            max_tokens=max_tokens, temperature=temperature, num_frames=num_frames, fps=fps, all_frames=all_frames
        )
        parts, stats = media_parts(media), [Stats() for _ in questions]
        conversations = [[user_message(question, parts)] for question in questions]
        prompts = self._fuse(conversations, settings, progress, stats)
        return [
            Answer("".join(self._continue(prompt, settings, counts)), counts)
            for prompt, counts in zip(prompts, stats, strict=True)
        ]

    def ask_batch(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        num_frames: int | None = None,
        fps: float | None = None,
        all_frames: bool = False,
    ) -> list[Answer]:
        """Answer questions about different images and videos, the answers made side by side.

        They are those of ``ask``; in 16 bits a tie may fall otherwise, because sums are taken in another order. Media
        are read one after another, through the cache. All prompts are padded to the longest, and ``max_tokens`` is cut
        to what that one leaves, so questions about a long video do better alone or in ``ask_all``.

        Args:
            requests: what to ask about what.
            max_tokens: as in ``ask``, like all others.
            temperature: as in ``ask``.
            num_frames: as in ``ask``.
            fps: as in ``ask``.
            all_frames: as in ``ask``.
        """
        if not requests or not all(isinstance(request, Request) for request in requests):
            raise ValueError(
                "ask_batch takes a list of requests with at least one, each a Request(question=..., media=...). For "
                "several questions about the same media there is ask_all."
            )
        settings = AnswerSettings(
            max_tokens=max_tokens, temperature=temperature, num_frames=num_frames, fps=fps, all_frames=all_frames
        )
        prompts, stats = [], [Stats() for _ in requests]
        for request, counts in zip(requests, stats, strict=True):
            messages = [user_message(request.question, media_parts(request.media))]
            prompts += self._fuse([messages], settings, None, [counts])
        batch = left_padded([prompt.fused for prompt in prompts])
        room = self._room(batch.inputs_embeds.shape[1], settings)
        began = time.perf_counter()
        answers, times = generate_batch(self.model, batch, max_tokens=room, temperature=temperature)
        for counts, ids in zip(stats, answers, strict=True):
            counts.seconds["prefill"] += (times[0] - began) / len(requests)
            counts.seconds["generation"] += (times[-1] - times[0]) / len(requests)
            counts.answer_tokens = len(ids)
            counts.finish_reason = "stop" if ids[-1] in stop_ids(self.model) else "length"
        return [Answer(self._decode(ids), counts) for ids, counts in zip(answers, stats, strict=True)]

    def chat(
        self, media: Media = (), settings: AnswerSettings | None = None, progress: Progress | None = None
    ) -> Conversation:
        """Begin a conversation about some images and videos.

        Args:
            media: as in ``ask``, but no iterators: each turn reads them again.
            settings: how all its answers are made.
            progress: called with the numbers of frames read so far and in all.
        """
        return Conversation(lambda messages: self.stream_messages(messages, settings, progress), media)

    def watch(
        self,
        source: str | Path,
        *,
        question: str | None = None,
        window: int | None = None,
        fps: float = 1.0,
        max_tokens: int = 512,
        temperature: float = 0.0,
        waiting: int = 8,
        speed: float = 1.0,
    ) -> Watch:
        """Watch a live stream; see ``inference.watch`` for what may be asked and what it costs.

        Args:
            source: ``rtsp://...`` or another network stream, ``camera:0``, or a video file, played in real time.
            question: a standing question about everything seen so far.
            window: keep the last so many frames, for any question. Without it and without ``question`` all frames are
                kept in the engine's cache.
            fps: frames per second that are looked at.
            max_tokens: as in ``ask``.
            temperature: as in ``ask``.
            waiting: most frames that wait while the model is busy; older ones are dropped and counted.
            speed: how much faster than in reality a file is played.

        Raises:
            ValueError: a number out of range, a file that is not there, a question and a window.
        """
        settings = AnswerSettings(max_tokens=max_tokens, temperature=temperature)
        return Watch(
            self._reader,
            self.processor,
            lambda fused, stats: self._continue(KeyedPrompt(fused=fused, key=None), settings, stats),
            LiveSource(source, fps=fps, waiting=waiting, speed=speed),
            question=question,
            window=window,
            answer_tokens=max_tokens,
        )

    def stream_messages(
        self, messages: list[Message], settings: AnswerSettings | None = None, progress: Progress | None = None
    ) -> AnswerStream:
        """Answer the last of some messages in transformers' chat format, piece by piece."""
        stats = Stats()
        return AnswerStream(self._pieces(messages, settings or AnswerSettings(), progress, stats), stats)

    def _pieces(
        self, messages: list[Message], settings: AnswerSettings, progress: Progress | None, stats: Stats
    ) -> Generator[str]:
        (prompt,) = self._fuse([messages], settings, progress, [stats])
        yield from self._continue(prompt, settings, stats)

    def _continue(self, prompt: KeyedPrompt, settings: AnswerSettings, stats: Stats) -> Generator[str]:
        """Give the answer to a prompt, piece by piece."""
        max_tokens = self._room(prompt.fused.inputs_embeds.shape[1], settings)
        with closing(self._tokens(prompt, max_tokens, settings.temperature, stats)) as tokens:
            yield from text_pieces(tokens, self._decode)

    def _room(self, length: int, settings: AnswerSettings) -> int:
        """How many tokens an answer to a prompt of some length may have; cut with a warning to what is left."""
        room = self._context - length
        if settings.max_tokens > room:
            warnings.warn(
                f"max_tokens is cut from {settings.max_tokens} to {room}: the prompt has {length} tokens and the "
                f"model's context {self._context}.",
                stacklevel=3,
            )
        return min(settings.max_tokens, room)

    @torch.inference_mode()
    def _fuse(
        self,
        conversations: Sequence[list[Message]],
        settings: AnswerSettings,
        progress: Progress | None,
        stats: Sequence[Stats],
    ) -> list[KeyedPrompt]:
        """Everything before the language model, for conversations about the same media.

        Fills the counts and times of ``stats`` up to there; each conversation gets its share of the time.
        """
        inputs = [
            self.processor.stream(
                messages, num_frames=settings.num_frames, fps=settings.fps, all_frames=settings.all_frames
            )
            for messages in conversations
        ]
        media = cast("MediaStream | None", inputs[0].pixel_values)
        tokens_per_frame = self.model.config.tokens_per_frame
        num_slots = len(media) if media is not None else 0
        for one, counts in zip(inputs, stats, strict=True):
            counts.text_tokens = one.input_ids.shape[1] - num_slots
            self._check_length(counts, num_slots)
            if settings.num_frames is not None and any(part["type"] == "video" for part in _parts(conversations[0])):
                promised = settings.num_frames * tokens_per_frame
                self._check_length(replace(counts, frames=settings.num_frames, vision_tokens=promised), num_slots)

        def count(num_frames: int, total: int | None) -> None:
            for counts in stats:
                counts.frames += num_frames
                counts.vision_tokens += num_frames * tokens_per_frame
                self._check_length(counts, num_slots)
            if progress is not None:
                progress(stats[0].frames, total)

        batch, reading, shared = _to_device(joined(inputs), self.model.device), Reading(), Stats()
        clock = Clock(shared.seconds, self.model.device)
        if media is None:
            fused = self.model.fuse(batch)
        else:
            fusion, text = StreamedFusion(self.model, batch), self.model.text_before_frames(batch)
            with closing(self._reader.read(media, text, reading, clock, count)) as chunks:
                for chunk in chunks:
                    clock.timed("prefusion", fusion.add)(chunk)
            fused = fusion.prompt()
        clock.settle()
        for row, counts in enumerate(stats):
            counts.cached_frames = reading.num_cached
            for part, seconds in shared.seconds.items():
                counts.seconds[part] += seconds / len(stats)
            counts.vision_tokens = int((fused.input_ids[row] == self.model.config.image_token_id).sum())
        if self.model.reducer.drops_inside:
            return [keyed_prompt(fused, row, None) for row in range(len(inputs))]
        context = (self._state.language(), *reading.keys)
        # Frames that are reduced for a question fit no other one.
        asked = [str(ids) if self.model.reducer.reads_question else "" for ids in fused.input_ids.tolist()]
        return [keyed_prompt(fused, row, (*context, asked[row])) for row in range(len(inputs))]

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

    def _tokens(self, prompt: KeyedPrompt, max_tokens: int, temperature: float, stats: Stats) -> Generator[int]:
        """Ids of the answer. Fills the rest of ``stats``."""
        cache = self.prompts.take(prompt.key) if prompt.key is not None else DynamicCache()
        stats.cached_tokens = cache.get_seq_length()
        ids: list[int] = []
        before = time.perf_counter()
        made = generate_tokens(self.model, prompt.fused, max_tokens=max_tokens, temperature=temperature, cache=cache)
        with closing(made):
            try:
                for token_id, at in made:
                    stats.seconds["generation" if ids else "prefill"] += at - before
                    stats.answer_tokens += 1
                    before = at
                    ids.append(token_id)
                    yield token_id
            except GeneratorExit:
                made.close()  # only when the model has stopped are all layers equally long
                self._keep(prompt, ids, cache)
                raise
        self._keep(prompt, ids, cache)
        stats.finish_reason = "stop" if ids[-1] in stop_ids(self.model) else "length"

    def _keep(self, prompt: KeyedPrompt, ids: list[int], cache: DynamicCache) -> None:
        if prompt.key is not None:
            self.prompts.put(prompt.key.extended(ids), cache)

    def _decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def _context(self) -> int:
        return self.model.config.text.max_position_embeddings


def _parts(messages: list[Message]) -> Iterator[Part]:
    """All typed parts of some messages."""
    for message in messages:
        yield from (part for part in message["content"] if isinstance(part, dict))


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
