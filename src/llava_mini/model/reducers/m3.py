"""Matryoshka multimodal models, M3: nested averages of the projected patches (Cai et al., arXiv 2405.17430).

All patches are projected, and squares of them averaged; there are no weights. A model that was trained with several
sizes of squares can be asked with any of them: ``reducer_grid`` chooses.

The published code trains each sample at all scales and takes the mean of the losses. Here each forward pass draws one
scale, for a fifth of the work at 24 patches per side: the expected gradient is the same, if all frames of a
micro-batch pass together.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, cell_means


class MatryoshkaPool(Reducer):
    """``reducer_grid`` x ``reducer_grid`` averages of projected patches.

    In training, ``reducer_grid`` is the most: each forward pass takes one of ``scales``.
    """

    reads_projected: ClassVar[bool] = True

    @property
    def is_ragged(self) -> bool:
        """In training, passes differ in the number of their tokens."""
        return self.training

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, D], N the square of a multiple of ``reducer_grid``."""
        most = self.config.reducer_grid
        if not self.training:
            return Reduced(cell_means(patches, most))
        choices = scales(most)
        tokens = cell_means(patches, choices[int(torch.randint(len(choices), ()))])  # [F, drawn, D]
        valid = torch.arange(most**2, device=patches.device) < tokens.shape[1]
        missing = most**2 - tokens.shape[1]
        return Reduced(functional.pad(tokens, (0, 0, 0, missing)), valid=valid.expand(len(patches), -1))

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """All patches are projected; averages are not counted."""
        return Cost(projected=config.reduced_patches, published_projected=config.reduced_patches)


def scales(grid: int) -> tuple[int, ...]:
    """Tokens per side, from ``grid`` on: half of it as long as that is a whole number, then 1. 24, 12, 6, 3, 1."""
    found = [grid]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return tuple(found) if found[-1] == 1 else (*found, 1)
