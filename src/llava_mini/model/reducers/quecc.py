"""QueCC: tokens for one question, as few as one (Li et al., arXiv 2411.03312).

TokenPacker's attention to regions, but the queries know the question: the language model reads it alone first, and its
last hidden state at the question's last token is added to every patch that queries are made of. The queries are made
fewer by a learned sum over each region, one for each channel.

The question is all text after a prompt's first frame, without answers, as for all reducers here. No gradient passes
back through the first reading, as in the published code.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.base import Cost, Question, Reduced, Reducer, TowerRead, as_picture
from llava_mini.model.reducers.regions import (
    MIDDLE_LAYERS,
    RegionAttention,
    map_of_layers,
    map_parameters,
    published_region_work,
    region_parameters,
    region_work,
)


class QueCC(Reducer):
    """``reducer_grid`` x ``reducer_grid`` tokens of a frame, made for what is asked about it."""

    reads: ClassVar[tuple[TowerRead, ...]] = (MIDDLE_LAYERS,)
    reads_question: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = True

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        width, cell = config.vision.hidden_size, config.reduced_side // config.reducer_grid
        self.question_map = nn.Linear(config.text.hidden_size, width)
        self.question_norm = nn.LayerNorm(width, eps=1e-6)
        self.query_map = map_of_layers(width, 1)
        self.downsample = nn.Conv2d(width, width, kernel_size=cell, stride=cell, groups=width)
        self.regions = RegionAttention(config)

    def forward(self, patches: Tensor, question: Question) -> Reduced:
        """patches: [F, N, 4 * E], N the square of a multiple of ``reducer_grid``."""
        width = self.config.vision.hidden_size
        asked = self._of_question(question).to(patches.dtype)  # [F, E]
        queries = self.query_map(patches[..., :width] + asked[:, None])  # [F, N, E]
        fewer = self.downsample(as_picture(queries)).flatten(2).transpose(1, 2)  # [F, M, E]
        return self.regions(fewer, patches)

    def _of_question(self, question: Question) -> Tensor:
        """What is asked, [F, E]; nothing where nothing is."""
        last = (question.valid.sum(1) - 1).clamp(min=0)
        hidden = question.embeds[torch.arange(len(last), device=last.device), last]  # [F, D]
        asked = self.question_norm(self.question_map(hidden.to(self.question_map.weight.dtype)))
        return asked.masked_fill(~question.valid.any(1, keepdim=True), 0.0)

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """Without the reading of the question, which ``model.cost`` counts with the language model."""
        width, patches, language = config.vision.hidden_size, config.reduced_patches, config.text.hidden_size
        queries = 2 * language * width + 4 * patches * width**2 + 2 * patches * width
        cell = patches // config.reducer_grid**2
        return Cost(
            parameters=language * width
            + 3 * width
            + map_parameters(width, 1)
            + width * (cell + 1)
            + region_parameters(config),
            per_frame=queries + region_work(config),
            published=queries + published_region_work(config),
        )
