"""PruMerge and PruMerge+: the patches that the class token looks at, each with what resembles it merged in.

LLaVA-PruMerge (arXiv 2403.15388); needs no training. In the last layer of the vision tower, which nothing else runs,
the class token attends to the patches with the layer's whole width as one head. Patches whose attention a_i is an
outlier, above Q3 + 1.5 (Q3 - Q1) of the frame's own, are kept, so frames differ in the number of their tokens.
PruMerge+ keeps a sample of the grid besides. To each kept patch its 32 nearest others by the cosine of their keys are
added, weighted by their attention, and one more token is the sum of all patches that were not kept:

    token_i = x_i + sum of a_j x_j over the neighbours j of i,        last token = sum of a_j x_j over the j not kept

In training the number is fixed: the eighth with the most attention, and for PruMerge+ every eighth place as well.

What the released code leaves open is decided here. Each frame has its own quartiles, where the released code would pool
a batch's. A frame without outliers is its last token alone; the released PruMerge+ divides by zero. The sample takes
every patch where the released step would be none. In training the last token leaves out exactly what was kept, also
where a patch is kept twice. Neighbours are fewer on a grid of at most 32 patches. The crops of an HD frame have a class
token each; their patches are compared as if they had one.

Shapes: F frames, N patches, E vision width, K most patches that are kept, Q = K + 1.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModel

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.class_attention import class_attention, class_attention_work
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, TowerRead, take_rows

NUM_NEIGHBOURS = 32
FIXED_STEP = 8
"""In training one patch of so many is kept for its attention, and in PruMerge+ one of so many for its place."""


def read_last_layer(tower: CLIPVisionModel, hidden: tuple[Tensor, ...]) -> Tensor:
    """Keys of the patches and the class token's attention to them: [F, N, E + 1]."""
    keys, attention = class_attention(tower.encoder.layers[-1], hidden[0], num_heads=1)
    return torch.cat([keys, attention.transpose(1, 2)], dim=-1)


class PruMerge(Reducer):
    """Keep what stands out, and merge the rest into it."""

    reads = (TowerRead(layers=lambda count: (count - 1,), values=read_last_layer),)
    samples_grid: ClassVar[bool] = False
    """Whether patches are also kept for their place."""

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        # Outliers are at most a quarter of the patches, rounded to the nearest number; a sample can be all of them.
        self.most_kept = config.tokens_per_frame - 1

    @property
    def is_ragged(self) -> bool:
        """Outliers differ in number."""
        return True

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, E + E + 1], each with its key and the class token's attention to it."""
        width = patches.shape[-1] // 2
        values, keys, attention = patches.split((width, width, 1), dim=-1)
        attention = attention[..., 0]  # [F, N]
        with torch.no_grad():
            kept, valid = (self._fixed if self.training else self._outliers)(attention)  # [F, K]
            neighbours = nearest(keys, kept)  # [F, K, 32]
            is_kept = torch.zeros_like(attention, dtype=torch.int64).scatter_add(1, kept, valid.long()) > 0
        shares = attention[:, None].expand(-1, kept.shape[1], -1)  # [F, K, N]
        # As a matrix: gathered, the neighbours of all kept patches would be 32 times as large as what is kept.
        weights = torch.zeros_like(shares).scatter(2, neighbours, shares.gather(2, neighbours))
        merged = take_rows(values, kept) + weights @ values  # [F, K, E]
        rest = attention.masked_fill(is_kept, 0)[:, None] @ values  # [F, 1, E]
        return Reduced(torch.cat([merged, rest], dim=1), valid=functional.pad(valid, (0, 1), value=True))

    def _outliers(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the kept patches, [F, K] int64: outliers by their attention, then the sample by its places.

        The second result says which of them there are, [F, K] bool.
        """
        num_patches = attention.shape[1]
        places = torch.arange(num_patches, device=attention.device)
        order = attention.argsort(dim=1, descending=True, stable=True)  # [F, N]
        rank = order.argsort(dim=1)
        count = num_outliers(attention)[:, None]  # [F, 1]
        stands_out = is_kept = rank < count
        if self.samples_grid:
            step = (num_patches // count.clamp(min=1) // 3).clamp(min=1)
            # The released rule stops before the last patch.
            is_kept = is_kept | (places % step == 0) & (places < num_patches - 1) & (count > 0)
        turn = torch.where(stands_out, rank, num_patches + places).masked_fill(~is_kept, 2 * num_patches)
        kept = turn.argsort(dim=1, stable=True)[:, : self.most_kept]
        return kept, places[: kept.shape[1]] < is_kept.sum(1, keepdim=True)

    def _fixed(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """As ``_outliers``, in training. A patch that both rules name is there twice, as in the released code."""
        num_frames, num_patches = attention.shape
        order = attention.argsort(dim=1, descending=True, stable=True)
        kept = order[:, : num_patches // FIXED_STEP]
        if self.samples_grid:
            places = torch.arange(num_patches, device=kept.device)
            sample = places[FIXED_STEP // 2 : num_patches - 1 : FIXED_STEP]
            kept = torch.cat([kept, sample.expand(num_frames, -1)], dim=1)
        missing = self.most_kept - kept.shape[1]
        valid = torch.ones_like(kept, dtype=torch.bool)
        return functional.pad(kept, (0, missing)), functional.pad(valid, (0, missing), value=False)

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """All of it is run, and projected, for as many tokens as there can be.

        On average one patch of 18 is kept, 32 of 576, and in PruMerge+ one of 4, as the authors report. Their code
        multiplies the queries of all rows, class token included, with all keys.
        """
        width, patches, most_kept = config.vision.hidden_size, config.reduced_patches, config.tokens_per_frame - 1
        return Cost(
            of_tower=class_attention_work(config),
            per_frame=2 * patches * width * (2 * most_kept + 1),
            mean_tokens=patches // (4 if cls.samples_grid else 18) + 1,
            projected=config.tokens_per_frame,
            published=2 * (patches + 1) ** 2 * width,
        )


class PruMergePlus(PruMerge):
    """Keep a sample of the grid besides."""

    samples_grid = True


def num_outliers(attention: Tensor) -> Tensor:
    """How many values of each frame lie above Q3 + 1.5 (Q3 - Q1): [F, N] to [F] int64."""
    values = attention.float()
    lower, upper = torch.quantile(values, values.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
    return (values > upper + 1.5 * (upper - lower)).sum(1)


def nearest(keys: Tensor, kept: Tensor) -> Tensor:
    """The other patches whose keys have the largest cosines with a kept one's; of equal ones those that come first.

    Args:
        keys: [F, N, E].
        kept: [F, K] int64.

    Returns:
        [F, K, 32] int64, or as many as there are others.
    """
    unit = functional.normalize(keys.float(), dim=-1)
    cosines = take_rows(unit, kept) @ unit.transpose(1, 2)  # [F, K, N]
    cosines = cosines.scatter(2, kept[..., None], float("-inf"))
    order = cosines.argsort(dim=2, descending=True, stable=True)
    return order[..., : min(NUM_NEIGHBOURS, keys.shape[1] - 1)]
