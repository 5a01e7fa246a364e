"""MQT-LLaVA: any number of tokens from one model (Hu et al., arXiv 2405.19315).

A grid of queries looks at the patches, and only the first m of them, row by row, are kept. Training draws m anew for
each forward pass, so that every beginning of the row of queries learns to do with what it has; afterwards m is free.
One linear map takes the place of the projector.

The keys are made of the patches' positions alone, not of what the patches show. How much each query looks at each place
is therefore a constant of the weights: it is computed once for all frames, and what is left to do for a frame is a sum.

Three things differ from the published code. Numbers of tokens come from torch's generator instead of Python's, anew for
each group of frames that passes together. They are drawn whenever the model trains, where the published first stage,
which trains nothing but this and has no counterpart here, takes all. And a new model draws the linear map as all others
here, with the standard deviation of the configuration instead of one over the root of the language width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.attention import attention_of, attention_parameters, attention_work, gather
from llava_mini.model.positions import resize_codes, sine_cosine_2d
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, grid_side
from llava_mini.reducer_settings import REDUCER_SETTINGS, matryoshka_side


class MatryoshkaQueries(Reducer):
    """The first ``reducer_tokens`` queries of a grid whose side is two thirds of the patches'.

    In training, ``reducer_tokens`` is the most: each forward pass takes 2, 4, ... or so many.
    """

    has_linear_projector: ClassVar[bool] = True

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        width, self.side = config.vision.hidden_size, matryoshka_side(config)
        self.queries = nn.Parameter(torch.empty(self.side**2, width))
        self.query_codes = nn.Parameter(torch.empty(self.side**2, width), requires_grad=False)
        self.query_norm = nn.LayerNorm(width, eps=1e-6)
        self.key_norm = nn.LayerNorm(width, eps=1e-6)
        self.value_norm = nn.LayerNorm(width, eps=1e-6)
        self.attend = nn.MultiheadAttention(width, REDUCER_SETTINGS["mqt"].heads, batch_first=True)

    def init_weights(self) -> None:
        """Queries at random, codes of their grid."""
        init.trunc_normal_(self.queries, std=0.02)
        init.copy_(self.query_codes, sine_cosine_2d(self.side, self.queries.shape[1]))

    @property
    def is_ragged(self) -> bool:
        """In training, passes differ in the number of their tokens."""
        return self.training

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, E], N a square number."""
        most = self.config.reducer_tokens
        drawn = self._draw(most) if self.training else most
        attention = self.attention(drawn, grid_side(patches))  # [heads, m, N]
        tokens = gather(self.attend, attention, self.value_norm(patches))  # [F, m, E]
        attention = attention.mean(0).expand(len(patches), -1, -1)  # [F, m, N]
        if not self.training:
            return Reduced(tokens, attention)
        missing = (0, 0, 0, most - drawn)
        valid = torch.arange(most, device=patches.device) < drawn
        return Reduced(
            functional.pad(tokens, missing), functional.pad(attention, missing), valid.expand(len(patches), -1)
        )

    def attention(self, num_tokens: int, side: int) -> Tensor:
        """How the first queries of each head look at a grid of patches: [heads, m, side * side]."""
        queries = self.query_norm((self.queries + self.query_codes)[:num_tokens])  # [m, E]
        keys = self.key_norm(resize_codes(self.query_codes, self.side, side))  # [N, E]
        return attention_of(self.attend, queries, keys)

    @staticmethod
    def _draw(most: int) -> int:
        """One of 2, 4, ..., and ``most``, even or odd, all equally likely: every query has its turn."""
        return min(2 * int(torch.randint(1, (most + 1) // 2 + 1, ())), most)

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """Here attention is shared by all frames; the published code makes keys and values of all patches."""
        width, tokens, patches = config.vision.hidden_size, config.tokens_per_frame, config.reduced_patches
        work = attention_work(REDUCER_SETTINGS["mqt"].heads, tokens, patches, width)
        return Cost(
            parameters=2 * matryoshka_side(config) ** 2 * width + 6 * width + attention_parameters(width),
            shared=work.of_queries + work.of_rows,
            per_frame=work.of_values,
            published=4 * width**2 * (tokens + patches) + 4 * tokens * patches * width,
        )
