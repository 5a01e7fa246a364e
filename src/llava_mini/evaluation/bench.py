"""The bench of the drawn world: so many questions of each kind, always the same ones.

Every question stands alone and has a picture or a clip of its own, so marks are independent. Question ``index`` of a
kind depends on the split, the kind and the index, and on nothing else: a smaller bench asks the first questions of a
larger one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_mini.data.records import Turn
from llava_mini.data.synthetic.blind import BlindBaseline
from llava_mini.data.synthetic.splits import Split
from llava_mini.data.synthetic.world import WorldItem, WorldSettings, world_item
from llava_mini.evaluation.exact_match import KindWeights, Mark, Progress, answer_records
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor

BLIND_QUESTIONS = 300
"""Training questions of each kind from which the blind guess learns."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Which questions are asked."""

    world: WorldSettings
    """What pictures and clips hold, and how often the world asks each kind of question."""
    split: Split = "test"
    questions: int = 100
    """Of each kind about images; half as many of each kind about clips, which take several times as long."""

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ValueError(f"A bench asks at least one question of each kind, got {self.questions}.")
        if not self.weights.kinds:
            raise ValueError("The world has no kind of question with a weight above 0. Give it one.")

    @property
    def weights(self) -> KindWeights:
        """How often each kind is asked; clips only if the world has some."""
        images = {kind: weight for kind, weight in self.world.image_kinds.items() if weight > 0}
        clips = {kind: weight for kind, weight in self.world.clip_kinds.items() if weight > 0}
        return KindWeights(images=images, clips=clips if self.world.clip_share > 0 else {})

    def asked(self, kind: str) -> int:
        """Return how many questions of a kind are asked."""
        return self.questions if kind in self.weights.images else (self.questions + 1) // 2

    @property
    def total(self) -> int:
        """How many questions are asked in all."""
        return sum(self.asked(kind) for kind in self.weights.kinds)

    def item(self, kind: str, index: int) -> WorldItem:
        """Return one question with its picture or clip, not yet drawn."""
        return self._item(self.split, kind, index)

    def turns(self, kind: str) -> list[Turn]:
        """Return all questions of a kind with their right answers."""
        return [self.item(kind, index).turns[0] for index in range(self.asked(kind))]

    def blind(self, kind: str) -> BlindBaseline:
        """Return the guesser of answers to questions of a kind, taught by the training split."""
        return BlindBaseline(self._item("train", kind, index).turns[0] for index in range(BLIND_QUESTIONS))

    def fingerprint(self) -> str:
        """Return a short text that changes when any question or right answer does."""
        words = [f"{turn.question} {turn.answer}" for kind in self.weights.kinds for turn in self.turns(kind)]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]

    def _item(self, split: Split, kind: str, index: int) -> WorldItem:
        of_image = kind in self.weights.images
        only: dict[str, dict[str, float]] = {"image_kinds" if of_image else "clip_kinds": {kind: 1.0}}
        settings = replace(self.world, clip_share=0.0 if of_image else 1.0, min_turns=1, max_turns=1, **only)
        return world_item(split, index, settings, f"bench {kind}")


def run_bench(
    model: LlavaMiniForConditionalGeneration,
    processor: LlavaMiniProcessor,
    bench: Bench,
    *,
    kinds: Sequence[str] = (),
    batch_size: int = 32,
    progress: Progress = lambda answered: None,
) -> list[Mark]:
    """Ask every question and return the marks, kind by kind.

    Args:
        model: In evaluation mode, on any device.
        processor: The model's.
        bench: What to ask.
        kinds: Ask these only; all by default.
        batch_size: Questions that are answered together.
        progress: Called after each batch.
    """
    marks = []
    for kind in kinds or bench.weights.kinds:
        records = [bench.item(kind, index).record() for index in range(bench.asked(kind))]
        answers = answer_records(model, processor, records, batch_size=batch_size, progress=progress)
        blind = bench.blind(kind)
        for index, (record, answer) in enumerate(zip(records, answers, strict=True)):
            turn = record.turns[0]
            marks.append(Mark(turn=turn, index=index, answer=answer, guess=blind.answer(turn)))
    return marks
