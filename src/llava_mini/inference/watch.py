"""Watching a live stream: at any moment there is an answer about what was seen so far.

The text of a prompt is fused with every frame and averaged over all of them, so an answer about other frames is another
prompt. What is kept decides what may be asked, and what it costs:

- A standing question: its text reads each frame once, when it comes, and only the sum and the vision tokens are
  kept. An answer costs one pass of the language model. No other question can be asked.
- A window: the last N frames are kept with their keys and values. Any question can be asked about them; its text reads
  them all.
- Everything: all frames stay in a cache, on disk for a long stream. Any question can be asked about all of them; its
  text reads them all.

All three are exact: the answer is that of ``Engine.ask`` about the same frames.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self, cast

import torch

from llava_mini.flow import FrameChunk, FusedPrompt, ModelInputs, SeenChunk, SeenFrames, sent
from llava_mini.inference.answer import AnswerStream
from llava_mini.inference.frame_reader import FrameReader
from llava_mini.inference.media import user_message
from llava_mini.inference.stats import Clock, Stats
from llava_mini.inference.video_stream import LiveSource
from llava_mini.model.streamed import StreamedFusion
from llava_mini.processor.processor import LlavaMiniProcessor

Respond = Callable[[FusedPrompt, Stats], Generator[str]]
"""Answers a prompt, piece by piece."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """How far a watch has come."""

    time: float
    """Seconds of the stream at the last frame."""
    frames: int
    """Frames seen so far."""
    dropped: int
    """Frames that came while the model was busy and were not seen."""


class Watch(Iterator[Moment]):
    """A stream that is watched; made by ``Engine.watch`` and used in a ``with``.

    Each step of the iteration looks at the frames that wait; ``ask`` answers about what is kept.
    """

    def __init__(
        self,
        reader: FrameReader,
        processor: LlavaMiniProcessor,
        respond: Respond,
        source: LiveSource,
        *,
        question: str | None,
        window: int | None,
        answer_tokens: int,
    ) -> None:
        if question is not None and window is not None:
            raise ValueError("A standing question is about all frames and goes without a window. Give one of them.")
        if window is not None and window < 1:
            raise ValueError(f"A window holds at least one frame, got {window}.")
        if question is None and window is None and not reader.cache.keeps_anything:
            raise ValueError(
                "All frames are to be kept, but the engine's cache keeps none. Give a question or a window."
            )
        self.question = question
        """The standing question."""
        self.window = window
        """Most frames that are kept. None: all, or with a standing question none."""
        self.began_anew = 0
        """How often a standing question had seen as many frames as the model's context holds, and began again."""
        self.moment = Moment(time=0.0, frames=0, dropped=0)
        """How far the watch has come."""
        self._model, self._reader, self._processor = reader.model, reader, processor
        self._respond, self._source = respond, source
        self._keys: list[str] = []
        context = self._model.config.text.max_position_embeddings
        self._room = max(context - answer_tokens, context // 2)
        """Most tokens of a prompt: an answer needs some of the context."""
        self._lock = Lock()
        self._kept: deque[SeenFrames] = deque(maxlen=window)
        self._fusion = self._new_fusion(question) if question is not None else None
        self._check_length("?", window or 1)
        self._beginning = self._model.text_before_frames(self._inputs("?"))

    def __enter__(self) -> Self:
        self._source.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._source.__exit__(*error)

    @torch.inference_mode()
    def __next__(self) -> Moment:
        frames = self._source.take()
        if not frames:
            raise StopIteration
        images = [frame.image for frame in frames]
        with self._lock:
            for chunk in cast("Sequence[FrameChunk]", self._inputs("?", images).pixel_values):
                if self._fusion is not None:
                    self._read_standing(chunk)
                else:
                    self._keep(chunk)
            seen = self.moment.frames + len(frames)
            self.moment = Moment(time=frames[-1].time, frames=seen, dropped=self._source.dropped)
            return self.moment

    def ask(self, question: str | None = None) -> AnswerStream:
        """Answer about what is kept now, piece by piece.

        Args:
            question: what to ask; left out with a standing question, and only then.

        Raises:
            ValueError: nothing was seen yet; a question where there is a standing one, or none where there is not;
                frames that are no longer in the cache, or more than the model's context holds.
        """
        if question is None and self.question is None:
            raise ValueError("There is no standing question: say what to ask.")
        if question is not None and self.question is not None:
            raise ValueError(
                f"This watch has the standing question {self.question!r} and can answer no other. Watch with a window "
                "to ask anything at any time."
            )
        if self.moment.frames == 0:
            raise ValueError("Nothing was seen yet. Wait for the first frame.")
        stats = Stats()
        clock = Clock(stats.seconds, self._model.device)
        with self._lock:
            prompt = self._prompt(question, clock)
            clock.settle()
        stats.frames = stats.cached_frames = prompt.num_frames[0]
        stats.vision_tokens = stats.frames * self._model.config.tokens_per_frame
        stats.text_tokens = prompt.input_ids.shape[1] - stats.vision_tokens
        return AnswerStream(self._respond(prompt, stats), stats)

    @torch.inference_mode()
    def _prompt(self, question: str | None, clock: Clock) -> FusedPrompt:
        if question is None:
            assert self._fusion is not None
            return clock.timed("prefusion", self._fusion.prompt)()
        self._check_length(question, len(self._kept) or len(self._keys))
        fusion = self._new_fusion(question)
        all_frames = self._reader.recall(self._keys, self._beginning, clock)
        for seen in self._windowed() if self.window is not None else all_frames:
            clock.timed("prefusion", fusion.add)(SeenChunk(seen=seen, slot=0))
        return clock.timed("prefusion", fusion.prompt)()

    def _windowed(self) -> Iterator[SeenFrames]:
        """The frames of the window, as many at a time as go through the model."""
        frames = iter(self._kept)
        while some := list(itertools.islice(frames, self._model.frames_per_pass)):
            yield SeenFrames.join(some)

    def _check_length(self, question: str, frames: int) -> None:
        """Refuse a prompt that leaves no room for an answer."""
        text = self._new_fusion(question).length
        length = text + frames * self._model.config.tokens_per_frame
        if length > self._room:
            fitting = (self._room - text) // self._model.config.tokens_per_frame
            raise ValueError(
                f"{frames} frames and the question make a prompt of {length} tokens, but the model's context has room "
                f"for {self._room} besides the answer. Watch with a window of at most {max(fitting, 1)} frames."
            )

    def _read_standing(self, chunk: FrameChunk) -> None:
        """Let the standing question read frames; when the context is full, it begins again."""
        assert self._fusion is not None
        more = len(chunk.pixel_values) * self._model.config.tokens_per_frame
        if any(self._fusion.counts) and self._fusion.length + more > self._room:
            self._fusion = self._new_fusion(cast(str, self.question))
            self.began_anew += 1
        self._fusion.add(chunk)

    def _keep(self, chunk: FrameChunk) -> None:
        if self.window is None:
            self._keys += self._reader.keep(chunk.pixel_values, self._beginning)
            return
        for pixels in chunk.pixel_values.split(self._model.frames_per_pass):
            self._kept.extend(self._model.see(sent(pixels, self._model.device), self._beginning).split(1))

    def _new_fusion(self, question: str) -> StreamedFusion:
        return StreamedFusion(self._model, self._inputs(question))

    def _inputs(self, question: str, images: Sequence[Any] = ()) -> ModelInputs:
        inputs = self._processor.stream([user_message(question, [{"type": "video", "video": list(images)}])])
        ids = inputs.input_ids.to(self._model.device)
        return ModelInputs(input_ids=ids, pixel_values=inputs.pixel_values)
