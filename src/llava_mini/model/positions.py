"""Fixed position codes of a square grid (section 4.1), and their resizing as in the released weights."""

import torch
from torch import Tensor


def sine_cosine_2d(grid: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Codes of a ``grid`` x ``grid`` square, row by row: [grid * grid, width], float32.

    The first half of the channels holds the column and the second half the row, each as
    [sines | cosines] with frequencies 10000 ** -(k / (width / 4)).
    """
    if width % 4:
        raise ValueError(f"2D sine and cosine codes need a width divisible by 4, got {width}.")
    frequency = 10_000 ** -(torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4))  # [E / 4]
    angle = torch.arange(grid, device=device, dtype=torch.float32)[:, None] * frequency  # [grid, E / 4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [grid, E / 2]
    columns = axis[None, :].expand(grid, grid, -1)
    rows = axis[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)  # [grid * grid, E]


def resize_codes(codes: Tensor, grid: int, target: int) -> Tensor:
    """Resize codes [grid * grid, E] bicubically to [target * target, E], in float32."""
    if grid == target:
        return codes
    square = codes.float().unflatten(0, (grid, grid)).permute(2, 0, 1)[None]  # [1, E, grid, grid]
    resized = torch.nn.functional.interpolate(square, size=(target, target), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(codes.dtype)  # [target * target, E]
