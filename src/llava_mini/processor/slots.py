"""Which image or video belongs to which place in the prompts of a batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from llava_mini.processor.prompt import Kind, Slot
from llava_mini.processor.video import kind_of_file


def fill_slots(slots: Sequence[Sequence[Slot]], images: Any, videos: Any) -> list[list[Slot]]:
    """Give every slot without a source one of the images or videos, in order.

    Args:
        slots: of each prompt.
        images: none, one, a list for the batch, or a list for each prompt.
        videos: the same. Where the prompts have no slot for videos and no images are given, they fill those for images.

    Raises:
        ValueError: there are more or fewer than slots.
    """
    empty = [slot.kind for prompt in slots for slot in prompt if slot.source is None]
    as_videos = videos is not None and images is None and "video" not in empty
    filled = [
        [Slot(kind="video", source=None) if as_videos and slot.source is None else slot for slot in prompt]
        for prompt in slots
    ]
    supplies: dict[Kind, Iterator[Any]] = {
        "image": _supply("image", images, filled),
        "video": _supply("video", videos, filled),
    }
    return [
        [Slot(kind=s.kind, source=next(supplies[s.kind])) if s.source is None else s for s in prompt]
        for prompt in filled
    ]


def _supply(kind: Kind, given: Any, slots: Sequence[Sequence[Slot]]) -> Iterator[Any]:
    """The given media of one kind in order, as many as there are empty slots."""
    wanted = [sum(slot.kind == kind and slot.source is None for slot in prompt) for prompt in slots]
    nested = _nested(kind, given)
    if nested is None:
        media = [] if given is None else _flat(kind, given)
        if len(media) != sum(wanted):
            raise ValueError(
                f"The prompts have {sum(wanted)} places for {kind}s, but {len(media)} {kind}s were given. Give one "
                f"{kind} for each {kind} part or <{kind}>, in their order."
            )
        return iter(media)
    if len(nested) != len(slots):
        raise ValueError(
            f"{len(nested)} lists of {kind}s were given for {len(slots)} prompts. Give one list for each prompt, which "
            "may be empty."
        )
    for index, (media, places) in enumerate(zip(nested, wanted, strict=True)):
        if len(media) != places:
            raise ValueError(
                f"Prompt {index} has {places} places for {kind}s, but {len(media)} {kind}s were given for it. Give one "
                f"{kind} for each {kind} part or <{kind}>, in their order."
            )
    return iter([medium for media in nested for medium in media])


def _nested(kind: Kind, given: Any) -> list[list[Any]] | None:
    """The media by prompt, if they were given so."""
    if not isinstance(given, list | tuple) or not given:
        return None
    if not all(entry is None or isinstance(entry, list | tuple) for entry in given):
        return None
    if kind == "video" and all(entry and all(_is_frame(item) for item in entry) for entry in given):
        return None
    return [list(entry or ()) for entry in given]


def _flat(kind: Kind, given: Any) -> list[Any]:
    """A list of media; one medium is a list of one."""
    if not isinstance(given, list | tuple):
        array = isinstance(given, np.ndarray | Tensor)
        return list(given) if array and given.ndim == (4 if kind == "image" else 5) else [given]
    if kind == "video" and given and all(_is_frame(item) for item in given):
        return [given]
    return list(given)


def _is_frame(item: Any) -> bool:
    """Whether this is a picture rather than a video."""
    if isinstance(item, str | Path):
        return kind_of_file(item) == "image"
    return isinstance(item, Image.Image | bytes) or (isinstance(item, np.ndarray | Tensor) and item.ndim < 4)
