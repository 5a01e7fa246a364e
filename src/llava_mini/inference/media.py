"""What people ask about, as parts of a message in transformers' chat format."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from llava_mini.processor.video import kind_of_file

Part = dict[str, Any]
"""``{"type": "image", "image": ...}``, ``{"type": "video", "video": ...}`` or ``{"type": "text", "text": ...}``."""

Message = dict[str, Any]
"""``{"role": ..., "content": [parts]}``."""

Medium = str | Path | Image.Image | np.ndarray | Tensor | Iterator[Any] | Mapping[str, Any]
"""An image or a video: a file, a PIL image, an array (with 4 dimensions it is a video), an iterator of frames (a
video), or a part that says what it is. An animated picture file is a video."""

Media = Medium | Sequence[Medium]
"""One, or several in the order in which the question speaks of them."""


def media_parts(media: Media) -> list[Part]:
    """Say of each medium whether it is an image or a video; a file is looked into.

    Raises:
        ValueError: a file is missing, or one of the media is neither.
    """
    if isinstance(media, Sequence) and not isinstance(media, (str, bytes)):
        return [_part(medium) for medium in media]
    return [_part(media)]


def user_message(text: str, parts: list[Part]) -> Message:
    """A question about some media, which stand before it."""
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _part(medium: Medium) -> Part:
    if isinstance(medium, Mapping):
        return dict(medium)
    kind = _kind(medium)
    return {"type": kind, kind: medium}


def _kind(medium: Medium) -> str:
    if isinstance(medium, str | Path):
        return "image" if str(medium).startswith("data:") else kind_of_file(medium)
    if isinstance(medium, (Image.Image, bytes)):
        return "image"
    if isinstance(medium, np.ndarray | Tensor):
        return "video" if medium.ndim == 4 else "image"
    if isinstance(medium, Iterator):
        return "video"
    raise ValueError(
        f"A {type(medium).__name__} is neither an image nor a video. Give a file, a PIL image, an array, an iterator "
        "of frames, or a message part such as {'type': 'video', 'video': [frames]}."
    )
