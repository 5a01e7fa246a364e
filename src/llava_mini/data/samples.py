"""Conversations with references to their media: what training reads before anything is opened.

A ``Sample`` holds text and the names of files. It costs no more than its words, so it can travel between processes;
pictures and films are decoded where a batch is made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["text", "image", "multi-image", "video"]
"""What a sample shows. ``video`` if there is one, whatever else there is."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""All kinds, in the order of the numbers that stand for them in arrays."""


@dataclass(frozen=True, kw_only=True)
class MediaFile:
    """A reference to an image or a video. Nothing is opened."""

    kind: Literal["image", "video"]
    source: str | Path | bytes
    """A path, a ``data:`` address of an image, or the encoded bytes of a streamed record."""

    def __str__(self) -> str:
        """The source in words, for messages: bytes and ``data:`` addresses only say their size."""
        if isinstance(self.source, bytes):
            return f"{len(self.source)} bytes of a record"
        if str(self.source).startswith("data:"):
            return f"a data: address of {len(str(self.source))} characters"
        return str(self.source)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation to be learned."""

    id: str
    """``SOURCE/RECORD``: the name of the source, and the id in it or the number of the record. Unique in a mixture."""
    messages: tuple[dict[str, Any], ...]
    """In the chat format of transformers, ``content`` a list of typed parts. A medium is ``{"type": "image"}`` or
    ``{"type": "video"}`` in its place; text is what somebody typed, whatever control tokens it spells."""
    media: tuple[MediaFile, ...] = ()
    """In the order of their parts."""

    def __post_init__(self) -> None:
        parts = [part["type"] for message in self.messages for part in message["content"] if part["type"] != "text"]
        given = [medium.kind for medium in self.media]
        if parts != given:
            raise ValueError(
                f"The messages of sample {self.id!r} have places for {', '.join(parts) or 'no media'}, but its media "
                f"are {', '.join(given) or 'none'}. Give one file for each part, in the order of the parts."
            )

    @property
    def kind(self) -> Kind:
        """What it shows."""
        kinds = [medium.kind for medium in self.media]
        if "video" in kinds:
            return "video"
        return ("text", "image", "multi-image")[min(len(kinds), 2)]

    def captioned(self) -> "Sample":
        """Return media and caption, as in stage 1 of LLaVA: the first question without its words, and its answer.

        Raises:
            ValueError: The first question shows nothing, or has no answer.
        """
        roles = [message["role"] for message in self.messages]
        asked = roles.index("user") if "user" in roles else len(roles)
        if roles[asked : asked + 2] != ["user", "assistant"]:
            raise ValueError(f"Sample {self.id!r} has no caption: no answer follows its first question.")
        question, answer = self.messages[asked : asked + 2]
        shown = [part for part in question["content"] if part["type"] != "text"]
        if not shown:
            raise ValueError(
                f"Sample {self.id!r} has no caption: its first question shows no image or video. Leave text out of "
                "stage 1, or keep the questions."
            )
        return Sample(id=self.id, messages=({**question, "content": shown}, answer), media=self.media[: len(shown)])

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages with the sources of media in their parts, as the processor reads them."""
        media = iter(self.media)
        return [
            {
                "role": message["role"],
                "content": [
                    part if part["type"] == "text" else {"type": part["type"], part["type"]: next(media).source}
                    for part in message["content"]
                ],
            }
            for message in self.messages
        ]
