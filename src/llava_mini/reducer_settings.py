"""What a configuration must know of each reducer, without its weights: a table by name.

The classes themselves stand in ``model.reducers``, in a table with the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class FrameSizes(Protocol):
    """The part of a configuration that decides how many tokens a frame becomes."""

    reducer: str
    reducer_grid: int
    reducer_tokens: int

    @property
    def patches_per_side(self) -> int:
        """Of one view."""
        ...

    @property
    def patches_per_frame(self) -> int:
        """Of all views."""
        ...

    @property
    def reduced_side(self) -> int:
        """Of the grid of patches that a reducer reads."""
        ...

    @property
    def reduced_patches(self) -> int:
        """Patches of that grid."""
        ...


def _grid(config: FrameSizes) -> int:
    return config.reducer_grid**2


def _chosen(config: FrameSizes) -> int:
    return config.reducer_tokens


def matryoshka_side(config: FrameSizes) -> int:
    """Side of the grid of MQT's queries: 16 for 24 patches per side as published, else about two thirds, even."""
    return max(2 * round(config.patches_per_side / 3), 2)


@dataclass(frozen=True, kw_only=True)
class ReducerSettings:
    """The fields that a reducer reads, and what may stand in them."""

    tokens: Callable[[FrameSizes], int] = _grid
    """Places in the prompt for one frame: all its tokens, or the most it can have."""
    most_tokens: Callable[[FrameSizes], int] | None = None
    """The largest ``reducer_tokens``. None: the field is not read."""
    heads: int = 1
    """Attention heads, as published; the vision width is divided among them."""
    has_cells: bool = False
    """Whether its tokens stand for squares of patches, all of the same size."""


REDUCER_SETTINGS: dict[str, ReducerSettings] = {
    "identity": ReducerSettings(tokens=lambda config: config.patches_per_frame),
    "average_pool": ReducerSettings(has_cells=True),
    "query": ReducerSettings(heads=8),
    "mqt": ReducerSettings(tokens=_chosen, most_tokens=lambda config: matryoshka_side(config) ** 2, heads=16),
    "m3": ReducerSettings(has_cells=True),
    "token_packer": ReducerSettings(heads=8, has_cells=True),
    "quecc": ReducerSettings(heads=8, has_cells=True),
    "llama_vid": ReducerSettings(tokens=lambda config: 1 + config.reducer_grid**2, has_cells=True),
    "prumerge": ReducerSettings(tokens=lambda config: (config.reduced_patches + 2) // 4 + 1),
    "prumerge_plus": ReducerSettings(tokens=lambda config: config.reduced_patches + 1),
    "visionzip": ReducerSettings(tokens=_chosen, most_tokens=lambda config: config.reduced_patches + 1),
    "divprune": ReducerSettings(tokens=_chosen, most_tokens=lambda config: config.reduced_patches),
    "fastv": ReducerSettings(
        tokens=lambda config: config.patches_per_frame, most_tokens=lambda config: config.patches_per_frame
    ),
    "voco": ReducerSettings(
        tokens=lambda config: config.reduced_patches + config.reducer_tokens,
        most_tokens=lambda config: config.reduced_patches,
    ),
    "query_inside": ReducerSettings(tokens=lambda config: config.patches_per_frame),
}
"""By the name that a configuration's ``reducer`` has."""


def check_reducer(config: FrameSizes, vision_width: int) -> None:
    """Refuse a reducer that cannot be made.

    Args:
        config: what is asked for; its reducer is a known one.
        vision_width: E.

    Raises:
        ValueError: a field does not fit the reducer.
    """
    name, known = config.reducer, REDUCER_SETTINGS[config.reducer]
    if vision_width % known.heads:
        raise ValueError(
            f"The reducer {name!r} has {known.heads} heads, but the vision width {vision_width} is not a multiple of "
            f"{known.heads}. Change vision_config.hidden_size or the reducer."
        )
    side, grid = config.reduced_side, config.reducer_grid
    if known.has_cells and side % grid:
        raise ValueError(
            f"The reducer {name!r} cuts {side} patches per side into reducer_grid parts, but {grid} does not divide "
            f"{side}. Choose one of {', '.join(str(n) for n in range(1, side + 1) if side % n == 0)}."
        )
    if known.most_tokens is not None and config.reducer_tokens > known.most_tokens(config):
        raise ValueError(
            f"The reducer {name!r} makes at most {known.most_tokens(config)} tokens of a frame here, but "
            f"reducer_tokens is {config.reducer_tokens}. Give a smaller number."
        )
