"""Query-based compression, the reducer of LLaVA-Mini (section 4.1, equation 2).

Learned queries look at the patches of a frame, before the projector, and summarise them in
``grid * grid`` tokens. As in the released weights there are 8 heads, and positions enter the keys
but not the values.

The queries are the same for all frames, so no patch is made into a key or a value: a query times a key is the
patch times the query taken back through the key map, and the value map is applied to what a query has gathered.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_mini.model.positions import resize_codes, sine_cosine_2d
from llava_mini.model.reducers.base import Reduced, Reducer, grid_side

NUM_HEADS = 8


class QueryReducer(Reducer):
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
        attention = (self._probes() @ (values + patch_codes).transpose(1, 2)).softmax(-1)  # [F, heads * Q, N]
        gathered = (attention @ values).unflatten(1, (NUM_HEADS, -1))  # [F, heads, Q, E]
        _, _, to_values = self.attend.in_proj_weight.unflatten(0, (3, NUM_HEADS, -1))  # [heads, E / heads, E]
        tokens = torch.einsum("fhqe,hce->fqhc", gathered, to_values).flatten(2)  # [F, Q, E]
        tokens = self.attend.out_proj(tokens + self.attend.in_proj_bias.chunk(3)[2])
        return Reduced(tokens, attention.unflatten(1, (NUM_HEADS, -1)).mean(1))  # [F, Q, E], [F, Q, N]

    def _probes(self) -> Tensor:
        """What each head's queries multiply the patches with, [heads * Q, E]. The keys' bias adds the same to all."""
        to_queries, to_keys, _ = self.attend.in_proj_weight.chunk(3)  # [E, E]
        queries = self.query_norm(self.queries) + self.query_codes  # [Q, E]
        queries = functional.linear(queries, to_queries, self.attend.in_proj_bias.chunk(3)[0])
        queries = queries.unflatten(1, (NUM_HEADS, -1)) * (queries.shape[1] // NUM_HEADS) ** -0.5  # [Q, heads, C]
        return torch.einsum("qhc,hce->hqe", queries, to_keys.unflatten(0, (NUM_HEADS, -1))).flatten(0, 1)
