"""Query-based compression, the reducer of LLaVA-Mini (section 4.1, equation 2).

Learned queries look at the patches of a frame, before the projector, and summarise them in
``reducer_grid ** 2`` tokens. As in the released weights there are 8 heads, and positions enter the keys
but not the values.

The queries are the same for all frames, and few: no patch is made into a key or a value.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.attention import attention_of, attention_parameters, attention_work, gather
from llava_mini.model.positions import resize_codes, sine_cosine_2d
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, grid_side
from llava_mini.reducer_settings import REDUCER_SETTINGS


class QueryReducer(Reducer):
    """Cross-attention from Q learned queries to the patches of one frame.

    With ``position_codes`` "resized_query_grid" the patches' codes are those of the queries, resized (released weights;
    with one token all patches then share one code, which cancels in the softmax), otherwise those of their own grid.
    """

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        width, self.grid = config.vision.hidden_size, config.reducer_grid
        self.queries = nn.Parameter(torch.empty(self.grid**2, width))
        self.query_codes = nn.Parameter(torch.empty(self.grid**2, width))
        self.query_norm = nn.LayerNorm(width)
        self.patch_norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, REDUCER_SETTINGS["query"].heads, batch_first=True)

    def init_weights(self) -> None:
        """Queries at random, codes of their grid."""
        init.normal_(self.queries, mean=0.0, std=0.02)
        init.copy_(self.query_codes, sine_cosine_2d(self.grid, self.queries.shape[1]))

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, E], N a square number."""
        side = grid_side(patches)
        if self.config.position_codes == "resized_query_grid":
            patch_codes = resize_codes(self.query_codes, self.grid, side)  # [N, E]
        else:
            patch_codes = sine_cosine_2d(side, patches.shape[-1], device=patches.device).to(patches.dtype)  # [N, E]
        values = self.patch_norm(patches)  # [F, N, E]
        queries = self.query_norm(self.queries) + self.query_codes  # [Q, E]
        attention = attention_of(self.attend, queries, values + patch_codes)  # [F, heads, Q, N]
        return Reduced(gather(self.attend, attention, values), attention.mean(1))  # [F, Q, E], [F, Q, N]

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """The released code makes keys and values, and projects the patches too, even where nothing reads them.

        Table 8 prints 2.42 G for one token and 2.44 G for four, which counts the attention of the released code.
        """
        width, tokens, patches = config.vision.hidden_size, config.tokens_per_frame, config.reduced_patches
        work = attention_work(REDUCER_SETTINGS["query"].heads, tokens, patches, width)
        return Cost(
            parameters=2 * tokens * width + 4 * width + attention_parameters(width),
            shared=work.of_queries,
            per_frame=work.of_rows + work.of_values,
            published=2 * width**2 * (2 * tokens + 2 * patches) + 4 * tokens * patches * width,
            published_projected=config.patches_per_frame + tokens,
        )
