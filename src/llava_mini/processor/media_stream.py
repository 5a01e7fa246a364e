"""Images and videos as chunks of pixels, decoded while they are asked for."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from llava_mini.flow import FrameChunk
from llava_mini.processor.image import ViewSettings, make_views, to_rgb
from llava_mini.processor.prompt import Slot
from llava_mini.processor.video import FrameSampling, chunks, frames_of, nearest_square

FrameResize = Literal["nearest", "image_mode"]
"""``nearest``: a frame of a video is first squashed to 336 x 336 by nearest neighbour, whatever S is
(released); ``image_mode``: it is treated as an image."""

RELEASED_FRAME_SIDE = 336


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """All that pixels depend on besides the medium itself."""

    views: ViewSettings
    frame_resize: FrameResize
    sampling: FrameSampling
    max_pixels: int
    """Most pixels of an image or of a frame."""
    whole: bool = False
    """Whether a video that is damaged anywhere is refused instead of seen as far as it goes."""


class MediaStream(Iterable[FrameChunk]):
    """The images and videos of one conversation. Iterating reads all of them, ``chunks`` one."""

    def __init__(self, slots: Sequence[Slot], settings: ReadSettings, frames_per_chunk: int) -> None:
        self._slots = slots
        self._settings = settings
        self._frames_per_chunk = frames_per_chunk

    def __len__(self) -> int:
        """How many images and videos there are."""
        return len(self._slots)

    def __iter__(self) -> Iterator[FrameChunk]:
        for index in range(len(self)):
            yield from self.chunks(index)

    def source(self, index: int) -> Any:
        """Return where a medium comes from."""
        return self._slots[index].source

    def facts(self, index: int) -> object:
        """Return all that the pixels of a medium depend on besides its source: equal for equal pixels."""
        return self._slots[index].kind, self._settings

    def is_film(self, index: int) -> bool:
        """Return whether a medium is a video file."""
        slot = self._slots[index]
        return slot.kind == "video" and isinstance(slot.source, str | Path)

    def chunks(self, index: int) -> Generator[FrameChunk]:
        """Read one medium.

        Raises:
            ValueError: it is missing or damaged.
        """
        slot, settings = self._slots[index], self._settings
        if slot.kind == "image":
            picture = to_rgb(slot.source, max_pixels=settings.max_pixels)
            pixels = make_views(picture, settings.views)[None]  # [1, V, 3, S, S]
            yield FrameChunk(pixel_values=pixels, slot=index, total=1)
            return
        frames = frames_of(slot.source, settings.sampling, max_pixels=settings.max_pixels, whole=settings.whole)
        ready = ((self._frame_views(frame.image), frame.time, frame.total) for frame in frames)
        for chunk in chunks(ready, self._frames_per_chunk):
            yield FrameChunk(
                pixel_values=torch.stack([views for views, _, _ in chunk]),  # [F, V, 3, S, S]
                slot=index,
                times=tuple(time for _, time, _ in chunk if time is not None),
                total=chunk[0][2],
            )

    def _frame_views(self, image: Image.Image) -> Tensor:
        """One frame of a video: [V, 3, S, S]."""
        if self._settings.frame_resize == "nearest":
            image = nearest_square(image, RELEASED_FRAME_SIDE)
        return make_views(image, self._settings.views)
