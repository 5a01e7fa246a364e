"""What can be asked of a call of the processor, besides its media."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llava_mini.processor.video import FrameSampling


@dataclass(frozen=True, kw_only=True)
class ProcessingOptions:
    """What else can be asked of a call of the processor."""

    padding: bool | str | None = None
    """Whether prompts are made equally long; "max_length" for that length. None: where a tensor needs it."""
    padding_side: Literal["left", "right"] = "left"
    """Left for generation."""
    max_length: int | None = None
    """Longer prompts are refused, never cut."""
    return_labels: bool = False
    """Whether to add ``labels``: the ids of answers, -100 elsewhere."""
    return_metadata: bool = False
    """Whether to add ``video_metadata``: number and times of the frames of each video."""
    num_frames: int | None = None
    """Frames of each video, evenly spread."""
    fps: float | None = None
    """Frames per second of each video. By default one."""
    all_frames: bool = False
    """Every frame of each video."""
    max_frames: int | None = None
    """Never more of one video than this."""

    def __post_init__(self) -> None:
        if self.padding not in (None, False, True, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding is True, False, 'longest' or 'max_length'; got {self.padding!r}.")
        if self.padding == "do_not_pad":
            object.__setattr__(self, "padding", False)
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding='max_length' needs max_length.")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is 'left' or 'right', got {self.padding_side!r}.")
        _ = self.sampling  # checks what it is made of

    @property
    def sampling(self) -> FrameSampling:
        """Which frames of videos are seen."""
        return FrameSampling(
            num_frames=self.num_frames, fps=self.fps, all_frames=self.all_frames, max_frames=self.max_frames
        )


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "truncation": (None, False),
    "tools": (None,),
    "documents": (None,),
    "sanitize_control_tokens": (None, False, True),
    "load_audio_from_video": (False,),
    "do_sample_frames": (None, True),
    "pad_to_multiple_of": (None,),
    "add_special_tokens": (None, False),  # of messages: the template writes them
}
"""Arguments of transformers that are accepted with values that change nothing: messages are always sanitised."""


def read_options(kwargs: Mapping[str, Any]) -> tuple[ProcessingOptions, Any, Any]:
    """Options, and the images and videos given apart from messages.

    Raises:
        ValueError: one is not known.
    """
    rest = dict(kwargs)
    images, videos = rest.pop("images", None), rest.pop("videos", None)
    for name, values in _NEUTRAL.items():
        value = rest.pop(name, values[0])
        if not any(value is allowed for allowed in values):
            raise ValueError(f"{name}={value!r} is not supported by this processor. Leave it out.")
    known = list(ProcessingOptions.__dataclass_fields__)
    if unknown := sorted(set(rest) - set(known)):
        raise ValueError(f"The processor has no option {unknown[0]!r}. The options are: {', '.join(known)}.")
    return ProcessingOptions(**rest), images, videos
