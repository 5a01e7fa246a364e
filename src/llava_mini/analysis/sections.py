"""The parts of the page: what each shows, in words, pictures and a table."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava_mini.analysis import charts, heatmap
from llava_mini.analysis.findings import LANGUAGE, PREFUSION, Example, Findings
from llava_mini.analysis.words import MOST_WORD_LAYERS

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
MAPS = f"""\
How the attention of all text after the image is spread over it (Figure 4), for single questions. Above a map stands
how much of that attention goes to vision tokens in all; the map, on a scale of its own, says where it goes. Where
tokens are compressed by attention, a token is laid out over the patches that it was made of. Of more than
{heatmap.MOST_LAYERS} layers so many are drawn, the first and the last among them; the table has all.
"""
FRAMES = """\
How much of the attention of all text after the first frame goes to the vision tokens of each frame, for single
questions.
"""
DROPPED = """\
Right answers when in some layers no text token sees a vision token (Figure 5), with 95 % intervals. Vision tokens go
on reading one another.
"""
FUSION = """\
The share of attention as above, in the layers before the language model: what text before the image (system prompt
and control tokens) and text after it attends to, averaged over frames.
"""
WORDS = f"""\
For single questions and their first picture. Above a map stands the share of the word's attention that goes to the
patches; the map, on a scale of its own, says where it goes. Of a longer question the last {heatmap.MOST_WORDS}
words are drawn; the table has all. Of more than {MOST_WORD_LAYERS} layers so many are shown, the first and the last
among them.
"""
POINTING = """\
On drawn scenes it is known where a thing is that a question names. How much of a word's attention to the patches goes
to those that lie no further from its centre than a sixth of the picture's width: of the word that names it, and for
comparison of the question's other words, and of attention that is the same everywhere; means over names, with 95 %
intervals.
"""
QUERIES = f"""\
The reducer's attention over the patches, mean over its heads (Figure 12), beside the picture; each map has a scale of
its own. Of more than {heatmap.MOST_QUERIES} queries the first are drawn; the table has all.
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    text: str
    data: str
    """The CSV file behind it."""
    figures: dict[str, "Figure"]
    """By the name of their file, without its ending."""
    captions: dict[str, str] = field(default_factory=dict)
    """Of some of them."""


def sections(found: Findings) -> list[Section]:
    """Return the parts that there is something to show in."""
    averages, fusion = found.attention, found.fusion
    general: dict[str, Figure | None] = {
        "attention": charts.draw_attention(averages) if averages else None,
        "entropy": charts.draw_entropy(averages.entropy, "entropy") if averages else None,
        "evenness": charts.draw_entropy(averages.evenness, "evenness") if averages else None,
        "dropped": charts.draw_dropped(found.dropped) if found.dropped else None,
        "prefusion": charts.draw_fusion(fusion) if fusion else None,
        "pointing": charts.draw_pointing(found.pointing) if found.pointing else None,
        "queries": heatmap.draw_looks(found.examples),
    }
    single = {
        "map": heatmap.draw_layers,
        "frames": heatmap.draw_frames,
        "read": lambda example: heatmap.draw_words(example, LANGUAGE),
        "words": lambda example: heatmap.draw_words(example, PREFUSION),
    }
    examples = {str(number): example for number, example in enumerate(found.examples, 1)}

    def part(title: str, text: str, data: str, *names: str) -> Section:
        drawn = {name: general[name] for name in names if name in general}
        drawn |= {f"{name}-{at}": single[name](one) for name in names if name in single for at, one in examples.items()}
        figures = {name: figure for name, figure in drawn.items() if figure is not None}
        captions = {
            name: _caption(number, one)
            for name in figures
            for number, one in examples.items()
            if name.endswith(f"-{number}")
        }
        return Section(title=title, text=" ".join(text.split()), data=data, figures=figures, captions=captions)

    asked = len(found.dropped[0].marks) if found.dropped else 0
    parts = [
        part("What each type of token attends to", ATTENTION, "attention.csv", "attention"),
        part("How evenly they attend", ENTROPY, "attention.csv", "entropy", "evenness"),
        part("Where in the image, layer by layer", MAPS, "maps.csv", "map"),
        part("At which frames, layer by layer", FRAMES, "frames.csv", "frames"),
        part("Which patches each word reads in the language model", WORDS, "words.csv", "read"),
        part(f"{asked} answers without vision tokens in some layers", DROPPED, "dropped.csv", "dropped"),
        part("What the text reads in pre-fusion", FUSION, "prefusion.csv", "prefusion"),
        part("Which patches each word reads in pre-fusion", WORDS, "words.csv", "words"),
        part("Whether words look at what they name", POINTING, "pointing.csv", "pointing"),
        part("Where the compression queries look", QUERIES, "queries.csv", "queries"),
    ]
    return [one for one in parts if one.figures]


def _caption(number: str, example: Example) -> str:
    """What was asked and answered, in letters that no picture may have."""
    asked = example.asked
    return f"Question {number}: {asked.question} | Answer: {example.answer or '(nothing)'} | Right: {asked.answer}"
