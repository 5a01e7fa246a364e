"""Questions and answers about an image or a video, as plain typed values."""

from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A phrase that names one thing or nothing, and what it names: known only in a drawn world."""

    phrase: str
    """As it stands in a question, after a space: ``red circle``."""
    path: tuple[tuple[float, float] | None, ...] = ()
    """Centre (x, y) in each frame, as shares of width and height, or None in a frame without it; one for an image.
    Empty: there is no such thing."""
    facts: tuple[tuple[str, int], ...] = ()
    """Names of properties with the number of their value: of the colour among all colours, and so on."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question with its answer."""

    question: str
    answer: str
    kind: str
    """What the question is about: ``colour``. Scores are given for each kind."""
    form: str
    """The pattern of the question with the names of things left out: all that a blind guess may go by."""
    choices: tuple[str, ...] = ()
    """Answers that can be made of the words of the question alone, in their order there."""
    nouns: tuple[Noun, ...] = ()
    """Things that the question names."""
    case: str = ""
    """What sets it apart from others of its form, though its words do not tell: ``a thing of the same shape``."""
    held_out: bool = False
    """Whether no training question is phrased like this one."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Turns of a conversation about at most one image or video."""

    turns: tuple[Turn, ...]
    image: Image.Image | None = None
    """None: the conversation is about a video, or about text alone."""
    video: tuple[Image.Image, ...] = ()
    """Frames in order; empty when there is no video."""
    things: tuple[Noun, ...] = ()
    """Things that are shown and can be named, with their places: known only in a drawn world."""

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("A Record has no turns. Give at least one question with its answer.")
        if self.image is not None and self.video:
            raise ValueError("A Record holds an image and a video. Give one of them.")

    def messages(self, *, last_answer: bool = True) -> list[dict[str, Any]]:
        """Return the conversation in the chat format of transformers, the image or video first.

        Args:
            last_answer: Whether the last answer is included; without it, it is what the model is asked.
        """
        media: list[dict[str, Any]] = []
        if self.image is not None:
            media.append({"type": "image", "image": self.image})
        if self.video:
            media.append({"type": "video", "video": list(self.video)})
        messages = []
        for turn in self.turns:
            messages.append({"role": "user", "content": [*media, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            media = []
        return messages if last_answer else messages[:-1]
