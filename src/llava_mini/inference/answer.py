"""An answer, whole or while it is made."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Self

from llava_mini.inference.stats import Stats


@dataclass(frozen=True)
class Answer:
    """The answer to a question."""

    text: str
    stats: Stats
    """Tokens, frames and seconds by part."""

    def __str__(self) -> str:
        return self.text


class AnswerStream(Iterator[str]):
    """An answer while it is made: pieces of text that add up to it.

    ``text`` and ``stats`` grow with the answer. Closing it, or leaving its ``with``, stops the model.
    """

    def __init__(self, pieces: Generator[str], stats: Stats) -> None:
        self._pieces = pieces
        self.text = ""
        """What was said so far."""
        self.stats = stats
        """Tokens, frames and seconds by part."""

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Stop, if the answer has not ended by itself."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
