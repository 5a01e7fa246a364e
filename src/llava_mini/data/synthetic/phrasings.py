"""How questions are worded: several phrasings of each form, two of which only the test split asks.

A form is the pattern of a question with the names of things left out.
"""

import random
from dataclasses import dataclass

from llava_mini.data.records import Noun, Turn
from llava_mini.data.synthetic.clip_phrasings import CLIP_PHRASINGS
from llava_mini.data.synthetic.image_phrasings import IMAGE_PHRASINGS
from llava_mini.data.synthetic.splits import Split

NUM_HELD_OUT = 2
"""So many phrasings of each form, the last ones, are asked in the test split only."""

PHRASINGS = IMAGE_PHRASINGS | CLIP_PHRASINGS
"""Phrasings of each form of question. The last ``NUM_HELD_OUT`` of each are kept for the test split."""

OPENINGS = ("Look at the picture. ", "Please answer: ", "Here is a question. ", "Look closely. ", "Tell me: ")
"""What some training questions begin with."""


@dataclass(frozen=True, kw_only=True)
class Phrased:
    """A question in words."""

    question: str
    form: str
    """The pattern of the question with the names of things left out."""
    held_out: bool
    """Whether training has no question in this phrasing."""

    def turn(
        self, answer: str, *, kind: str, case: str = "", choices: tuple[str, ...] = (), nouns: tuple[Noun, ...] = ()
    ) -> Turn:
        """Return the question with its answer."""
        return Turn(
            question=self.question,
            answer=answer,
            kind=kind,
            form=self.form,
            case=case,
            choices=choices,
            nouns=nouns,
            held_out=self.held_out,
        )


def phrased(rng: random.Random, split: Split, pattern: str, *, form: str = "", **names: str) -> Phrased:
    """Return a question in one of the phrasings that a split may use.

    In training, some are written carelessly, in small letters and without a mark, and some begin with a phrase
    that says nothing.

    Args:
        rng: Where the random numbers come from.
        split: The test split uses all phrasings, the others all but the last two.
        pattern: A key of ``PHRASINGS``.
        form: Tells apart what the pattern does not; the pattern itself when not given.
        **names: What stands in the places of the phrasing.
    """
    phrasings = PHRASINGS[pattern]
    index = rng.randrange(len(phrasings) - (0 if split == "test" else NUM_HELD_OUT))
    text = phrasings[index].format(**names)
    text = text[0].upper() + text[1:]
    if split == "train":
        habit = rng.random()
        if habit < 0.1:
            text = text.lower().rstrip("?.")
        elif habit < 0.2:
            text = rng.choice(OPENINGS) + text
    return Phrased(question=text, form=form or pattern, held_out=index >= len(phrasings) - NUM_HELD_OUT)
