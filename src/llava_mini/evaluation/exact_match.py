"""Exact match by kind of question, beside what a blind guess reaches."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from llava_mini.data.records import Record, Turn
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many questions of a kind were answered in exactly the right words."""

    exact: float
    """Share of right answers, 0 to 1."""
    blind: float
    """Share that the commonest answer to each form of question gets right."""
    questions: int


def answer_records(
    model: LlavaMiniForConditionalGeneration,
    processor: LlavaMiniProcessor,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 80,
) -> list[str]:
    """Return the model's greedy answer to the last question of each record.

    Args:
        model: In evaluation mode.
        processor: The model's.
        records: What to ask.
        batch_size: Records that are answered together.
        max_new_tokens: An answer is cut there.
    """
    answers = []
    for start in range(0, len(records), batch_size):
        talks = [record.messages(last_answer=False) for record in records[start : start + batch_size]]
        tensors = processor.apply_chat_template(
            talks,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            all_frames=True,
        )
        assert isinstance(tensors, Mapping)
        with torch.inference_mode():
            ids = model.generate(**tensors, max_new_tokens=max_new_tokens, do_sample=False)
        assert isinstance(ids, torch.Tensor)
        new = ids[:, tensors["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def scores_by_kind(
    turns: Sequence[Turn], answers: Sequence[str], blind_answer: Callable[[Turn], str]
) -> dict[str, Score]:
    """Return the score of each kind of question, and ``all``, in the order of their names.

    Args:
        turns: The questions with their right answers.
        answers: What was answered.
        blind_answer: The guess without seeing.

    Raises:
        ValueError: If there are not as many answers as questions, or none.
    """
    if len(turns) != len(answers) or not turns:
        raise ValueError(f"{len(answers)} answers were given to {len(turns)} questions. Give one answer for each.")
    marks: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for turn, answer in zip(turns, answers, strict=True):
        mark = answer == turn.answer, blind_answer(turn) == turn.answer
        marks[turn.kind].append(mark)
        marks["all"].append(mark)
    return {
        kind: Score(
            exact=sum(exact for exact, _ in pairs) / len(pairs),
            blind=sum(blind for _, blind in pairs) / len(pairs),
            questions=len(pairs),
        )
        for kind, pairs in sorted(marks.items())
    }


def score_table(scores: dict[str, Score]) -> str:
    """Return the scores as lines of text."""
    lines = [f"{'kind':<14}{'exact':>8}{'blind':>8}{'questions':>11}"]
    lines += [f"{kind:<14}{one.exact:>8.3f}{one.blind:>8.3f}{one.questions:>11}" for kind, one in scores.items()]
    return "\n".join(lines)
