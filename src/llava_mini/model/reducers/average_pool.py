"""Average pooling of the patch grid, the baseline of Table 8."""

import torch
from torch import Tensor

from llava_mini.model.reducers.base import Reduced, Reducer, grid_side


class AveragePool(Reducer):
    """Cut the grid of patches into ``grid`` x ``grid`` cells and average each one."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, E], N a square number."""
        side = grid_side(patches)
        square = patches.transpose(1, 2).unflatten(2, (side, side))  # [F, E, side, side]
        pooled = torch.nn.functional.adaptive_avg_pool2d(square, self.grid)  # [F, E, grid, grid]
        return Reduced(pooled.flatten(2).transpose(1, 2))  # [F, Q, E]
