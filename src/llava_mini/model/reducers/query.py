"""Query-based compression, the reducer of LLaVA-Mini (section 4.1, equation 2).

Learned queries look at the patches of a frame, before the projector, and summarise them in
``grid * grid`` tokens. As in the released weights there are 8 heads, and positions enter the keys
but not the values.
"""

import torch
from torch import Tensor, nn

from llava_mini.model.positions import resize_codes, sine_cosine_2d
from llava_mini.model.reducers.base import Reduced, grid_side

NUM_HEADS = 8


class QueryReducer(nn.Module):
    """Cross-attention from Q learned queries to the patches of one frame.

    Args:
        width: vision width E, a multiple of 8.
        grid: tokens per side, Q = grid * grid.
        resize_query_codes: take the patches' codes from the queries' codes, resized (released
            weights; with ``grid=1`` all patches then share one code, which cancels in the softmax),
            instead of from the patches' own grid.
    """

    def __init__(self, width: int, *, grid: int, resize_query_codes: bool) -> None:
        super().__init__()
        self.grid = grid
        self.resize_query_codes = resize_query_codes
        self.queries = nn.Parameter(torch.empty(grid * grid, width))
        self.query_codes = nn.Parameter(torch.empty(grid * grid, width))
        self.query_norm = nn.LayerNorm(width)
        self.patch_norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, NUM_HEADS, batch_first=True)

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, E], N a square number."""
        side = grid_side(patches)
        if self.resize_query_codes:
            patch_codes = resize_codes(self.query_codes, self.grid, side)  # [N, E]
        else:
            patch_codes = sine_cosine_2d(side, patches.shape[-1], device=patches.device).to(patches.dtype)  # [N, E]
        values = self.patch_norm(patches)  # [F, N, E]
        queries = (self.query_norm(self.queries) + self.query_codes).expand(patches.shape[0], -1, -1)  # [F, Q, E]
        tokens, attention = self.attend(queries, values + patch_codes, values)
        return Reduced(tokens, attention)  # [F, Q, E], [F, Q, N]
