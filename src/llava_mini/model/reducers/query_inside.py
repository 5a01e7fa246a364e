"""LLaVA-Mini with compression and pre-fusion inside the language model (Table 12), for which no code was published.

The first ``reducer_layer`` layers of the language model (4 in the paper) read all patches and all text: that is the
pre-fusion. Then learned queries compress the rows of each frame to ``reducer_grid ** 2``, and the layers after that run
on these and the text. What the paper leaves open is decided here:

* The queries attend at language width D, with 8 heads, as the query reducer does at vision width: norms, codes of the
  places on the patch grid in keys but not in values, no residual. In HD they read the crops, not the whole image.
* Rows keep their positions. The compressed rows take the last places of their frame.
* Prompts are as LLaVA-1.5 has them: text before a frame does not see it, in no layer.
* The first layers keep the keys and values of all patches, and an answer goes on to read them there: decoding equals
  running the whole prompt again. To forget them would save memory and change answers.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.attention import attention_of, attention_parameters, attention_work, gather
from llava_mini.model.inside import Dropping, Inside, LayerInput, PromptRows
from llava_mini.model.positions import sine_cosine_2d
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, grid_side

NUM_HEADS = 8


class QueryInside(Reducer):
    """Cross-attention from Q learned queries to the rows of one frame inside the language model."""

    keeps_patches = True
    acts_inside = drops_inside = drops_alike = True

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        width = config.text.hidden_size
        if width % NUM_HEADS:
            raise ValueError(
                f"The query_inside reducer has {NUM_HEADS} heads, but the language width {width} is not a multiple of "
                f"{NUM_HEADS}. Change text_config.hidden_size or the reducer."
            )
        if config.reducer_grid > config.reduced_side:
            raise ValueError(
                f"The query_inside reducer puts reducer_grid={config.reducer_grid} rows per side in the places of "
                f"{config.reduced_side} patches per side. Give a smaller reducer_grid."
            )
        self.queries = nn.Parameter(torch.empty(config.reducer_grid**2, width))
        self.query_norm = nn.LayerNorm(width)
        self.row_norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, NUM_HEADS, batch_first=True)

    def init_weights(self) -> None:
        """Queries at random."""
        init.normal_(self.queries, mean=0.0, std=0.02)

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, D], rows of the language model, N a square number."""
        width, like = patches.shape[2], {"device": patches.device}
        row_codes = sine_cosine_2d(grid_side(patches), width, **like).to(patches.dtype)  # [N, D]
        query_codes = sine_cosine_2d(self.config.reducer_grid, width, **like).to(patches.dtype)  # [Q, D]
        values = self.row_norm(patches)  # [F, N, D]
        attention = attention_of(self.attend, self.query_norm(self.queries) + query_codes, values + row_codes)
        return Reduced(gather(self.attend, attention, values), attention.mean(1))  # [F, Q, D], [F, Q, N]

    def inside(self, rows: PromptRows) -> Inside:
        """Put the compressed rows in the places of the last patches, and drop the others."""
        return _Compressed(rows, self)

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """As the paper counts, the compression is the released one at vision width, 2.42 G at one token.

        That makes 1.888 T with Vicuna-7B, where Table 12 prints 1.84 T.
        """
        width, tokens, patches = config.text.hidden_size, config.reducer_grid**2, config.reduced_patches
        vision = config.vision.hidden_size
        work = attention_work(NUM_HEADS, tokens, patches, width)
        return Cost(
            parameters=tokens * width + 4 * width + attention_parameters(width),
            shared=work.of_queries,
            per_frame=work.of_rows + work.of_values,
            published=2 * vision**2 * (2 * tokens + 2 * patches) + 4 * tokens * patches * vision,
            later_tokens=tokens,
        )


class _Compressed(Dropping):
    """Keeps text, and compressed rows in the last places of each frame."""

    def __init__(self, rows: PromptRows, reducer: QueryInside) -> None:
        super().__init__(rows, reducer.config.reducer_layer)
        self._reducer = reducer
        self._summaries = rows.last_of_frame(reducer.config.reducer_grid**2)  # [B, S]

    def keep(self, given: LayerInput) -> Tensor:
        """[B, R] bool."""
        return ~self._fitted(self.rows.is_image, given) | self._fitted(self._summaries, given)

    def changed(self, given: LayerInput) -> Tensor:
        """Compress the rows of frames [B, R, D]."""
        frames = given.hidden[self._fitted(self.rows.is_image, given)].unflatten(0, (-1, self.rows.tokens_per_frame))
        tokens = self._reducer(frames[:, : self._reducer.config.reduced_patches]).tokens  # [F, Q, D]
        places = self._fitted(self._summaries, given).nonzero(as_tuple=True)
        return given.hidden.index_put(places, tokens.flatten(0, 1).to(given.hidden.dtype))

    def _fitted(self, values: Tensor, given: LayerInput) -> Tensor:
        return self.rows.fitted(values, given.hidden, given.hidden.shape[1])
