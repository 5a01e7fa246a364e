"""The analysis of a model over many questions: everything that the page shows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llava_mini.analysis.attention_stats import PARTS, AttentionStats, Spread
from llava_mini.analysis.canvas import Canvas
from llava_mini.analysis.drop_layers import Dropped, drop_ranges, mark_dropped
from llava_mini.analysis.pointing import pointing
from llava_mini.analysis.samples import Asked
from llava_mini.analysis.subject import Prompted, QueryLook, Subject, Watched
from llava_mini.analysis.words import WordReads

Answers = Literal["model", "data"]
"""Whose answers the response tokens are."""

PREFUSION, LANGUAGE = "pre-fusion", "language model"
"""Where words look at patches."""


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """What is done with each question."""

    answers: Answers = "model"
    """``model``: the response is the model's own greedy answer; ``data``: the right one."""
    examples: int = 4
    """Questions that get pictures of their own."""
    dropped: int = 100
    """With the first so many, vision tokens are dropped in layers."""
    max_tokens: int = 64
    """An answer is cut there."""

    def __post_init__(self) -> None:
        for name, least in (("examples", 0), ("dropped", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question with its pictures."""

    asked: Asked
    answer: str
    """The model's."""
    canvases: tuple[Canvas, ...]
    reading: Tensor
    """[L, V]: attention from the text after the image to each vision token."""
    by_frame: Tensor
    """[L, frames]: the same, to all tokens of each image or frame."""
    words: dict[str, tuple[WordReads, ...]]
    """Where words look, in ``PREFUSION`` and in the ``LANGUAGE`` model; empty if that has no places in a picture."""
    looks: tuple[QueryLook, ...]


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Means over questions of what attends to what."""

    share: Spread
    entropy: Spread
    evenness: Spread

    @classmethod
    def of(cls, stats: list[AttentionStats]) -> "Averages":
        """Return those of some questions, each of which counts alike."""
        return cls(
            share=Spread.of([one.share for one in stats]),
            entropy=Spread.of([one.entropy for one in stats]),
            evenness=Spread.of([one.evenness for one in stats]),
        )


@dataclass(kw_only=True)
class Findings:
    """What was found."""

    questions: int = 0
    right: list[float] = field(default_factory=list)
    """Marks of the model's own answers."""
    attention: Averages | None = None
    """Between ``PARTS`` in the language model. None: not one question was asked."""
    fusion: Averages | None = None
    """From ``fusion.TEXTS`` to ``fusion.SOURCES`` in pre-fusion. None: the model has none."""
    dropped: list[Dropped] = field(default_factory=list)
    """In how many ways vision tokens were dropped; empty if they were not."""
    pointing: dict[str, Spread] = field(default_factory=dict)
    """[L, 1, LINES]: whether words look at what they name, in ``PREFUSION`` and in the ``LANGUAGE`` model."""
    examples: list[Example] = field(default_factory=list)
    vision_tokens: list[int] = field(default_factory=list)
    """Of each prompt."""
    response_tokens: list[int] = field(default_factory=list)


def analyse(
    subject: Subject,
    samples: Iterable[Asked],
    settings: AnalysisSettings,
    progress: Callable[[int], object] = lambda done: None,
) -> Findings:
    """Ask all questions, one by one, and look at what the model does.

    Args:
        subject: Whom.
        samples: What; each is read once.
        settings: How.
        progress: Called with the number of questions done since the last call.
    """
    found, stats, fusions = Findings(), list[AttentionStats](), list[AttentionStats]()
    pointed: dict[str, list[Tensor]] = {PREFUSION: [], LANGUAGE: []}
    ways = drop_ranges(len(subject.attentions))
    for asked in samples:
        prompted = subject.prompt(asked)
        own = subject.answer(prompted, settings.max_tokens)
        response = own if settings.answers == "model" else subject.ids_of(asked.answer)[: settings.max_tokens]
        watched = subject.watch(prompted, response)
        words = {PREFUSION: () if prompted.fusion is None else prompted.fusion.words, LANGUAGE: watched.words}
        text = subject.text_of(own)
        if found.questions < settings.dropped:
            mark_dropped(subject, prompted, asked, ways, own, settings.max_tokens)
            found.dropped = ways
        if found.questions < settings.examples:
            found.examples.append(_example(asked, text, prompted, watched, words))
        for where, reads in words.items():
            pointed[where] += pointing(reads, asked.nouns)
        stats.append(watched.stats.of(len(PARTS), tokens=0))
        if prompted.fusion is not None:
            fusions.append(prompted.fusion.stats.of(len(PARTS), tokens=0))
        found.right.append(asked.right(text))
        found.vision_tokens.append(int(prompted.is_vision.sum()))
        found.response_tokens.append(len(response))
        found.questions += 1
        progress(1)
    found.attention = Averages.of(stats) if stats else None
    found.fusion = Averages.of(fusions) if fusions else None
    found.pointing = {where: Spread.of([one[:, None] for one in tables]) for where, tables in pointed.items() if tables}
    return found


def _example(
    asked: Asked, answer: str, prompted: Prompted, watched: Watched, words: dict[str, tuple[WordReads, ...]]
) -> Example:
    reading = watched.stats.received[:, PARTS.index("reading"), : len(prompted.is_vision)]
    reading = reading[:, prompted.is_vision.cpu()]  # [L, V]
    return Example(
        asked=asked,
        answer=answer,
        canvases=prompted.canvases,
        reading=reading,
        by_frame=torch.stack([part.sum(1) for part in reading.split(prompted.tokens_of_frames, dim=1)], dim=1),
        words=words,
        looks=prompted.looks,
    )
