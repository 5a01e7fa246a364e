"""Attention between types of tokens, reduced while it is made (appendix A, equations 4 and 5).

With ``a[i, j]`` the attention of token i to token j, the mean over heads, and A and B two types of tokens:

- attention from A to B: the sum of ``a[i, j]`` over i in A and j in B, divided by the number of tokens in A;
- entropy from A to B: for each i in A that sees some of B, ``a[i, j]`` over j in B is divided by its sum, and the
  entropy of that is averaged over these i. In nats, and as a share of the largest that so many visible tokens allow.

The paper's instruction holds the system prompt, the question and the control tokens of the chat template. Its first
token attracts attention whatever it is, so it is told apart too; and so is what comes before and after the image.

Shapes: A, B types, L layers, S tokens; of some rows R that are told at a time: N prompts, K keys.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llava_mini.analysis.kernels import Listener

TYPES = ("instruction", "vision", "response")
"""The types of the paper. Each token has one of them."""

PARTS = (*TYPES, "before the image", "after the image", "first token", "reading")
"""Types and parts of them: the instruction's parts, and ``reading``, all text after the first vision token."""


def token_parts(is_vision: Tensor, num_response: int) -> Tensor:
    """Which tokens are of which part: [PARTS, S] bool.

    Args:
        is_vision: [tokens of the prompt] bool.
        num_response: Tokens of the answer, which follow.
    """
    vision = torch.cat([is_vision, is_vision.new_zeros(num_response)])  # [S]
    response = torch.zeros_like(vision)
    response[len(is_vision) :] = True
    instruction = ~vision & ~response
    after = vision.cumsum(0) > 0
    first = torch.zeros_like(vision)
    first[0] = True
    return torch.stack(
        [
            instruction,
            vision,
            response,
            instruction & ~after,
            instruction & after,
            instruction & first,
            ~vision & after,
        ]
    )


@dataclass(frozen=True, kw_only=True)
class AttentionStats:
    """Of one prompt, or means over several; nan where there are no such tokens, or none that see any of the others."""

    share: Tensor
    """[L, A, B] float64: attention from A to B, 0 to 1."""
    entropy: Tensor
    """[L, A, B] float64: of that attention, made to add up to 1, in nats."""
    evenness: Tensor
    """[L, A, B] float64: entropy as a share of that of even attention, 0 to 1."""
    received: Tensor
    """[L, A, S] float32: attention from A to each token."""

    def of(self, rows: int, tokens: int | None = None) -> "AttentionStats":
        """Return that of the first types alone, and of ``received`` the first tokens."""
        return AttentionStats(
            share=self.share[:, :rows],
            entropy=self.entropy[:, :rows],
            evenness=self.evenness[:, :rows],
            received=self.received[:, :rows, :tokens],
        )


class AttentionRecorder:
    """Sums over the rows of attention as they come."""

    def __init__(self, rows: Tensor, keys: Tensor, num_layers: int) -> None:
        """Begin with nothing.

        Args:
            rows: [A, S] bool: types of the tokens that attend.
            keys: [B, S] bool: types of the tokens that are attended to.
            num_layers: How many layers are told.
        """
        self._rows, self._keys = rows.float(), keys.float()
        table = (num_layers, len(rows), len(keys))
        self._entropy, self._evenness, self._seeing, self._choosing = (
            torch.zeros(table, device=rows.device) for _ in range(4)
        )
        self._received = torch.zeros(num_layers, *rows.shape, device=rows.device)
        self._count = torch.zeros(num_layers, len(rows), 1, device=rows.device)

    def listener(self, layer: int) -> Listener:
        """Return who is to be told the weights of a layer."""
        return partial(self._add, layer)

    def _add(self, layer: int, position: int, weights: Tensor) -> None:
        """Reduce some rows. weights: [N, R, K]."""
        of_rows = self._rows[:, position : position + weights.shape[1]]  # [A, R]
        if not of_rows.any():
            return
        keys = self._keys[:, : weights.shape[2]].T  # [K, B]
        self._count[layer] += of_rows.sum(1, keepdim=True) * len(weights)
        self._received[layer, :, : weights.shape[2]] += of_rows @ weights.sum(0)
        mass = weights @ keys  # [N, R, B]
        visible = (weights > 0).float() @ keys
        # the entropy of w / m, where m is the sum of w, is log m - sum(w log w) / m
        entropy = (mass.log() - (torch.xlogy(weights, weights) @ keys) / mass).clamp(min=0)
        sees, chooses = mass > 0, visible > 1
        entropy = entropy.where(chooses, 0)  # of a single token it is nothing, but for rounding
        evenness = entropy / visible.log()
        for total, values, counted in (
            (self._entropy, entropy, sees),
            (self._evenness, evenness, chooses),
            (self._seeing, torch.ones_like(entropy), sees),
            (self._choosing, torch.ones_like(entropy), chooses),
        ):
            total[layer] += of_rows @ values.where(counted, 0).sum(0)

    def stats(self) -> AttentionStats:
        """Return what was told so far, on the CPU."""
        received = (self._received / self._count).cpu()  # [L, A, S]
        return AttentionStats(
            share=received.double() @ self._keys.cpu().double().T,
            entropy=self._entropy.cpu().double() / self._seeing.cpu(),
            evenness=self._evenness.cpu().double() / self._choosing.cpu(),
            received=received,
        )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and standard deviation over prompts, and how many there were; [L, A, B] each."""

    mean: Tensor
    deviation: Tensor
    count: Tensor

    @classmethod
    def of(cls, tables: list[Tensor]) -> "Spread":
        """Return those of some tables [L, A, B]; nan is left out."""
        stacked = torch.stack(tables)  # [prompts, L, A, B]
        count = (~stacked.isnan()).sum(0)
        mean = stacked.nanmean(0)
        square = (stacked - mean).square().nansum(0) / (count - 1).clamp(min=1)
        return cls(mean=mean, deviation=square.sqrt(), count=count)

    @property
    def error(self) -> Tensor:
        """Half of the 95 % interval of the mean."""
        return 1.96 * self.deviation / self.count.clamp(min=1).sqrt()
