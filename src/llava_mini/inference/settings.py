"""What can be asked of an engine, and what it keeps."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from llava_mini.inference.frame_reader import Kept
from llava_mini.inference.media import Media
from llava_mini.processor.video import FrameSampling


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How an answer is made."""

    max_tokens: int = 512
    """Stop after so many tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0, tokens are drawn."""
    num_frames: int | None = None
    """Frames of a video, evenly spread. None: as ``fps`` and ``all_frames`` say."""
    fps: float | None = None
    """Frames of a video per second. None: one."""
    all_frames: bool = False
    """Every frame of a video."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}.")
        FrameSampling(num_frames=self.num_frames, fps=self.fps, all_frames=self.all_frames)  # refuses what is wrong


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question with what it is about."""

    question: str
    media: Media = ()
    """As in ``Engine.ask``."""


@dataclass(frozen=True, kw_only=True)
class Caching:
    """What an engine keeps for later questions, to make them cheaper.

    Answers stay what they are, but for the order in which sums are taken: in 16 bits a tie may fall otherwise.
    """

    frame_bytes: int = 2**30
    """Most bytes of the CPU's memory for frames; those not used for longest go first. 0: nothing is kept there."""
    prompt_bytes: int = 2**30
    """Most bytes of the device's memory for the language model's keys and values of earlier prompts."""
    folder: Path | str | None = None
    """Where frames are kept on disk, for this process and later ones. It grows without a limit. None: nowhere."""
    kept: Kept = "keys_values"
    """Of a frame: all that a question needs, or ``features``, the vision tower's output, which takes a fraction of the
    room and leaves reduction, projection and pre-fusion to be run again."""

    def __post_init__(self) -> None:
        if self.kept not in get_args(Kept):
            raise ValueError(f"kept is one of {', '.join(get_args(Kept))}; got {self.kept!r}.")
        if self.folder is not None and not isinstance(self.folder, Path | str):
            raise ValueError(f"folder is a path, got {self.folder!r}.")
        for name in ("frame_bytes", "prompt_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"A cache has room for 0 bytes or more, got {name}={getattr(self, name)}.")


NO_CACHING = Caching(frame_bytes=0, prompt_bytes=0)
"""Everything is computed for every question."""
