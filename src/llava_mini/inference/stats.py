"""What an answer took: tokens, frames, and seconds by part."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import torch

Part = Literal["media", "vision", "reduction", "prefusion", "prefill", "generation"]
Result = TypeVar("Result")

PARTS: dict[Part, str] = {
    "media": "media decode",
    "vision": "vision",
    "reduction": "reduction",
    "prefusion": "pre-fusion",
    "prefill": "prefill",
    "generation": "generation",
}
"""The parts of an answer in their order, with the names that people read."""


@dataclass(kw_only=True)
class Stats:
    """Counts and times of one answer. They grow while the answer does."""

    text_tokens: int = 0
    """Tokens of the prompt that are words: system prompt, earlier turns and question."""
    vision_tokens: int = 0
    """Tokens of the prompt that are frames."""
    frames: int = 0
    """Images and video frames."""
    cached_frames: int = 0
    """Of these, frames that did not go through the vision tower: known from before, or the same as one beside them."""
    cached_tokens: int = 0
    """Tokens of the prompt that the language model knew from an earlier prompt."""
    answer_tokens: int = 0
    """Tokens of the answer, with the one that ends it."""
    finish_reason: Literal["", "stop", "length"] = ""
    """``stop``: the model ended the answer; ``length``: ``max_tokens`` did. Empty: unfinished."""
    seconds: dict[Part, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """Seconds by part. ``media`` is what decoding and resizing were waited for, and finding and keeping frames took;
    ``prefill`` lasts to the first token of the answer, ``generation`` from there. On a GPU, which works meanwhile,
    parts overlap and ``media`` holds what was waited for the GPU before frames were kept."""

    def __str__(self) -> str:
        prompt = f"{self.text_tokens} text + {self.vision_tokens} vision tokens, {self.frames} frames"
        if self.cached_frames or self.cached_tokens:
            prompt += f" ({self.cached_tokens} tokens and {self.cached_frames} frames known from before)"
        parts = ", ".join(f"{label} {self.seconds[part]:.2f}" for part, label in PARTS.items())
        return f"prompt: {prompt}; answer: {self.answer_tokens} tokens; seconds: {parts}"


class Clock:
    """Adds up the seconds of the parts of one answer.

    A GPU works through what it is given while the next chunk is read and handed to it; marks among its work say how
    long each part took, so that nothing has to wait for a clock.
    """

    def __init__(self, seconds: dict[Part, float], device: torch.device) -> None:
        self.seconds = seconds
        self.device = device
        self._marks: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, part: Part, call: Callable[..., Result]) -> Callable[..., Result]:
        """``call``, with its time counted to ``part`` and its result as it is."""
        return partial(self._marked if self.device.type == "cuda" and part != "media" else self._waited, part, call)

    def settle(self) -> None:
        """Wait for the device, and count what it did."""
        if self._marks:
            torch.cuda.synchronize(self.device)
        for part, began, ended in self._marks:
            self._add(part, began.elapsed_time(ended) / 1000)
        self._marks.clear()

    def _waited(self, part: Part, call: Callable[..., Result], *args: object, **kwargs: object) -> Result:
        began = self._now()
        try:
            return call(*args, **kwargs)
        finally:
            self._add(part, self._now() - began)

    def _marked(self, part: Part, call: Callable[..., Result], *args: object, **kwargs: object) -> Result:
        began = self._mark()
        try:
            return call(*args, **kwargs)
        finally:
            self._marks.append((part, began, self._mark()))

    def _now(self) -> float:
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _add(self, part: Part, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
