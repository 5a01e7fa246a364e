"""TokenPacker: coarse tokens that take detail from the patches they stand for (Li et al., arXiv 2407.02392).

The patches, made smaller by interpolation, are the queries; each looks at its own region of the whole grid, in which
keys and values come from four layers of the vision tower. The ordinary projector is its last part.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, TowerRead, as_picture
from llava_mini.model.reducers.regions import (
    MIDDLE_LAYERS,
    RegionAttention,
    published_region_work,
    region_parameters,
    region_work,
)


class TokenPacker(Reducer):
    """``reducer_grid`` x ``reducer_grid`` tokens, each of a square of patches."""

    reads: ClassVar[tuple[TowerRead, ...]] = (MIDDLE_LAYERS,)

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        width = config.vision.hidden_size
        self.query_map = nn.Linear(width, width, bias=False)
        self.query_norm = nn.LayerNorm(width, eps=1e-6)
        self.regions = RegionAttention(config)

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, 4 * E], N the square of a multiple of ``reducer_grid``."""
        grid, picture = self.config.reducer_grid, as_picture(patches[..., : self.config.vision.hidden_size])
        small = functional.interpolate(picture.float(), size=(grid, grid), mode="bilinear")  # [F, E, grid, grid]
        queries = self.query_map(small.to(patches.dtype).flatten(2).transpose(1, 2))  # [F, M, E]
        return self.regions(self.query_norm(queries), patches)

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """The published code makes keys and values of all patches."""
        width, tokens = config.vision.hidden_size, config.tokens_per_frame
        queries = 2 * tokens * width**2
        return Cost(
            parameters=width**2 + 2 * width + region_parameters(config),
            per_frame=queries + region_work(config),
            published=queries + published_region_work(config),
        )
