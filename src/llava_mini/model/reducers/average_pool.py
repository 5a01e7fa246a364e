"""Average pooling of the patch grid, the baseline of Table 8."""

from torch import Tensor

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, cell_means


class AveragePool(Reducer):
    """Cut the grid of patches into ``reducer_grid`` x ``reducer_grid`` cells and average each one."""

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, E], N a square number."""
        return Reduced(cell_means(patches, self.config.reducer_grid))  # [F, Q, E]

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """Nothing is counted; the released code projects the patches too, even where nothing reads them."""
        return Cost(published_projected=config.patches_per_frame + config.tokens_per_frame)
