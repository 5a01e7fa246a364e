"""The values that travel between stages, and the one alphabet of shapes.

Shapes, the same letters in every module:

    B  prompts in a batch          P  patches that a frame gives to pre-fusion
    T  tokens of a prompt          Q  reduced tokens, what a frame costs the language model
    F  frames (an image is one)    E  vision width
    V  views of a frame (HD)       D  language width

A frame is whatever takes ``Q`` tokens in the prompt: an image, or one frame of a video. The frames
of a batch stand in the order of their places in the prompts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]
"""Rotated keys and values of some rows of one layer, each [F, heads, rows, head width]."""


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU takes one of the host when it comes to it; without pinned memory it is waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, kw_only=True)
class FrameChunk:
    """A few consecutive frames of one image or video, ready for the vision tower."""

    pixel_values: Tensor
    """[F, V, 3, H, W], normalised."""
    slot: int
    """Which image or video of the batch they belong to, counted from 0 in prompt order."""
    times: tuple[float, ...] = ()
    """When each frame is shown, in seconds from the start. Empty for an image."""
    total: int | None = None
    """How many frames of the image or video there are in all. None: not known."""


@dataclass(frozen=True, kw_only=True)
class SeenFrames:
    """All that any question needs of some frames: what comes before the question never sees it.

    N is the number of text tokens before the first frame of a prompt, the system prompt above all.
    """

    vision: Tensor
    """[F, Q, D]: what the language model reads in the frames' places. With a reducer that is late (it needs the
    question, or frames differ in their number of tokens) [F, N, what the reducer reads]."""
    text: Tensor
    """[F, N, D]: the text before the first frame, fused with each frame."""
    keys_values: tuple[KeysValues, ...]
    """Of the vision rows and of that text in each layer of pre-fusion; empty without pre-fusion."""

    def __len__(self) -> int:
        return self.vision.shape[0]

    def part(self, start: int, stop: int) -> "SeenFrames":
        """Return some of the frames, as views."""
        return self._each(lambda tensor: tensor[start:stop])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, to be stored."""
        layers = {
            f"layers.{index}.{name}": value
            for index, pair in enumerate(self.keys_values)
            for name, value in zip(("keys", "values"), pair, strict=True)
        }
        return {"vision": self.vision, "text": self.text, **layers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SeenFrames":
        """Make frames of what ``to_tensors`` returned."""
        names = [f"layers.{index}" for index in range((len(tensors) - 2) // 2)]
        layers = tuple((tensors[f"{name}.keys"], tensors[f"{name}.values"]) for name in names)
        return cls(vision=tensors["vision"], text=tensors["text"], keys_values=layers)

    def take(self, rows: Sequence[int]) -> "SeenFrames":
        """Return the frames with these numbers, in this order; one may be taken several times."""
        return self if list(rows) == list(range(len(self))) else self._each(lambda tensor: tensor[list(rows)])

    def split(self, size: int) -> "list[SeenFrames]":
        """Return the frames in parts of at most ``size``."""
        return [self.part(start, start + size) for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> "SeenFrames":
        """Return the same on a device."""
        return self._each(lambda tensor: sent(tensor, device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SeenFrames":
        pairs = tuple((change(keys), change(values)) for keys, values in self.keys_values)
        return SeenFrames(vision=change(self.vision), text=change(self.text), keys_values=pairs)

    @classmethod
    def join(cls, parts: "Sequence[SeenFrames]") -> "SeenFrames":
        """Return all frames of some parts, in order."""
        if len(parts) == 1:
            return parts[0]
        layers = zip(*(part.keys_values for part in parts), strict=True)
        pairs = tuple(
            (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer])) for layer in layers
        )
        vision, text = (torch.cat([getattr(part, name) for part in parts]) for name in ("vision", "text"))
        return cls(vision=vision, text=text, keys_values=pairs)


@dataclass(frozen=True, kw_only=True)
class SeenChunk:
    """Like ``FrameChunk``, of frames that the vision side has seen before."""

    seen: SeenFrames
    slot: int
    """Which image or video of the batch they belong to, counted from 0 in prompt order."""


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Everything the model reads. Made by the processor: ``ModelInputs(**processor(...))``.

    With ``pixel_values`` a tensor, ``input_ids`` hold Q copies of the image token for each frame.
    With ``pixel_values`` an iterable of ``FrameChunk`` (long video) or ``SeenChunk``, the number of frames is not
    known yet: ``input_ids`` hold one image token for each image or video, and ``fuse`` widens it. All prompts of
    the batch then ask about the same frames.
    """

    input_ids: Tensor
    """[B, T] int64. Frames are the configuration's ``image_token_id``."""
    attention_mask: Tensor | None = None
    """[B, T], 0 at padding. None: no padding."""
    answer_mask: Tensor | None = None
    """[B, T], 1 at tokens that the assistant wrote. None: no such tokens, or those with a label."""
    pixel_values: Tensor | Iterable[FrameChunk | SeenChunk] | None = None
    """[F, V, 3, H, W] for all frames of the batch in prompt order, or chunks of them."""
    labels: Tensor | None = None
    """[B, T] int64, -100 where nothing is to be learned."""
    features: Tensor | None = None
    """[F, V, patches, E]: what the vision tower says of all frames, computed before, in place of ``pixel_values``."""


@dataclass(frozen=True, kw_only=True)
class FusedPrompt:
    """A prompt that any causal language model can continue: the seam of the project.

    S, the spliced length, is T unless frames were streamed.
    """

    inputs_embeds: Tensor
    """[B, S, D]: text after pre-fusion, vision tokens in the places of the frames."""
    attention_mask: Tensor
    """[B, S] int64."""
    input_ids: Tensor
    """[B, S] int64: the ids of the text; the image token at each vision token."""
    is_fused: Tensor
    """[B, S] bool: positions whose text went through pre-fusion."""
    labels: Tensor | None = None
    """[B, S] int64."""
    num_frames: tuple[int, ...] = ()
    """Frames of each prompt."""
