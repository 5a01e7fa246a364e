"""Attention of few queries to many rows, without making a key or a value of any row.

A query times a key is the row times the query taken back through the key map, and the value map can be applied to what
a query has gathered. That is less work than ``nn.MultiheadAttention`` where the queries are few; where they are many,
keys and values are made as there. Either way the result is the same but for rounding.

Shapes: Q queries, N rows, E width, C width of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class AttentionWork:
    """Operations of ``attention_of`` and ``gather``."""

    of_queries: int
    """Of the queries alone."""
    of_rows: int
    """Of attention from them to the rows."""
    of_values: int
    """Of gathering."""

    @property
    def total(self) -> int:
        """All together."""
        return self.of_queries + self.of_rows + self.of_values


def attention_of(attend: nn.MultiheadAttention, queries: Tensor, rows: Tensor) -> Tensor:
    """How much each head's queries look at each row: [..., heads, Q, N].

    Args:
        attend: the maps of queries, keys and values.
        queries: [..., Q, E].
        rows: [..., N, E], what keys would be made of.
    """
    to_queries, to_keys, _ = attend.in_proj_weight.chunk(3)  # [E, E]
    heads = attend.num_heads
    made = functional.linear(queries, to_queries, attend.in_proj_bias.chunk(3)[0])
    made = made.unflatten(-1, (heads, -1)) * (made.shape[-1] // heads) ** -0.5  # [..., Q, heads, C]
    # The bias of the keys adds the same to a query's product with every row, which the softmax takes away.
    if are_few(heads, queries.shape[-2], rows.shape[-2], rows.shape[-1]):
        probes = torch.einsum("...qhc,hce->...hqe", made, to_keys.unflatten(0, (heads, -1)))  # [..., heads, Q, E]
        products = (probes.flatten(-3, -2) @ rows.transpose(-1, -2)).unflatten(-2, (heads, -1))
    else:
        keys = functional.linear(rows, to_keys).unflatten(-1, (heads, -1))  # [..., N, heads, C]
        products = torch.einsum("...qhc,...nhc->...hqn", made, keys)
    return products.softmax(-1)


def gather(attend: nn.MultiheadAttention, attention: Tensor, rows: Tensor) -> Tensor:
    """What queries take from rows, through the value and the output map: [..., Q, E].

    Args:
        attend: the maps.
        attention: [..., heads, Q, N], rows sum to 1.
        rows: [..., N, E], what values would be made of.
    """
    heads, queries, num_rows = attention.shape[-3:]
    _, _, to_values = attend.in_proj_weight.unflatten(0, (3, heads, -1))  # [heads, C, E]
    if are_few(heads, queries, num_rows, rows.shape[-1]):
        gathered = (attention.flatten(-3, -2) @ rows).unflatten(-2, (heads, -1))  # [..., heads, Q, E]
        tokens = torch.einsum("...hqe,hce->...qhc", gathered, to_values)  # [..., Q, heads, C]
    else:
        values = functional.linear(rows, to_values.flatten(0, 1)).unflatten(-1, (heads, -1))  # [..., N, heads, C]
        tokens = torch.einsum("...hqn,...nhc->...qhc", attention, values)
    return attend.out_proj(tokens.flatten(-2) + attend.in_proj_bias.chunk(3)[2])


def are_few(heads: int, queries: int, rows: int, width: int) -> bool:
    """Whether keys and values take more work than to do without them."""
    return queries * width + heads * queries * rows < rows * width + queries * rows


def attention_work(heads: int, queries: int, rows: int, width: int) -> AttentionWork:
    """Count the operations, 2 for each multiply-add."""
    maps, pairs = 2 * queries * width**2, 2 * queries * rows * width
    if are_few(heads, queries, rows, width):
        return AttentionWork(2 * maps, heads * pairs, heads * pairs + 2 * maps)
    made = 2 * rows * width**2
    return AttentionWork(maps, made + pairs, made + pairs + maps)


def attention_parameters(width: int) -> int:
    """Weights of ``nn.MultiheadAttention``."""
    return 4 * (width**2 + width)
