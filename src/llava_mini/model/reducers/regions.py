"""Attention of one query to each region of the patch grid: what TokenPacker and QueCC share.

Keys and values are made of four layers of the vision tower, which see more detail the earlier they stand: of 24, those
with the numbers 12, 16, 22 and 23, the last of which is what all reducers read. Towers of another depth are read at the
same fractions of it.

Shapes: M regions of R patches each, N = M * R.
"""

from math import isqrt

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.attention import attention_of, attention_parameters, attention_work, gather
from llava_mini.model.reducers.base import Reduced, TowerRead
from llava_mini.reducer_settings import REDUCER_SETTINGS

NUM_LAYERS = 4
"""Layers of the tower that keys and values are made of."""


def middle_layers(depth: int) -> tuple[int, ...]:
    """Numbers of the layers besides the last one that is run, in a tower of so many."""
    return tuple(number * depth // 24 for number in (12, 16, 22))


def _patches_of(_: CLIPVisionModel, hidden: tuple[Tensor, ...]) -> Tensor:
    """Side by side: [F, N, 3 * E]."""
    return torch.cat([layer[:, 1:] for layer in hidden], dim=-1)


MIDDLE_LAYERS = TowerRead(layers=middle_layers, values=_patches_of)


def in_regions(rows: Tensor, grid: int) -> Tensor:
    """Cut a square of rows into ``grid`` * ``grid`` squares: [F, N, E] to [F, M, R, E], all in reading order."""
    side = isqrt(rows.shape[1])
    cut = rows.unflatten(1, (grid, side // grid, grid, side // grid))  # [F, grid, r, grid, r, E]
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class RegionAttention(nn.Module):
    """Each query summarises its own region of the patches.

    No patch is made into a key or a value: the query of a region is the only one that looks at it.
    """

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__()
        self.config = config
        self.key_map = map_of_layers(config.vision.hidden_size, NUM_LAYERS)
        self.value_map = map_of_layers(config.vision.hidden_size, NUM_LAYERS)
        self.attend = nn.MultiheadAttention(
            config.vision.hidden_size, REDUCER_SETTINGS[config.reducer].heads, batch_first=True
        )

    def forward(self, queries: Tensor, features: Tensor) -> Reduced:
        """queries: [F, M, E], features: [F, N, 4 * E], the patches and then the middle layers."""
        grid, width = self.config.reducer_grid, queries.shape[-1]
        layers = features.roll(-width, dims=-1)  # in the order of the tower, as the published weights read them
        keys, values = (in_regions(change(layers), grid) for change in (self.key_map, self.value_map))
        attention = attention_of(self.attend, queries[:, :, None], keys)  # [F, M, heads, 1, R]
        tokens = gather(self.attend, attention, values)[:, :, 0]  # [F, M, E]
        return Reduced(tokens, self._on_grid(attention.mean(2)[:, :, 0]))

    def _on_grid(self, attention: Tensor) -> Tensor:
        """From regions [F, M, R] to all patches [F, M, N]."""
        patches = attention.shape[1] * attention.shape[2]
        numbers = torch.arange(patches, device=attention.device)[None, :, None]
        places = in_regions(numbers, self.config.reducer_grid)[..., 0]  # [1, M, R]
        return attention.new_zeros(*attention.shape[:2], patches).scatter(2, places.expand_as(attention), attention)


def map_of_layers(width: int, num_layers: int) -> nn.Sequential:
    """From so many layers side by side to one: an MLP and a norm."""
    return nn.Sequential(
        nn.Linear(num_layers * width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
    )


def map_parameters(width: int, num_layers: int) -> int:
    """Weights of ``map_of_layers``."""
    return (num_layers + 1) * width**2 + 4 * width


def region_parameters(config: LlavaMiniConfig) -> int:
    """Weights of ``RegionAttention``."""
    width = config.vision.hidden_size
    return 2 * map_parameters(width, NUM_LAYERS) + attention_parameters(width)


def region_work(config: LlavaMiniConfig) -> int:
    """Operations of ``RegionAttention`` for a frame."""
    width, regions = config.vision.hidden_size, config.reducer_grid**2
    each = attention_work(REDUCER_SETTINGS[config.reducer].heads, 1, config.reduced_patches // regions, width)
    return _maps_work(config) + regions * each.total


def published_region_work(config: LlavaMiniConfig) -> int:
    """The same where all keys and values are made."""
    width, regions, patches = config.vision.hidden_size, config.reducer_grid**2, config.reduced_patches
    return _maps_work(config) + 4 * width**2 * (regions + patches) + 4 * patches * width


def _maps_work(config: LlavaMiniConfig) -> int:
    return 4 * config.reduced_patches * (NUM_LAYERS + 1) * config.vision.hidden_size**2
