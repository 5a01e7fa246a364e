"""What can be answered without seeing: the commonest answer to each form of question."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from llava_mini.data.records import Turn


class BlindBaseline:
    """Answers from the question alone.

    For a form of question that names its answers, it learns which of them, the first or the second, is
    right more often; for another form, the commonest answer. It is told the kind of the question, which a model is
    not: where all answers of a kind are alike (``there is no`` and the name in question) it is always right.
    """

    def __init__(self, turns: Iterable[Turn]) -> None:
        """Learn from questions with answers, of another split than the one to be scored."""
        counts: dict[str, Counter[str | int]] = defaultdict(Counter)
        for turn in turns:
            counts[turn.form][turn.choices.index(turn.answer) if turn.choices else turn.answer] += 1
        self.commonest = {form: counter.most_common(1)[0][0] for form, counter in counts.items()}

    def answer(self, turn: Turn) -> str:
        """Return the guess for a question; an empty string for a form that was never seen."""
        guess = self.commonest.get(turn.form, "")
        return turn.choices[guess] if isinstance(guess, int) else guess

    def score(self, turns: Iterable[Turn]) -> float:
        """Return the share of questions that the guess gets right."""
        hits = [self.answer(turn) == turn.answer for turn in turns]
        if not hits:
            raise ValueError("There are no questions to score.")
        return sum(hits) / len(hits)
