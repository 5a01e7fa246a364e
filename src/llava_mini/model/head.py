"""What the language model's head is given."""

from typing import Any

from torch import nn


def read_whole(head: nn.Module) -> None:
    """Let a linear layer get rows that lie side by side, which changes no number.

    transformers gives the head the last row of each prompt as a view. On CPUs torch multiplies a view by a transposed
    copy of the weight, one for each prompt: in bfloat16 300 ms for 32,000 words of width 2048, in place of 6.
    """
    head.register_forward_pre_hook(_side_by_side)


def _side_by_side(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rows [B, T, D] with the strides of a tensor of their own; copied only where they do not lie side by side."""
    rows, *others = inputs
    return (rows.flatten(0, -2).contiguous().view(rows.shape), *others)
