"""Several questions about the same images and videos, each with the earlier turns before it."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from llava_mini.inference.answer import AnswerStream
from llava_mini.inference.media import Media, Medium, Message, Part, assistant_message, media_parts, user_message
from llava_mini.inference.stats import Stats

Respond = Callable[[list[Message]], AnswerStream]
"""Answers the last of some messages."""


class Conversation:
    """A conversation with an engine; made by ``Engine.chat``.

    Every turn is answered from the whole conversation, so an answer depends on nothing but its messages.
    A turn that fails, or is stopped before its first word, is not part of it; when it fails, the
    files added for it are dropped too. What was said of an answer that is stopped later stays.
    """

    def __init__(self, respond: Respond, media: Media = ()) -> None:
        self._respond = respond
        self._media = _repeatable(media_parts(media))
        self._added: list[Part] = []
        self.messages: list[Message] = []
        """The turns so far, in transformers' chat format."""
        self.stats = Stats()
        """Of the last answer."""

    def say(self, text: str) -> AnswerStream:
        """Say something, and get the answer piece by piece.

        Raises:
            ValueError: there is no text, or a file cannot be read; the latter comes with the first piece.
        """
        first = [] if self.messages else self._media
        messages = [*self.messages, user_message(text, [*first, *self._added])]
        with self._dropping_added_files():
            stream = self._respond(messages)
        self.stats = stream.stats
        return AnswerStream(self._record(messages, stream), stream.stats)

    def add(self, medium: Medium) -> None:
        """Show one more image or video with the next question.

        Raises:
            ValueError: it is neither.
        """
        self._added += _repeatable(media_parts(medium))

    def reset(self) -> None:
        """Forget all turns and begin again with the images and videos that were there at the start."""
        self.messages = []
        self._added = []

    def _record(self, messages: list[Message], stream: AnswerStream) -> Generator[str]:
        try:
            with stream, self._dropping_added_files():
                yield from stream
        finally:
            if stream.text:
                self.messages = [*messages, assistant_message(stream.text)]
                self._added = []

    @contextmanager
    def _dropping_added_files(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError):
            self._added = []
            raise


def _repeatable(parts: list[Part]) -> list[Part]:
    """Parts that can be read at every turn.

    Raises:
        ValueError: one is an iterator, which can be read only once.
    """
    for part in parts:
        if isinstance(part.get(str(part["type"])), Iterator):
            raise ValueError(
                "A conversation reads its images and videos at every turn, but an iterator can be read only once. Give "
                "a file, an array or a list of frames, or ask a single question with Engine.ask."
            )
    return parts
