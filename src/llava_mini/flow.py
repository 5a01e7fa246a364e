"""The values that travel between stages, and the one alphabet of shapes.

Shapes, the same letters in every module:

    B  prompts in a batch          P  patches that a frame gives to pre-fusion
    T  tokens of a prompt          Q  reduced tokens, what a frame costs the language model
    F  frames (an image is one)    E  vision width
    V  views of a frame (HD)       D  language width

A frame is whatever takes ``Q`` tokens in the prompt: an image, or one frame of a video. The frames
of a batch stand in the order of their places in the prompts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FrameChunk:
    """A few consecutive frames of one image or video, ready for the vision tower."""

    pixel_values: Tensor
    """[F, V, 3, H, W], normalised."""
    slot: int
    """Which image or video of the batch they belong to, counted from 0 in prompt order."""
    times: tuple[float, ...] = ()
    """When each frame is shown, in seconds from the start. Empty for an image."""


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Everything the model reads. Made by the processor: ``ModelInputs(**processor(...))``.

    With ``pixel_values`` a tensor, ``input_ids`` hold Q copies of the image token for each frame.
    With ``pixel_values`` an iterable of ``FrameChunk`` (long video), the number of frames is not
    known yet: ``input_ids`` hold one image token for each image or video, and ``fuse`` widens it.
    """

    input_ids: Tensor
    """[B, T] int64. Frames are the configuration's ``image_token_id``."""
    attention_mask: Tensor | None = None
    """[B, T], 0 at padding. None: no padding."""
    answer_mask: Tensor | None = None
    """[B, T], 1 at tokens that the assistant wrote. None: no such tokens, or those with a label."""
    pixel_values: Tensor | Iterable[FrameChunk] | None = None
    """[F, V, 3, H, W] for all frames of the batch in prompt order, or chunks of them."""
    labels: Tensor | None = None
    """[B, T] int64, -100 where nothing is to be learned."""


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
    labels: Tensor | None = None
    """[B, S] int64."""
    num_frames: tuple[int, ...] = ()
    """Frames of each prompt."""
