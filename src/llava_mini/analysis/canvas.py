"""Pictures as a model sees them, and how attention to vision tokens is laid over them.

Shapes: V vision tokens of a prompt, F frames, Q tokens of a frame, N patches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor

Paint = Callable[[Tensor], Tensor]
"""From what each vision token of a prompt got, [V], to a map of a picture, [rows, columns]."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """One picture of a prompt."""

    title: str
    picture: np.ndarray
    """uint8 [height, width, 3], after all preprocessing: a cell of a map is a patch of it."""
    paint: Paint | None
    """None: its tokens have no places in the picture."""


def picture_of(pixels: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> np.ndarray:
    """Undo the normalisation of a picture [3, H, W]: uint8 [H, W, 3]."""
    scale, shift = (torch.tensor(values)[:, None, None] for values in (deviation, mean))
    restored = (pixels.float().cpu() * scale + shift).clamp(0, 1) * 255
    return restored.round().to(torch.uint8).permute(1, 2, 0).numpy()


def grid_paint(first: int, rows: int, columns: int, skipped: int = 0) -> Paint:
    """Return the paint of tokens that are a grid, row by row.

    Args:
        first: Number of the first of them among the vision tokens.
        rows: Of the grid.
        columns: Of the grid.
        skipped: Tokens at the end of each row that belong to no place.
    """

    def paint(values: Tensor) -> Tensor:
        wide = columns + skipped
        return values[first : first + rows * wide].view(rows, wide)[:, :columns]

    return paint


def looking_paint(first: int, looks: Tensor) -> Paint:
    """Return the paint of tokens each of which looked at many patches, by a weight of its own: [Q, N], N a square."""
    side = isqrt(looks.shape[1])

    def paint(values: Tensor) -> Tensor:
        return (values[first : first + len(looks)].to(looks) @ looks).view(side, side)

    return paint
