"""Average pooling of the patch grid, the baseline of Table 8."""

import torch
from torch import Tensor

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, grid_side


class AveragePool(Reducer):
    """Cut the grid of patches into ``reducer_grid`` x ``reducer_grid`` cells and average each one."""

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, E], N a square number."""
        side = grid_side(patches)
        square = patches.transpose(1, 2).unflatten(2, (side, side))  # [F, E, side, side]
        pooled = torch.nn.functional.adaptive_avg_pool2d(square, self.config.reducer_grid)  # [F, E, grid, grid]
        return Reduced(pooled.flatten(2).transpose(1, 2))  # [F, Q, E]

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """Nothing is counted; the released code projects the patches too, even where nothing reads them."""
        return Cost(published_projected=config.patches_per_frame + config.tokens_per_frame)
