r"""Records in the format of LLaVA become samples.

A record is an object with ``id``, perhaps ``image``, ``images`` or ``video`` (a path, a list of paths, or null), and
``conversations``, a list of turns ``{"from": "human", "value": "<image>\nWhat is it?"}``. In shards media may also be
bytes, or structs of bytes and path. In turns of a human each mark ``<image>`` or ``<video>`` is the place of a file. A
record without images may call its videos ``<image>``, as some published files do. In answers and system texts a mark is
no mark but what somebody wrote.

Two habits of the released code are kept, so that its files teach what they did (spec of the released code, 2.3): what
an assistant says before the first question is left out, and where a turn has all its media side by side they come
first, on lines of their own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llava_mini.data.samples import Kind, MediaFile, Sample

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
"""Who speaks in a record, with the role in the chat format of transformers."""

BYTES_OF_AN_IMAGE = 2304
"""What an image adds to the length of a record: its 576 patches in pre-fusion, as words of 4 bytes a token."""

MEDIA_KEYS: dict[Literal["image", "video"], tuple[str, str]] = {
    "image": ("image", "images"),
    "video": ("video", "videos"),
}
"""Where the media of each kind are, one or several."""

_NO_MEDIA = (None, "", [], {"bytes": None, "path": None})
_MARKS = re.compile(r"<(image|video)>")


def sample_from_record(record: Any, *, name: str, media_folder: Path | None) -> Sample:
    """Return what a record teaches.

    Args:
        record: As read from JSON or a shard; keys that are not named above are left alone.
        name: What the sample is called, in messages too.
        media_folder: Where its paths start. None: paths are refused.

    Raises:
        ValueError: The record is malformed, marks and files do not agree, or nothing is taught.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"Record {name!r} is a JSON {type(record).__name__}, not an object.")
    media = [
        MediaFile(kind=kind, source=source)
        for kind in MEDIA_KEYS
        for source in _sources(record, kind, name, media_folder)
    ]
    turns = _turns(record.get("conversations"), name)
    found = [mark for role, text in turns if role == "user" for mark in _MARKS.findall(text)]
    if media and all(medium.kind == "video" for medium in media):
        found = ["video"] * len(found)
    if sorted(found) != sorted(medium.kind for medium in media):
        raise ValueError(
            f"Record {name!r} has {_count(found)} in its questions, but names {_count([m.kind for m in media])}. Each "
            "file needs one mark, <image> or <video>; is a file missing, or a mark typed as text?"
        )
    if not any(role == "assistant" for role, _ in turns):
        raise ValueError(f"Record {name!r} has no answer, so it teaches nothing. Give a turn from 'gpt'.")
    kinds = iter(found)
    messages = tuple(
        {"role": role, "content": _parts(text, kinds) if role == "user" else [{"type": "text", "text": text}]}
        for role, text in turns
    )
    supply = {kind: iter([medium for medium in media if medium.kind == kind]) for kind in MEDIA_KEYS}
    return Sample(id=name, messages=messages, media=tuple(next(supply[kind]) for kind in found))


def outline(record: Any) -> tuple[Kind, int]:
    """Return the kind of a record and its length, without checking it.

    The length is the bytes of its words in UTF-8, and ``BYTES_OF_AN_IMAGE`` for each image. What cannot be a record is
    text of length 0: reading it as a sample says what is wrong.
    """
    if not isinstance(record, Mapping):
        return "text", 0
    num_files = {kind: sum(_num_files(record.get(key)) for key in keys) for kind, keys in MEDIA_KEYS.items()}
    turns = record.get("conversations")
    values = [turn.get("value") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    length = sum(len(value.encode("utf-8", "surrogatepass")) for value in values if isinstance(value, str))
    length += BYTES_OF_AN_IMAGE * num_files["image"]
    by_images: tuple[Kind, ...] = ("text", "image", "multi-image")
    return "video" if num_files["video"] else by_images[min(num_files["image"], 2)], length


def _num_files(value: Any) -> int:
    """How many files a field holds: a path, bytes or a struct is one; null, nothing and what is malformed are none."""
    if isinstance(value, list):
        return len(value)
    return int(isinstance(value, str | bytes | Mapping) and value not in _NO_MEDIA)


def _sources(
    record: Mapping[str, Any], kind: Literal["image", "video"], name: str, media_folder: Path | None
) -> list[str | Path | bytes]:
    given = {key: record[key] for key in MEDIA_KEYS[kind] if record.get(key) not in _NO_MEDIA}
    if len(given) > 1:
        raise ValueError(f"Record {name!r} has files under {' and '.join(map(repr, given))}. Keep one of them.")
    return [
        _source(medium, f"Record {name!r}", key, media_folder)
        for key, value in given.items()
        for medium in (value if isinstance(value, list) else [value])
    ]


def _source(medium: Any, record: str, key: str, media_folder: Path | None) -> str | Path | bytes:
    """Bytes, or a path below the folder. Addresses stay: then the refusal to fetch them can name them."""
    source = medium
    if isinstance(medium, Mapping):
        source = medium["bytes"] if isinstance(medium.get("bytes"), bytes) else medium.get("path")
    if not isinstance(source, str | bytes) or not source:
        raise ValueError(
            f"{record} has {str(medium)[:80]!r} under {key!r}, which is no path or list of paths; in shards bytes and "
            "structs of bytes and path can stand there too."
        )
    if isinstance(source, bytes) or source.startswith("data:") or "://" in source:
        return source
    if media_folder is None:
        raise ValueError(f"{record} names the file {source!r}, but there is no folder of media. Give one.")
    return media_folder / source


def _turns(conversations: Any, name: str) -> list[tuple[str, str]]:
    """Roles and texts from the first question or system text on, checked."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise ValueError(
            f"Record {name!r} has no list of turns under 'conversations'. Write it as "
            "[{'from': 'human', 'value': ...}, {'from': 'gpt', 'value': ...}]."
        )
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(conversations, 1):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(
                f"Turn {number} of record {name!r} is from {speaker!r}; it must be from {', '.join(ROLES)}."
            )
        if not isinstance(text, str):
            raise ValueError(f"Turn {number} of record {name!r} holds {type(text).__name__} under 'value', not a text.")
        if role == "assistant" and not any(before == "user" for before, _ in turns):
            continue
        if role == "assistant" and not text.strip():
            raise ValueError(f"Turn {number} of record {name!r} is an empty answer: it would teach to say nothing.")
        if role == "system" and turns:
            raise ValueError(f"Turn {number} of record {name!r} is a system text, which must come first and only once.")
        if turns and turns[-1][0] == role:
            raise ValueError(f"Turn {number} of record {name!r} is from {speaker!r} like the turn before it.")
        turns.append((role, text))
    return turns


def _parts(text: str, kinds: Iterator[str]) -> list[dict[str, str]]:
    """A question as typed parts. kinds: of the media that come, in order, whatever their marks are called."""
    pieces = _MARKS.split(text)[::2]  # what stands between marks
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    between = [piece for piece in pieces[1:-1] if piece.strip()]
    if not between and not (pieces[0].strip() and pieces[-1].strip() and len(pieces) > 2):
        words = "".join(pieces).strip()
        media = [{"type": next(kinds)} for _ in pieces[1:]]
        return [*media, {"type": "text", "text": words}] if words else media
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": next(kinds)})
            piece = piece.removeprefix("\r").removeprefix("\n")  # the processor puts a new line there
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _count(kinds: Sequence[str]) -> str:
    """``1 image and 2 videos``."""
    counted = [f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) != 1)}" for kind in MEDIA_KEYS if kind in kinds]
    return " and ".join(counted) or "no image and no video"
