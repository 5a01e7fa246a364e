"""Marks of answers, and scores by kind of question beside what a blind guess reaches.

An answer is right if it is the right one word for word. Descriptions are marked by the share of the right phrases
in them instead: two long sentences are hardly ever equal, and their equality would say little about what was seen.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_mini.data.records import Record, Turn
from llava_mini.evaluation.intervals import effective_number, wilson
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor

CAPTION_KINDS = ("caption", "clip caption")
"""Kinds of questions that are answered by a description."""

SHARE_OF_CLIPS = 0.4
"""Weight of clips in the score of ``all``; that of images is the rest."""

Progress = Callable[[int], object]
"""Called with a number of questions that were answered since the last call."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What was answered to a question, and what a blind guess says."""

    turn: Turn
    index: int
    """Which of the questions of its kind, from 0."""
    answer: str
    guess: str

    @property
    def right(self) -> float:
        """How right the answer is, 0 to 1."""
        return mark(self.turn, self.answer)

    @property
    def guess_right(self) -> float:
        """How right the blind guess is, 0 to 1."""
        return mark(self.turn, self.guess)

    def facts(self) -> dict[str, str | int | float | bool]:
        """Return all of it as plain values."""
        turn = self.turn
        return {
            "kind": turn.kind,
            "form": turn.form,
            "index": self.index,
            "question": turn.question,
            "right_answer": turn.answer,
            "answer": self.answer,
            "blind_guess": self.guess,
            "right": self.right,
            "new_phrasing": turn.held_out,
        }


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many questions of a kind were answered rightly."""

    exact: float
    """Share of answers in exactly the right words, 0 to 1; of descriptions, the mean F1 of their phrases."""
    low: float
    """Lower end of the 95 % interval of ``exact``."""
    high: float
    """Upper end."""
    blind: float
    """The same share for the commonest answer to each form of question."""
    questions: int


@dataclass(frozen=True, kw_only=True)
class KindWeights:
    """How often each kind of question is asked, relative to the others."""

    images: Mapping[str, float]
    clips: Mapping[str, float]
    """Empty for a model that was not taught clips."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds, those of images first."""
        return (*self.images, *self.clips)


def mark(turn: Turn, answer: str) -> float:
    """Return how right an answer is: 0 or 1, and something between for a description."""
    if turn.kind in CAPTION_KINDS:
        return phrase_f1(turn.answer, answer)
    return float(answer == turn.answer)


def phrase_f1(right: str, answer: str) -> float:
    """Return the harmonic mean of how many phrases of an answer are right and how many right ones it has.

    Phrases are what stands between commas and ``and``: everything that a description of the world says of one
    thing. A phrase is right only as a whole, and as often as it stands in the right description.
    """
    wanted, given = _phrases(right), _phrases(answer)
    common = (wanted & given).total()
    return 2 * common / (wanted.total() + given.total()) if common else 0.0


def scores(marks: Sequence[Mark], weights: KindWeights) -> dict[str, Score]:
    """Return the score of each kind, then of groups of kinds, in the order of the weights.

    ``images`` and ``clips`` are means over all their kinds but descriptions, weighted by how often a kind is
    asked. ``all`` is 0.6 of the one and 0.4 of the other. ``known phrasings`` and ``new phrasings`` split ``all`` by
    whether training has questions in the same words; they are there if there are questions of both sorts.

    Raises:
        ValueError: There are no marks, or marks of a kind that has no weight.
    """
    by_kind: dict[str, list[Mark]] = defaultdict(list)
    for one in marks:
        by_kind[one.turn.kind].append(one)
    unknown = set(by_kind) - set(weights.kinds)
    if unknown or not marks:
        raise ValueError(f"There are {len(marks)} marks; kinds without a weight: {', '.join(sorted(unknown)) or '-'}.")
    images, clips = (_shares(table) for table in (weights.images, weights.clips))
    both = {kind: share * (1 - SHARE_OF_CLIPS) for kind, share in images.items()}
    both |= {kind: share * SHARE_OF_CLIPS for kind, share in clips.items()}
    found = {kind: weighted_score(by_kind[kind], {kind: 1.0}) for kind in weights.kinds if by_kind[kind]}
    groups = {"images": (images, marks), "clips": (clips, marks), "all": (both, marks)}
    if any(one.turn.held_out for one in marks):
        groups["known phrasings"] = both, [one for one in marks if not one.turn.held_out]
        groups["new phrasings"] = both, [one for one in marks if one.turn.held_out]
    for name, (shares, chosen) in groups.items():
        if any(one.turn.kind in shares for one in chosen):
            found[name] = weighted_score(chosen, shares)
    return found


def form_scores(marks: Sequence[Mark]) -> dict[str, Score]:
    """Return the score of each form of question, in the order of the marks, by ``kind: form``."""
    by_form: dict[str, list[Mark]] = defaultdict(list)
    for one in marks:
        by_form[f"{one.turn.kind}: {one.turn.form}"].append(one)
    return {name: weighted_score(found, {found[0].turn.kind: 1.0}) for name, found in by_form.items()}


def weighted_score(marks: Sequence[Mark], weights: Mapping[str, float]) -> Score:
    """Return the mean over kinds, each of which counts as its weight says however often it was asked.

    Args:
        marks: Those of kinds without a weight are left out; at least one has to be left.
        weights: By kind.
    """
    chosen = [one for one in marks if one.turn.kind in weights]
    asked = Counter(one.turn.kind for one in chosen)
    each = [weights[one.turn.kind] / asked[one.turn.kind] for one in chosen]
    exact = sum(share * one.right for share, one in zip(each, chosen, strict=True)) / sum(each)
    blind = sum(share * one.guess_right for share, one in zip(each, chosen, strict=True)) / sum(each)
    low, high = wilson(min(exact, 1.0), effective_number(each))
    return Score(exact=exact, low=low, high=high, blind=blind, questions=len(chosen))


def score_table(rows: Mapping[str, Score]) -> str:
    """Return scores as lines of text. Descriptions have a star, and a last line that says what it means."""
    width = max(len(name) for name in rows) + 3
    lines = [f"{'kind':<{width}}{'exact':>6}   95 % interval{'blind':>8}{'questions':>11}"]
    for name, one in rows.items():
        star = " *" if name.split(":")[0] in CAPTION_KINDS else ""
        interval = f"{one.low:.3f} to {one.high:.3f}"
        lines.append(f"{name + star:<{width}}{one.exact:>6.3f}   {interval}{one.blind:>7.3f}{one.questions:>11}")
    if any(name.split(":")[0] in CAPTION_KINDS for name in rows):
        lines.append(f"* {CAPTION_NOTE}")
    return "\n".join(lines)


CAPTION_NOTE = "F1 of the phrases of a description, one for each thing; not part of the sums."


def answer_records(
    model: LlavaMiniForConditionalGeneration,
    processor: LlavaMiniProcessor,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 120,
    progress: Progress = lambda answered: None,
) -> list[str]:
    """Return the model's greedy answer to the last question of each record.

    Args:
        model: In evaluation mode.
        processor: The model's.
        records: What to ask.
        batch_size: Records that are answered together.
        max_new_tokens: An answer is cut there.
        progress: Called after each batch.
    """
    answers = []
    for start in range(0, len(records), batch_size):
        tensors = asked(model, processor, records[start : start + batch_size])
        with torch.inference_mode():
            ids = model.generate(**tensors, max_new_tokens=max_new_tokens, do_sample=False)
        assert isinstance(ids, Tensor)
        answers += texts(processor, ids[:, tensors["input_ids"].shape[1] :])
        progress(len(ids))
    return answers


def asked(
    model: LlavaMiniForConditionalGeneration, processor: LlavaMiniProcessor, records: Sequence[Record]
) -> dict[str, Any]:
    """Return the tensors that the model reads when the last question of each record is asked, padded on the left."""
    tensors = processor.apply_chat_template(
        [record.messages(last_answer=False) for record in records],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        all_frames=True,
    )
    assert isinstance(tensors, Mapping)
    return {name: value.to(model.device) for name, value in tensors.items()}


def texts(processor: LlavaMiniProcessor, ids: Tensor) -> list[str]:
    """Return answers [B, T] as texts."""
    return [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _phrases(description: str) -> Counter[str]:
    parts = description.replace(" and ", ", ").split(", ")
    return Counter(part.strip() for part in parts if part.strip())


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that add up to 1, without descriptions and kinds that are never asked."""
    kept = {kind: weight for kind, weight in weights.items() if weight > 0 and kind not in CAPTION_KINDS}
    return {kind: weight / sum(kept.values()) for kind, weight in kept.items()}
