"""The words of a question, and where each of them looks in a picture.

Shapes: F frames, L layers, S tokens of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BEGINS_A_WORD = ("\u2581", "\u0120", "\u010a")
"""How SentencePiece and byte-level tokens begin that have a space or a new line before them."""

MOST_WORD_LAYERS = 6
"""Layers that are shown of each word: there are many words."""

TINY = 1e-12
"""In place of a share of 0 where something is divided by it."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word of a prompt."""

    text: str
    places: tuple[int, ...]
    """Its tokens."""


@dataclass(frozen=True, kw_only=True)
class WordReads:
    """Where one word looked."""

    word: str
    share: Tensor
    """[F, L]: how much of its attention went to the patches of a frame, in each layer."""
    maps: Tensor
    """[F, L, rows, columns]: which patches that was, as shares of it."""


def words_of(tokens: Tensor, wanted: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[Word]:
    """Return the words of a text in order; control tokens and white space are left out.

    Args:
        tokens: [S] int64, of the whole prompt.
        wanted: [S] bool: which of them are of interest.
        tokenizer: Knows how tokens are written.
    """
    ids, control, found, ended = tokens.tolist(), set(tokenizer.all_special_ids), list[list[int]](), True
    for place in wanted.nonzero()[:, 0].tolist():
        token = cast(str, tokenizer.convert_ids_to_tokens(ids[place]))
        if ids[place] in control or not _text(tokenizer, [ids[place]]):
            ended = True
            continue
        if ended or token.startswith(_BEGINS_A_WORD) or place != found[-1][-1] + 1:
            found.append([])
        found[-1].append(place)
        ended = False
    return [Word(text=_text(tokenizer, [ids[place] for place in word]), places=tuple(word)) for word in found]


def chosen_layers(num_layers: int, most: int) -> list[int]:
    """Return all layers; of more than ``most``, so many evenly, the first and the last among them."""
    if num_layers <= most:
        return list(range(num_layers))
    return [round(place * (num_layers - 1) / (most - 1)) for place in range(most)]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Tokens in letters, without white space around them."""
    return str(tokenizer.decode(ids)).strip()


def word_rows(words: Sequence[Word], length: int) -> Tensor:
    """Which tokens are of which word: [words, length] bool."""
    rows = torch.zeros(len(words), length, dtype=torch.bool)
    for row, word in zip(rows, words, strict=True):
        row[list(word.places)] = True
    return rows
