"""Losses that only training has: they ask hidden states where things are.

In a small world the answer loss alone leaves two skills at chance for long: which of two things is to
the left (the noun does not bind its colour word), and which way a thing moves (nothing forces place
into the one token of a frame). Two small heads name the place of a thing, from the fused token of its
noun, and from the token of a frame together with the thing's name. The heads are not part of the model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_mini.data.collate import FrameThings, NounTokens

BINS = 12
"""Places along an axis that the heads tell apart."""


class PlaceHeads(nn.Module):
    """From hidden states to the place of a thing, in training only. D: language width."""

    def __init__(self, width: int) -> None:
        """Make the heads for states of ``width`` channels."""
        super().__init__()
        self.of_noun = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * BINS))
        self.of_frame = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 2 * BINS)
        )

    def noun_loss(self, embeds: Tensor, nouns: NounTokens) -> Tensor:
        """Return the loss on the places that fused nouns tell; 0 when the batch names nothing.

        Args:
            embeds: [B, T, D], what the language model reads.
            nouns: Which tokens, and the right places.
        """
        return _place_loss(self.of_noun(embeds[nouns.prompts, nouns.tokens]), nouns.places)

    def frame_loss(self, embeds: Tensor, words: Tensor, things: FrameThings) -> Tensor:
        """Return the loss on the places that the tokens of frames tell about named things; 0 without clips.

        Args:
            embeds: [B, T, D], what the language model reads.
            words: [M, D], the mean of the embeddings of each thing's name; no gradient goes there.
            things: Which tokens, and the right places.
        """
        states = torch.cat([embeds[things.prompts, things.tokens], words.detach()], dim=-1)  # [M, 2 D]
        return _place_loss(self.of_frame(states), things.places)


def _place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """logits: [N, 2 * BINS]; places: [N, 2] from 0 to 1."""
    if not len(places):
        return logits.sum()
    bins = (places * BINS).long().clamp(0, BINS - 1)  # [N, 2]
    return functional.cross_entropy(logits.float().view(-1, BINS), bins.flatten())
