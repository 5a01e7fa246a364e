"""Whether a word looks at what it names. Only drawn scenes know where that is.

Shapes: L layers.
"""

import string
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_mini.analysis.words import WordReads
from llava_mini.data.records import Noun

REACH = 1 / 6
"""What lies so near the centre of a thing, as a share of the width of the picture, counts as the thing."""

LINES = ("the word that names it", "other words of the question", "even attention")
"""What is compared: how much of its attention to the patches a word pays to a thing."""


def pointing(words: Sequence[WordReads], nouns: Sequence[Noun]) -> list[Tensor]:
    """Return how much of the attention to the patches goes to each named thing: [L, LINES] for each.

    A thing counts if its name stands once in the question and it is there in the first frame. The word that names it
    is the last one of its name: it knows the words before it.

    Args:
        words: All words of the question.
        nouns: Things that it names, with their places.
    """
    texts = [word.word.strip(string.punctuation) for word in words]
    tables = []
    for noun in nouns:
        name = noun.phrase.split()
        starts = [start for start in range(len(texts)) if texts[start : start + len(name)] == name]
        if len(starts) != 1 or not noun.path or noun.path[0] is None:
            continue
        end = starts[0] + len(name)
        region = _region(noun.path[0], words[end - 1].maps.shape[-2:])
        on_thing = torch.stack([word.maps[0, :, region].sum(1) for word in words])  # [words, L]
        others = [place for place in range(len(words)) if not starts[0] <= place < end]
        even = torch.full_like(on_thing[0], float(region.float().mean()))
        named = on_thing[end - 1]
        tables.append(torch.stack([named, on_thing[others].mean(0) if others else even * torch.nan, even], dim=1))
    return tables


def _region(centre: tuple[float, float], size: torch.Size) -> Tensor:
    """Patches whose centres lie near a place (x, y): [rows, columns] bool. The patch of the place is one of them."""
    x, y = ((torch.arange(length) + 0.5) / length for length in reversed(size))
    distance = ((x[None, :] - centre[0]).square() + (y[:, None] - centre[1]).square()).sqrt()
    return distance <= max(REACH, float(distance.min()))
