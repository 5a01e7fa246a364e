"""A training-only loss that asks the tokens of a frame for the whole frame.

In answers about single images the text that pre-fusion has filled carries everything, and nothing forces a place into
the one token of a frame, which alone keeps the order of frames. Here a small decoder tells from the token what the
vision tower says of every patch. It needs no labels: what is told again is what the frozen tower sees anyway.

Shapes: F frames, Q reduced tokens, P patches, D language width, E vision width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_mini.flow import FusedPrompt
from llava_mini.model.positions import sine_cosine_2d


class PatchDecoder(nn.Module):
    """From the tokens of a frame and the place of a patch to what the vision tower says of it."""

    def __init__(self, language_width: int, vision_width: int, side: int) -> None:
        """Make the decoder.

        Args:
            language_width: D.
            vision_width: E.
            side: Patches per side, P = side * side.
        """
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(language_width)
        self.of_token = nn.Linear(language_width, 2 * vision_width)
        self.of_place = nn.Linear(vision_width, 2 * vision_width, bias=False)
        self.layers = nn.Sequential(
            nn.GELU(),
            nn.Linear(2 * vision_width, 2 * vision_width),
            nn.GELU(),
            nn.Linear(2 * vision_width, vision_width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tell the patches of frames: [F, Q, D] to [F, P, E]. Several tokens of a frame are averaged."""
        width = self.of_place.in_features
        codes = sine_cosine_2d(self.side, width, device=tokens.device).to(tokens.dtype)  # [P, E]
        return self.layers(self.of_token(self.norm(tokens.mean(1)))[:, None] + self.of_place(codes))

    def loss(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """Return the squared distance to the patches, each brought to mean 0 and variance 1.

        Blind, knowing the mean of all patches at best, it is near 1.

        Args:
            tokens: [F, Q, D].
            patches: [F, P, E], without a gradient.
        """
        target = functional.layer_norm(patches.detach().float(), patches.shape[-1:])
        return functional.mse_loss(self(tokens).float(), target)


def tokens_of_frames(fused: FusedPrompt, image_token_id: int, frame_sources: Tensor) -> tuple[Tensor, Tensor]:
    """Find the tokens of each frame in the first prompt that shows it.

    Args:
        fused: Prompts that share frames, all of as many tokens.
        image_token_id: Id of vision tokens.
        frame_sources: [F] int64: for each frame of the prompts, in order, which one it is.

    Returns:
        Which frames there are, [N] int64, and their tokens, [N, Q, D].
    """
    tokens = fused.inputs_embeds[fused.input_ids == image_token_id]
    tokens = tokens.unflatten(0, (len(frame_sources), -1))  # [F, Q, D]
    sources, places = torch.unique(frame_sources, return_inverse=True)
    first = torch.full_like(sources, len(frame_sources))
    first = first.scatter_reduce(0, places, torch.arange(len(frame_sources), device=places.device), reduce="amin")
    return sources, tokens[first]
