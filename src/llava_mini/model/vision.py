"""Pixels to patch features: a CLIP encoder up to its last-but-one layer (section 3).

The last layer and the final norm are stored with the weights but not run: nothing reads them, but for reducers that ask
the last layer what the class token looks at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPVisionModel

from llava_mini.model.reducers.base import TowerRead


def encode_views(tower: CLIPVisionModel, pixel_values: Tensor, reads: Sequence[TowerRead] = ()) -> Tensor:
    """Patch features of every picture: [N, 3, H, W] to [N, patches, E], class token dropped.

    Args:
        tower: the encoder.
        pixel_values: normalised pictures.
        reads: what else is wanted; it follows the patches in the last dimension, which is then wider than E.

    Raises:
        ValueError: the pictures do not have the size that the tower was trained for.
    """
    expected = tower.config.image_size
    if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, expected, expected):
        raise ValueError(
            f"The vision tower reads pictures of 3 x {expected} x {expected}, got {tuple(pixel_values.shape[1:])}. "
            "Use the model's own processor."
        )
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(tower.embeddings.patch_embedding.weight.dtype)))
    wanted = [read.layers(len(tower.encoder.layers)) for read in reads]
    kept = {0: hidden}
    for index, layer in enumerate(tower.encoder.layers[:-1], start=1):
        hidden = layer(hidden, None)
        if any(index in layers for layers in wanted):
            kept[index] = hidden
    patches = hidden[:, 1:]  # [N, patches, E]
    read_too = [
        read.values(tower, tuple(kept[index] for index in layers)) for read, layers in zip(reads, wanted, strict=True)
    ]
    return torch.cat([patches, *read_too], dim=-1) if reads else patches


def join_crops(features: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """Lay the crops of HD frames into one grid.

    Args:
        features: [F, V, N, E]; with ``ratio`` r > 1 the views are r * r crops, row by row, then the whole image.
        ratio: crops per side.

    Returns:
        The detailed grid, row by row, [F, r * r * N, E], and all patches in the order in which
        pre-fusion reads them, grid first, whole image after, [F, P, E].
    """
    if ratio == 1:
        return features[:, 0], features[:, 0]
    side = round(features.shape[2] ** 0.5)
    crops = features[:, :-1].unflatten(1, (ratio, ratio)).unflatten(3, (side, side))  # [F, r, r, side, side, E]
    grid = crops.transpose(2, 3).flatten(1, 4)  # [F, r * side * r * side, E]
    return grid, torch.cat([grid, features[:, -1]], dim=1)
