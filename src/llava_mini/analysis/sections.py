"""The parts of the page: what each shows, in words, pictures and a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from llava_mini.analysis import charts, heatmap
from llava_mini.analysis.findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTENTION = """\
The share of attention that goes from tokens of one type to those of another, by layer (equations 4 and 5, Figure 2):
mean over heads, over the tokens that attend, then over questions, with the 95 % interval of the last mean. The
instruction is all text but the answer: system prompt, question and control tokens. A first token attracts attention
whatever it is, so its part of the instruction is drawn too.
"""
ENTROPY = """\
The entropy of the attention to tokens of one type, made to add up to 1 (appendix A, Figure 3). More tokens allow more
entropy, so the second picture shows it as a share of the largest that the visible tokens of that type allow: 1 is even
attention, 0 is attention to one of them.
"""
MAPS = """\
How the attention of all text after the image is spread over it (Figure 4), for single questions. Above a map stands
how much of that attention goes to vision tokens in all; the map, on a scale of its own, says where it goes. Where
tokens are compressed by attention, a token is laid out over the patches that it was made of.
"""
FRAMES = """\
How much of the attention of all text after the first frame goes to the vision tokens of each frame, for single
questions.
"""
DROPPED = """\
Right answers when in some layers no text token sees a vision token (Figure 5), with 95 % intervals. Vision tokens go
on reading one another.
"""
PREFUSION = """\
As above, in the layers before the language model: what text before the image (system prompt and control tokens) and
text after it attends to, averaged over frames.
"""
WORDS = """\
In pre-fusion, for single questions and their first frame. Above a map stands the share of the word's attention that
goes to patches; the map, on a scale of its own, says where it goes.
"""
QUERIES = """\
The reducer's attention over the patches, mean over its heads (Figure 12), beside the picture; each map has a scale of
its own.
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    text: str
    figures: Mapping[str, "Figure"]
    """By the name of their file, without its ending."""
    data: str
    """The CSV file behind it."""


def sections(found: Findings) -> list[Section]:
    """Return the parts that there is something to show in."""
    figures: list[tuple[str, str, dict[str, Figure | None], str]] = []
    if found.attention is not None:
        pictures = {"attention": charts.draw_attention(found.attention)}
        figures.append(("What each type of token attends to", ATTENTION, {**pictures}, "attention.csv"))
        entropies = {"entropy": found.attention.entropy, "evenness": found.attention.evenness}
        pictures = {name: charts.draw_entropy(spread, name) for name, spread in entropies.items()}
        figures.append(("How evenly they attend", ENTROPY, {**pictures}, "attention.csv"))
    examples = dict(enumerate(found.examples, 1))
    maps = {f"map-{number}": heatmap.draw_layers(example) for number, example in examples.items()}
    figures.append(("Where in the image, layer by layer", MAPS, maps, "maps.csv"))
    frames = {f"frames-{number}": heatmap.draw_frames(example) for number, example in examples.items()}
    figures.append(("At which frames, layer by layer", FRAMES, frames, "frames.csv"))
    if found.dropped:
        picture = charts.draw_dropped(found.dropped, mean(found.guesses) if found.guesses else None)
        title = f"Answers to {len(found.dropped[0].marks)} questions without vision tokens in some layers"
        figures.append((title, DROPPED, {"dropped": picture}, "dropped.csv"))
    if found.fusion is not None:
        picture = charts.draw_fusion(found.fusion)
        figures.append(("What the text reads in pre-fusion", PREFUSION, {"prefusion": picture}, "prefusion.csv"))
    words = {f"words-{number}": heatmap.draw_words(example) for number, example in examples.items()}
    figures.append(("Which patches each word reads", WORDS, words, "words.csv"))
    queries = {"queries": heatmap.draw_looks(found.examples)}
    figures.append(("Where the compression queries look", QUERIES, queries, "queries.csv"))
    parts = []
    for title, text, pictures, data in figures:
        drawn = {name: figure for name, figure in pictures.items() if figure is not None}
        if drawn:
            parts.append(Section(title=title, text=text.replace("\n", " ").strip(), figures=drawn, data=data))
    return parts
