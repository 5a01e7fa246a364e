"""DivPrune: the patches that differ most from one another.

arXiv 2503.02175; needs no training. The distance of two patches, projected to language width, is 1 minus their cosine.
The first patch to be kept is the one that is farthest from its nearest other; each further one is farthest from the
nearest of those that are kept already. Kept patches stand in the order of the grid and are not changed.

Written from the rule as it is published: the authors' code is under a licence that forbids commercial use.

Shapes: F frames, N patches, D language width, Q tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, take_rows


class DivPrune(Reducer):
    """Keep ``reducer_tokens`` patches with a large smallest distance."""

    reads_projected = True
    reads_tokens = True

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, D], projected."""
        kept = most_diverse(patches.detach(), self.config.reducer_tokens)
        return Reduced(take_rows(patches, kept.sort(dim=1).values))  # [F, Q, D]

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """All patches are projected, and each is compared with each."""
        patches = config.reduced_patches
        return Cost(per_frame=2 * patches**2 * config.text.hidden_size, projected=patches, published_projected=patches)


def most_diverse(patches: Tensor, count: int) -> Tensor:
    """Choose ``count`` of the patches [F, N, D] of each frame: [F, count] int64, in the order of the choice.

    Of equal distances the first one counts. All steps are taken for all frames at once.
    """
    unit = functional.normalize(patches.float(), dim=-1)
    distances = 1 - unit @ unit.transpose(1, 2)  # [F, N, N]
    to_itself = torch.eye(patches.shape[1], dtype=torch.bool, device=patches.device)
    gaps = distances.masked_fill(to_itself, float("inf")).amin(2)  # [F, N], to the nearest other
    chosen = [gaps.argmax(1, keepdim=True)]
    gaps = torch.full_like(gaps, float("inf"))  # from now on to the nearest chosen one
    for _ in range(count - 1):
        gaps = torch.minimum(gaps, take_rows(distances, chosen[-1])[:, 0])
        gaps = gaps.scatter(1, chosen[-1], float("-inf"))  # never chosen again
        chosen.append(gaps.argmax(1, keepdim=True))
    return torch.cat(chosen, dim=1)
