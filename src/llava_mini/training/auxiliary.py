"""Losses that only training has: they ask hidden states what they know of a thing.

In a small world the answer loss alone leaves some skills at chance for long: the noun does not bind its
colour word, so the model does not know which of two things is meant, and nothing forces place into the
one token of a frame. Three small heads help. One tells from the fused token of a noun whether there is such
a thing, where, and of which colour, shape and size. One tells from the token of a frame together with
a name whether such a thing is there, and where. And one reads, before the last layer of the language model,
the token of a noun in a question about a clip: it tells where and when that thing is first and last seen. The heads
are not part of the model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_mini.data.changes import CHANGES, DIRECTIONS, IGNORED
from llava_mini.data.collate import ClipNouns, FrameChanges, FrameThings, NounTokens, ShownThings

BINS = 12
"""Places along an axis, and moments of a clip, that the heads tell apart."""


class FrameHead(nn.Module):
    """From what stands for a frame, together with a name, to whether such a thing is there and where. D: its width."""

    def __init__(self, width: int) -> None:
        """Make the head.

        Args:
            width: D.
        """
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 2 + 2 * BINS)
        )

    def forward(self, frames: Tensor, names: Tensor, present: Tensor, places: Tensor) -> Tensor:
        """Return the loss on M pairs of a frame and a name; 0 without any.

        Args:
            frames: [M, D].
            names: [M, D].
            present: [M] int64: 1 where the frame shows such a thing.
            places: [M, 2] float32: where it is, as shares of width and height; not read where it is not there.
        """
        seen, where = self.layers(torch.cat([frames, names], dim=-1)).float().split((2, 2 * BINS), dim=-1)
        there = present == 1
        return _mean_loss(seen, present) + _place_loss(where[there], places[there])


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
        self.of_frame = FrameHead(width)
        shown = nn.Linear(width, self.num_values["colour"] * self.num_values["shape"])
        nn.init.constant_(shown.bias, -3.5)  # most things are not there
        self.of_shown = nn.Sequential(nn.LayerNorm(width), shown)
        self.of_clip_noun = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 6 * BINS))
        numbers = {**num_values, "direction": DIRECTIONS}
        self.num_changes = {name: 1 + numbers[fact] for name, fact in CHANGES.items()}
        self.of_change = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.num_changes.values())))

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
        """Return the loss on what the tokens of frames, in the mean, tell about names; 0 without names.

        Args:
            embeds: [B, T, D], what the language model reads.
            words: [M, D], the mean of the embeddings of each name.
            things: Which tokens, and the right answers.
        """
        frames = embeds[things.prompts[:, None], things.tokens].mean(1)  # [M, D]
        return self.of_frame(frames, words, things.present, things.places)

    def clip_loss(self, hidden: Tensor, nouns: ClipNouns) -> Tensor:
        """Return the loss on what nouns in questions about clips tell of their trajectory; 0 without nouns.

        Args:
            hidden: [B, T, D], from within the language model.
            nouns: Which tokens, and the right trajectories.
        """
        return _place_loss(self.of_clip_noun(hidden[nouns.prompts, nouns.tokens]), nouns.trajectories)

    def shown_loss(self, embeds: Tensor, shown: ShownThings) -> Tensor:
        """Return the loss, for each thing, on which colours of which shapes a frame shows; 0 without clips.

        It is read off by one linear layer: a frame's token becomes a sum over things, and the difference of two
        frames what has changed between them.

        Args:
            embeds: [B, T, D], what the language model reads.
            shown: Which tokens, and all that is there.
        """
        logits = self.of_shown(embeds[shown.prompts[:, None], shown.tokens].mean(1)).float()  # [N, colours * shapes]
        if not len(shown.frames):
            return logits.sum()
        known = (shown.facts["colour"] != IGNORED) & (shown.facts["shape"] != IGNORED)
        names = shown.facts["colour"] * self.num_values["shape"] + shown.facts["shape"]
        there = torch.zeros_like(logits)
        there[shown.frames[known], names[known]] = 1
        losses = functional.binary_cross_entropy_with_logits(logits, there, reduction="sum")
        return losses / len(shown.frames)

    def change_loss(self, hidden: Tensor, changes: FrameChanges) -> Tensor:
        """Return the loss on what the tokens of frames, in the mean, tell of what is new; 0 without clips.

        Args:
            hidden: [B, T, D], from within the language model.
            changes: Which tokens, and the right answers.
        """
        logits = self.of_change(hidden[changes.prompts[:, None], changes.tokens].mean(1)).float()  # [N, all values]
        parts = logits.split(tuple(self.num_changes.values()), dim=-1)
        losses = []
        for name, values in zip(self.num_changes, parts, strict=True):
            known = changes.facts[name] != IGNORED
            losses.append(_mean_loss(values[known], changes.facts[name][known]))
        return torch.stack(losses).mean()


def _place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """logits: [N, n * BINS]; places: [N, n] from 0 to 1."""
    bins = (places * BINS).long().clamp(0, BINS - 1)  # [N, n]
    return _mean_loss(logits.float().view(-1, BINS), bins.flatten())


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, 0 without rows. logits: [N, values]; targets: [N] int64."""
    return functional.cross_entropy(logits, targets) if len(targets) else logits.sum()
