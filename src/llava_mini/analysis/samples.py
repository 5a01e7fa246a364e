"""Questions about images and videos with known answers: drawn scenes, or records in the format of LLaVA."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from llava_mini.data.mixture import Mixture
from llava_mini.data.records import Noun
from llava_mini.data.samples import Sample
from llava_mini.data.synthetic.blind import BlindBaseline
from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.exact_match import CAPTION_KINDS, mark

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question about images or videos."""

    name: str
    messages: list[Message]
    """In the chat format of transformers, up to the question, media with their sources."""
    answer: str
    """The right one."""
    right: Callable[[str], float]
    """How right an answer is, 0 to 1."""
    nouns: tuple[Noun, ...] = ()
    """Things that the question names, with their places: known of drawn scenes only."""
    guess_right: float | None = None
    """How right a guess from the words of the question alone is. None: nobody guesses."""

    @property
    def question(self) -> str:
        """The words of the question."""
        return "".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text").strip()

    @property
    def shows_video(self) -> bool:
        """Whether there is a video."""
        return any(part["type"] == "video" for message in self.messages for part in message["content"])


def world_samples(bench: Bench, count: int, *, videos: bool) -> Iterator[Asked]:
    """Give the first questions of the drawn world, one kind after another in turn; descriptions are left out.

    Args:
        bench: Which world.
        count: How many.
        videos: Whether clips are asked about too.
    """
    known = bench.weights.kinds if videos else tuple(bench.weights.images)
    kinds = [kind for kind in known if kind not in CAPTION_KINDS]
    blind: Callable[[str], BlindBaseline] = cache(bench.blind)
    for number in range(count):
        kind, index = kinds[number % len(kinds)], number // len(kinds)
        record = bench.item(kind, index).record()
        turn = record.turns[0]
        yield Asked(
            name=f"{kind} {index}",
            messages=record.messages(last_answer=False),
            answer=turn.answer,
            right=partial(mark, turn),
            nouns=turn.nouns,
            guess_right=mark(turn, blind(kind).answer(turn)),
        )


def record_samples(mixture: Mixture, count: int, *, videos: bool) -> Iterator[Asked]:
    """Give the first question of each record that begins with a question about images, up to ``count``.

    Raises:
        ValueError: No record does, or one is about a video and ``videos`` is False.
    """
    given = 0
    for index in range(len(mixture)):
        asked = _asked(mixture[index])
        if asked is None:
            continue
        if asked.shows_video and not videos:
            raise ValueError(
                f"Record {asked.name!r} shows a video, which this model does not read. Give records with images."
            )
        yield asked
        given += 1
        if given == count:
            return
    if not given:
        names = ", ".join(repr(str(file.path)) for file in mixture.files)
        raise ValueError(
            f"None of the {len(mixture)} records of {names} begins with a question about an image or a video. Give "
            "records that do: without vision tokens there is nothing to analyse."
        )


def _asked(sample: Sample) -> Asked | None:
    messages = sample.conversation()
    first = [message["role"] for message in messages].index("user")
    if all(part["type"] == "text" for part in messages[first]["content"]) or len(messages) == first + 1:
        return None
    answer = "".join(part["text"] for part in messages[first + 1]["content"])
    return Asked(
        name=sample.id, messages=messages[: first + 1], answer=answer, right=lambda given: float(_same(given, answer))
    )


def _same(given: str, answer: str) -> bool:
    """Whether two answers are equal, up to case and a full stop at the end."""
    one, other = (text.strip().removesuffix(".").casefold() for text in (given, answer))
    return one == other
