"""Pictures with words beside them, drawn with Pillow: what the pages of ``docs`` show of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, PALE, RIGHT, WRONG = "#1f2328", "#59636e", "#1a7f37", "#cf222e"
MARGIN = 14
LINE = 19
"""Pixels from line to line."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """One question with an answer, and the right one where they differ."""

    question: str
    answer: str
    truth: str

    @property
    def right(self) -> bool:
        """Whether the answer is the right one word for word."""
        return self.answer == self.truth


def font(size: int = 15) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


def strip(frames: Sequence[Image.Image], side: int, gap: int = 4) -> Image.Image:
    """Frames from left to right, each ``side`` pixels high, on white. Twice as large, they keep their pixels."""
    how = Image.Resampling.BICUBIC if side % frames[0].height else Image.Resampling.NEAREST
    sized = [frame.convert("RGB").resize((side, side), how) for frame in frames]
    whole = Image.new("RGB", (len(sized) * side + (len(sized) - 1) * gap, side), "white")
    for number, frame in enumerate(sized):
        whole.paste(frame, (number * (side + gap), 0))
    return whole


def draw_words(draw: ImageDraw.ImageDraw, words: Words, x: float, y: float, width: float) -> float:
    """Draw a question, and the answer below it behind a green hook or a red cross; return where it ends."""
    y = _draw_lines(draw, words.question, x, y, width, PALE)
    colour = RIGHT if words.right else WRONG
    top = y + 5
    if words.right:
        draw.line([(x, top + 5), (x + 4, top + 9), (x + 11, top)], fill=colour, width=3)
    else:
        draw.line([(x + 1, top), (x + 10, top + 9)], fill=colour, width=3)
        draw.line([(x + 10, top), (x + 1, top + 9)], fill=colour, width=3)
    y = _draw_lines(draw, words.answer or "(nothing)", x + 18, y, width - 18, INK)
    if not words.right:
        y = _draw_lines(draw, f"should be: {words.truth}", x + 18, y, width - 18, PALE)
    return y + 6


def words_height(words: Words, width: float) -> float:
    """How high ``draw_words`` draws."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return draw_words(draw, words, 0, 0, width)


def _draw_lines(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, width: float, colour: str) -> float:
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font()) > width:
            draw.text((x, y), line, colour, font())
            line, y = word, y + LINE
        else:
            line = longer
    draw.text((x, y), line, colour, font())
    return y + LINE
