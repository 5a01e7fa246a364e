"""How questions are worded: several phrasings of each form, two of which only the test split asks.

A form is the pattern of a question with the names of things left out.
"""

import random
from dataclasses import dataclass

from llava_mini.data.records import Noun, Turn
from llava_mini.data.synthetic.splits import Split

NUM_HELD_OUT = 2
"""So many phrasings of each form, the last ones, are asked in the test split only."""

PHRASINGS: dict[str, tuple[str, ...]] = {
    # about images
    "is there a thing": (
        "Is there {a}?",
        "Do you see {a}?",
        "Is {a} in the picture?",
        "Can you see {a}?",
        "Does the picture show {a}?",
        "Is {a} there?",
        "Do you see {a} anywhere?",
        "Can you find {a}?",
        "Do you see {a} in the picture?",
        "Can you see {a} anywhere?",
    ),
    "is there writing": (
        "Is anything written?",
        "Is there a word or a number?",
        "Is there any text?",
        "Do you see a word or a number?",
        "Is there a sign?",
        "Is something written in the picture?",
        "Do you see any text?",
        "Is there anything to read?",
    ),
    "colour of a shape": (
        "What color is the {a}?",
        "What colour is the {a}?",
        "Which color does the {a} have?",
        "What is the color of the {a}?",
        "Tell me the color of the {a}.",
        "The {a}: what color is it?",
        "What color does the {a} have?",
        "Name the color of the {a}.",
        "Which color is the {a}?",
        "What is the colour of the {a}?",
    ),
    "shape of a colour": (
        "What shape is the {a} thing?",
        "Which shape is {a}?",
        "What is the shape of the {a} thing?",
        "What shape does the {a} thing have?",
        "What is the {a} thing?",
        "Tell me the shape of the {a} thing.",
        "Which shape does the {a} thing have?",
        "Name the shape of the {a} thing.",
        "Which shape is the {a} thing?",
        "The {a} thing: what shape is it?",
    ),
    "how many things": (
        "How many things are there?",
        "How many shapes do you see?",
        "How many things are in the picture?",
        "How many shapes are there?",
        "Count the shapes.",
        "What is the number of things?",
        "How many things can you see?",
        "Count the things.",
        "How many things do you see?",
        "How many shapes can you see?",
    ),
    "how many of a kind": (
        "How many {a} are there?",
        "How many {a} do you see?",
        "Count the {a}.",
        "How many {a} are in the picture?",
        "What is the number of {a}?",
        "Tell me how many {a} there are.",
        "How many {a} does the picture show?",
        "How many {a} can you see?",
        "Tell me the number of {a}.",
    ),
    "where": (
        "Where is the {a}?",
        "In which part is the {a}?",
        "Where do you see the {a}?",
        "In which part of the picture is the {a}?",
        "Where can you see the {a}?",
        "Tell me where the {a} is.",
        "At which place is the {a}?",
        "What is the position of the {a}?",
        "In which place is the {a}?",
        "Where in the picture is the {a}?",
    ),
    "left or right": (
        "Is the {a} left or right of the {b}?",
        "Is the {a} to the left or to the right of the {b}?",
        "Is the {a} on the left or on the right of the {b}?",
        "Left or right of the {b}: where is the {a}?",
        "Is the {a} to the left or right of the {b}?",
        "On which side of the {b} is the {a}, left or right?",
        "Where is the {a}, left or right of the {b}?",
        "Do you see the {a} left or right of the {b}?",
    ),
    "above or below": (
        "Is the {a} above or below the {b}?",
        "Above or below the {b}: where is the {a}?",
        "Is the {a} placed above or below the {b}?",
        "Is the {a} higher or lower than the {b}, above or below?",
        "Does the picture show the {a} above or below the {b}?",
        "Where is the {a}, above or below the {b}?",
        "Do you see the {a} above or below the {b}?",
    ),
    "is it there from there": (
        "Is the {a} {side} the {b}?",
        "Is the {a} placed {side} the {b}?",
        "Do you see the {a} {side} the {b}?",
        "Does the picture show the {a} {side} the {b}?",
        "Can you see the {a} {side} the {b}?",
        "Is the {a} somewhere {side} the {b}?",
        "Can you find the {a} {side} the {b}?",
        "Is the {a} there {side} the {b}?",
    ),
    "small or large": (
        "Is the {a} small or large?",
        "What size is the {a}, small or large?",
        "What size is the {a}?",
        "How large is the {a}?",
        "What is the size of the {a}?",
        "Tell me the size of the {a}.",
        "The {a}: small or large?",
        "Which size does the {a} have?",
        "Is the {a} large or small?",
        "What size does the {a} have?",
    ),
    "which is larger": (
        "Which is larger, the {a} or the {b}?",
        "Which one is larger: the {a} or the {b}?",
        "What is larger, the {a} or the {b}?",
        "Which is bigger, the {a} or the {b}?",
        "The {a} or the {b}: which is larger?",
        "Which thing is larger, the {a} or the {b}?",
        "Tell me which is larger, the {a} or the {b}.",
        "Which one is bigger: the {a} or the {b}?",
        "What is bigger, the {a} or the {b}?",
    ),
    "which is smaller": (
        "Which is smaller, the {a} or the {b}?",
        "Which one is smaller: the {a} or the {b}?",
        "What is smaller, the {a} or the {b}?",
        "Which thing is smaller: the {a} or the {b}?",
        "The {a} or the {b}: which one is smaller?",
        "Tell me which one is smaller, the {a} or the {b}.",
        "Which thing is smaller, the {a} or the {b}?",
        "The {a} or the {b}: which is smaller?",
    ),
    "same size": (
        "Are the {a} and the {b} of the same size?",
        "Do the {a} and the {b} have the same size?",
        "Is the {a} of the same size as the {b}?",
        "Does the {a} have the same size as the {b}?",
        "Are the {a} and the {b} equal in size?",
        "Are the {a} and the {b} the same size?",
        "Is the {a} the same size as the {b}?",
        "Do the {a} and the {b} have an equal size?",
    ),
    "what word": (
        "What word is written?",
        "Which word do you see?",
        "Read the word.",
        "What is the word?",
        "Tell me the word.",
        "Which word is it?",
        "What word can you read?",
        "Which word is written?",
        "What word do you see?",
    ),
    "what number": (
        "What number is written?",
        "Which number do you see?",
        "Read the number.",
        "What is the number?",
        "Tell me the number.",
        "Which number is it?",
        "What number can you read?",
        "Which number is written?",
        "What number do you see?",
    ),
    "what text": (
        "What does the sign say?",
        "What is written?",
        "Read the text.",
        "What does it say?",
        "What is written in the picture?",
        "Read the sign.",
        "What can you read?",
        "What does the text say?",
        "Tell me what is written.",
    ),
    "describe": (
        "Describe the picture.",
        "What do you see?",
        "What is in the picture?",
        "What does the picture show?",
        "Tell me what you see.",
        "Describe what you see.",
        "Give a description of the picture.",
        "What can you see?",
        "What can you see in the picture?",
    ),
    "tallest bar": (
        "Which bar is the tallest?",
        "Which bar is the highest?",
        "What color is the tallest bar?",
        "What is the color of the tallest bar?",
        "Which color has the tallest bar?",
        "Which bar has the largest value?",
        "Which bar is tallest?",
        "What color is the highest bar?",
    ),
    "shortest bar": (
        "Which bar is the shortest?",
        "Which bar is the lowest?",
        "What color is the shortest bar?",
        "What is the color of the shortest bar?",
        "Which color has the shortest bar?",
        "Which bar has the smallest value?",
        "Which bar is shortest?",
        "What color is the lowest bar?",
    ),
    "value of a bar": (
        "What is the value of the {a} bar?",
        "What value does the {a} bar have?",
        "How high is the {a} bar?",
        "Which number is above the {a} bar?",
        "How much is the {a} bar?",
        "Tell me the value of the {a} bar.",
        "Read the value of the {a} bar.",
        "How tall is the {a} bar?",
        "Which value does the {a} bar have?",
        "What number is above the {a} bar?",
    ),
    "how many bars": (
        "How many bars are there?",
        "How many bars does the chart have?",
        "Count the bars.",
        "How many bars do you see?",
        "What is the number of bars?",
        "How many bars can you see?",
        "Tell me the number of bars.",
    ),
    "is a bar taller": (
        "Is the {a} bar taller than the {b} bar?",
        "Is the {a} bar higher than the {b} bar?",
        "Does the {a} bar have a larger value than the {b} bar?",
        "Is the {a} bar larger than the {b} bar?",
        "Is the {a} one taller than the {b} one?",
        "Is {a} higher than {b}?",
    ),
    "cannot tell": (
        "What sound does it make?",
        "What sound do you hear?",
        "Is there any music?",
        "Can you hear anything?",
        "How loud is it?",
        "What is being said?",
        "Is somebody talking?",
        "What does it smell like?",
        "How does the {a} smell?",
        "How does the {a} taste?",
        "How heavy is the {a}?",
        "What does the {a} weigh?",
        "How much does the {a} cost?",
        "Who made the {a}?",
        "Who made the picture?",
        "When was the picture made?",
        "How old is the {a}?",
        "Who owns the {a}?",
        "Why is the {a} here?",
        "What is behind the {a}?",
        "How warm is the {a}?",
        "What is the name of the person?",
        "What day is it?",
        "What is the price of the {a}?",
        "What sound does the {a} make?",
        "Does the {a} make a sound?",
    ),
    # about clips
    "direction": (
        "Which way does the {a} move?",
        "In which direction does the {a} move?",
        "Which way does the {a} go?",
        "Where does the {a} move to?",
        "Tell me which way the {a} moves.",
        "Which direction does the {a} move in?",
        "The {a} moves: in which direction?",
        "The {a} moves: which way?",
        "In which direction does the {a} go?",
    ),
    "does anything move": (
        "Does anything move?",
        "Is anything moving?",
        "Does something move?",
        "Do you see anything move?",
        "Is there something moving?",
        "Is something moving?",
        "Do you see something move?",
    ),
    "still or moving": (
        "Is the {a} still or moving?",
        "Still or moving: the {a}?",
        "Does the {a} stay still or is it moving?",
        "The {a}: is it still or moving?",
        "Tell me if the {a} is still or moving.",
        "Is the {a} moving or still?",
        "The {a}: still or moving?",
    ),
    "what moves": (
        "What moves?",
        "Which thing moves?",
        "What is moving?",
        "Tell me what moves.",
        "Which thing do you see move?",
        "Which thing is moving?",
        "What do you see move?",
    ),
    "does anything change": (
        "Does anything change color?",
        "Does a color change?",
        "Does something change its color?",
        "Do you see a color change?",
        "Does anything change its color?",
        "Does something change color?",
    ),
    "new colour": (
        "What color does the {a} become?",
        "Which color does the {a} turn into?",
        "What color is the {a} at the end?",
        "Which color does the {a} change to?",
        "The {a} changes color: what does it become?",
        "What color does the {a} turn into?",
        "Which color does the {a} become?",
    ),
    "what appears": (
        "What appears?",
        "Which thing appears?",
        "What comes in later?",
        "Tell me what appears.",
        "Which thing comes in later?",
        "What do you see appear?",
        "Which thing do you see appear?",
    ),
    "what disappears": (
        "What disappears?",
        "Which thing disappears?",
        "What goes away?",
        "Tell me what disappears.",
        "Which thing goes away?",
        "What do you see disappear?",
        "Which thing do you see disappear?",
    ),
    "before or after": (
        "Does the {a} {do} before or after the {b} {does_too}?",
        "When does the {a} {do}, before or after the {b} {does_too}?",
        "Before or after the {b} {does_too}: when does the {a} {do}?",
        "Tell me if the {a} {does} before or after the {b} {does_too}.",
        "The {a} {does}: is it before or after the {b} {does_too}?",
        "Do you see the {a} {do} before or after the {b} {does_too}?",
        "The {a} {does}: before or after the {b} {does_too}?",
    ),
    "which is first": (
        "Which {event} first, the {a} or the {b}?",
        "What {event} first, the {a} or the {b}?",
        "Which thing {event} first: the {a} or the {b}?",
        "The {a} or the {b}: which {event} first?",
        "Which one {event} first, the {a} or the {b}?",
        "The {a} or the {b}: what {event} first?",
    ),
    "what happens first": (
        "What happens first?",
        "What is the first thing to happen?",
        "Tell me what happens first.",
        "Which thing happens first?",
        "What happens at first?",
    ),
    "what happens last": (
        "What happens last?",
        "What is the last thing to happen?",
        "Tell me what happens last.",
        "Which thing happens last?",
        "What happens at last?",
    ),
    "how many do so": (
        "How many things {event}?",
        "How many shapes {event}?",
        "Count the things that {event}.",
        "What is the number of things that {event}?",
        "How many things do you see {event}?",
        "Tell me how many things {event}.",
        "Count the shapes that {event}.",
    ),
    "where at the end": (
        "Where is the {a} at the end?",
        "In which part is the {a} at the end?",
        "Where does the {a} end?",
        "At the end, where is the {a}?",
        "In the last frame, where is the {a}?",
        "At the end, in which part is the {a}?",
        "Where is the {a} in the last frame?",
    ),
    "where at the start": (
        "Where is the {a} at the start?",
        "In which part is the {a} at the start?",
        "Where does the {a} start?",
        "At the start, where is the {a}?",
        "In the first frame, where is the {a}?",
        "At the start, in which part is the {a}?",
        "Where is the {a} in the first frame?",
    ),
    "what happens": (
        "What happens?",
        "Describe the video.",
        "What do you see happen?",
        "Describe what happens.",
        "What is shown in the video?",
        "What happens in the video?",
        "Tell me what happens.",
    ),
}
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
