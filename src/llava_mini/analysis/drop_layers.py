"""Answers with vision tokens dropped in some layers (section 3.2, Figure 5).

Dropped means: in those layers no text token sees a vision token, neither in the prompt nor while the answer is made.
Vision tokens go on reading one another, so that in other layers they are what the model knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_mini.analysis.kernels import hiding, kernel_in
from llava_mini.analysis.samples import Asked
from llava_mini.analysis.subject import Prompted, Subject
from llava_mini.evaluation.intervals import wilson

MOST_RANGES = 8
"""Into so many ranges layers are divided, as in the paper: 1-4, 5-8, ... of 32."""


@dataclass(frozen=True, kw_only=True)
class DropMark:
    """One answer."""

    right: float
    shows_video: bool
    guess: float | None
    """How right a blind guess is. None: nobody guesses."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """In which layers vision tokens are dropped, and how right the answers then are."""

    series: str
    """``nowhere``, ``everywhere``, ``in a range`` or ``from a layer on``."""
    first: int
    """The first layer of them, from 0."""
    stop: int
    """The layer after the last one. Equal to ``first``: they are dropped nowhere."""
    marks: list[DropMark] = field(default_factory=list)
    """Of each question."""

    @property
    def layers(self) -> str:
        """The layers as people count them: ``5-8``."""
        if self.first == self.stop:
            return "none"
        return str(self.stop) if self.stop == self.first + 1 else f"{self.first + 1}-{self.stop}"

    @property
    def in_words(self) -> str:
        """``layer 1``, or ``layers 5-8``."""
        return f"layer{'s' * (self.stop > self.first + 1)} {self.layers}"

    @property
    def right(self) -> float:
        """Share of right answers."""
        return sum(mark.right for mark in self.marks) / len(self.marks)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return wilson(self.right, len(self.marks))

    @property
    def guess(self) -> float | None:
        """Share of right guesses. None: nobody guesses."""
        guesses = [mark.guess for mark in self.marks if mark.guess is not None]
        return sum(guesses) / len(guesses) if guesses else None

    def about(self, *, videos: bool) -> "Dropped":
        """Return the same of questions about videos alone, or about images alone."""
        marks = [mark for mark in self.marks if mark.shows_video == videos]
        return Dropped(series=self.series, first=self.first, stop=self.stop, marks=marks)


def drop_ranges(num_layers: int) -> list[Dropped]:
    """Return all the ways in which vision tokens are dropped from a model of so many layers."""
    size = max(-(-num_layers // MOST_RANGES), 1)
    starts = range(0, num_layers, size)
    return [
        Dropped(series="nowhere", first=0, stop=0),
        *(Dropped(series="in a range", first=start, stop=min(start + size, num_layers)) for start in starts),
        Dropped(series="everywhere", first=0, stop=num_layers),
        *(Dropped(series="from a layer on", first=start, stop=num_layers) for start in starts[1:]),
    ]


def by_medium(ways: Sequence[Dropped]) -> dict[str, list[Dropped]]:
    """Return the ways for questions about images and about videos, as far as there are some."""
    groups = {
        name: [way.about(videos=videos) for way in ways] for name, videos in (("images", False), ("videos", True))
    }
    return {name: group for name, group in groups.items() if group and group[0].marks}


def answer_without(subject: Subject, prompted: Prompted, first: int, stop: int, max_tokens: int) -> tuple[int, ...]:
    """Return the ids of the answer with vision tokens dropped in the layers from ``first`` to before ``stop``."""
    modules = set(subject.attentions[first:stop])
    with kernel_in(subject.decoder, hiding(modules, prompted.is_vision)):
        return subject.answer(prompted, max_tokens)


def mark_dropped(
    subject: Subject,
    prompted: Prompted,
    asked: Asked,
    ways: Sequence[Dropped],
    own_answer: tuple[int, ...],
    max_tokens: int,
) -> None:
    """Answer a question in every way and add the marks to ``ways``; ``own_answer`` is that with nothing dropped."""
    answers = {(0, 0): own_answer}  # the last range is also all from there on
    for way in ways:
        layers = way.first, way.stop
        if layers not in answers:
            answers[layers] = answer_without(subject, prompted, *layers, max_tokens)
        right = asked.right(subject.text_of(answers[layers]))
        way.marks.append(DropMark(right=right, shows_video=asked.shows_video, guess=asked.guess_right))
