"""Train, validation and test: which numbers an item is drawn from."""

import random
from typing import Literal

Split = Literal["train", "validation", "test"]


def generator_of(split: Split, index: int, stream: str = "scene") -> random.Random:
    """Return the random numbers of one item.

    The seed is made of the split's name and the index, so no item of one split is drawn from the
    numbers of another.

    Args:
        split: ``train``, ``validation`` or ``test``.
        index: Which item of the split, from 0.
        stream: What the numbers are for; different streams of an item are independent.

    Raises:
        ValueError: If there is no such split, or the index is negative.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"Unknown split {split!r}. The splits are train, validation and test.")
    if index < 0:
        raise ValueError(f"The index of an item must be 0 or more, got {index}.")
    return random.Random(f"{stream}/{split}/{index}")
