"""Losses that only training has: they ask hidden states what they know of a thing.

In a small world the answer loss alone leaves some skills at chance for long: the noun does not bind its
colour word, so the model does not know which of two things is meant, and nothing forces place into the
one token of a frame. Two small heads help: one tells from the fused token of a noun whether there is such
a thing, where, and of which colour, shape and size; the other tells from the token of a frame together with
a name whether such a thing is there, and where. The heads are not part of the model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_mini.data.collate import IGNORED, FrameThings, NounTokens

BINS = 12
"""Places along an axis that the heads tell apart."""


class ThingHeads(nn.Module):
    """From hidden states to facts about a thing, in training only. D: language width."""

    def __init__(self, width: int, num_values: Mapping[str, int]) -> None:
        """Make the heads.

        Args:
            width: D.
            num_values: How many values each property has.
        """
        super().__init__()
        self.num_values = dict(num_values)
        self.of_noun = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 + 2 * BINS + sum(num_values.values())))
        self.of_frame = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 2 + 2 * BINS)
        )

    def noun_loss(self, embeds: Tensor, nouns: NounTokens) -> Tensor:
        """Return the mean loss on what fused nouns tell; 0 when the batch names nothing.

        Args:
            embeds: [B, T, D], what the language model reads.
            nouns: Which tokens, and the right facts.
        """
        logits = self.of_noun(embeds[nouns.prompts, nouns.tokens]).float()  # [N, all values]
        if not len(logits):
            return logits.sum()
        present, places, *facts = logits.split((2, 2 * BINS, *self.num_values.values()), dim=-1)
        there = nouns.present == 1
        losses = [functional.cross_entropy(present, nouns.present), _place_loss(places[there], nouns.places[there])]
        for name, values in zip(self.num_values, facts, strict=True):
            known = nouns.facts[name] != IGNORED
            losses.append(_mean_loss(values[known], nouns.facts[name][known]))
        return torch.stack(losses).mean()

    def frame_loss(self, embeds: Tensor, words: Tensor, things: FrameThings) -> Tensor:
        """Return the loss on what the tokens of frames tell about names: present or not, and where; 0 without names.

        Args:
            embeds: [B, T, D], what the language model reads.
            words: [M, D], the mean of the embeddings of each name; no gradient goes there.
            things: Which tokens, and the right answers.
        """
        states = torch.cat([embeds[things.prompts, things.tokens], words.detach()], dim=-1)  # [M, 2 D]
        present, places = self.of_frame(states).float().split((2, 2 * BINS), dim=-1)
        there = things.present == 1
        return _mean_loss(present, things.present) + _place_loss(places[there], things.places[there])


def _place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """logits: [N, 2 * BINS]; places: [N, 2] from 0 to 1."""
    bins = (places * BINS).long().clamp(0, BINS - 1)  # [N, 2]
    return _mean_loss(logits.float().view(-1, BINS), bins.flatten())


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, 0 without rows. logits: [N, values]; targets: [N] int64."""
    return functional.cross_entropy(logits, targets) if len(targets) else logits.sum()
