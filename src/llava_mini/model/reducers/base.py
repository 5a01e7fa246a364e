"""What every reducer answers: the tokens that stand for a frame, and where each of them looked."""

from dataclasses import dataclass
from math import isqrt

from torch import Tensor


@dataclass(frozen=True)
class Reduced:
    """Reduced tokens of some frames."""

    tokens: Tensor
    """[F, Q, E]."""
    attention: Tensor | None = None
    """[F, Q, patches], rows sum to 1. None: no attention was used."""


def grid_side(patches: Tensor) -> int:
    """Side of the square grid that patches [F, N, E] form.

    Raises:
        ValueError: N is not a square number.
    """
    side = isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(
            f"A reducer needs a square grid of patches, got {patches.shape[1]} per frame. Did the class token stay in?"
        )
    return side
