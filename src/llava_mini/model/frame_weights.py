"""How much each frame of a prompt counts in its fused text.

The released models take the plain mean of the fused text over all frames, and lose by it when something happened.
With learned weights every channel keeps a mean of its own: one that counts early frames more, or late ones, tells
before from after. What a frame gives still depends on its place alone and not on the other frames, so running sums,
kept frames and frames that come one by one stay exact. This is not in the paper.

Shapes: F frames, N text rows, D language width.
"""

import math

import torch
from torch import Tensor, nn

NUM_PERIODS = 12
"""The longest one has 8,192 frames: more than two hours at one frame per second."""


class FrameWeights(nn.Module):
    """Weights of each channel by the place of a frame, 1 for the first frame, so that a single image is as without.

    They start at 1 for all frames: as the plain mean.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_codes = nn.Parameter(torch.zeros(width, 2 * NUM_PERIODS))

    def init_weights(self) -> None:
        """Set the weights of all frames to 1."""
        nn.init.zeros_(self.of_codes)

    def forward(self, text: Tensor, places: Tensor) -> Tensor:
        """Weigh fused text [F, N, D] by the places [F] of its frames, from 0: [F, N, D], float32."""
        return text.float() * (1 + place_codes(places) @ self.of_codes.float().T)[:, None]


def place_codes(places: Tensor) -> Tensor:
    """Sines and cosines of places [F], with periods of 4, 8, 16, ... frames: [F, 2 * NUM_PERIODS], 0 at place 0."""
    periods = 2.0 ** torch.arange(2, 2 + NUM_PERIODS, device=places.device)
    angles = 2 * math.pi * places[:, None].float() / periods  # [F, NUM_PERIODS]
    return torch.cat([angles.sin(), angles.cos() - 1], dim=-1)
