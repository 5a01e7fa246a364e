"""Draw docs/gallery.png: the gallery of ``make demo`` as a picture, with the answers of the embedded model.

Run:  python examples/draw_gallery.py
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from demo import EXAMPLES, answered, gallery
from panels import INK, LINE, MARGIN, Words, draw_words, font, strip, words_height
from PIL import Image, ImageDraw

from llava_mini import Engine
from llava_mini.processor.video import FrameSampling, frames_of

PICTURE = EXAMPLES.parent / "docs" / "gallery.png"
COLUMNS, COLUMN, SIDE = 4, 240, 192
"""Images stand in so many columns, each of so many pixels, with so many pixels a side."""
WIDTH = COLUMNS * COLUMN + 2 * MARGIN
FRAMES = 2 * COLUMN + COLUMN // 2
"""Most pixels that the frames of a clip take beside their words."""

Panel = tuple[list[Image.Image], list[Words]]
"""Frames, and the questions about them."""


def panels() -> list[Panel]:
    """All images and clips with the model's answers, images first."""
    by_file: dict[Path, list[Words]] = defaultdict(list)
    for shown in answered(Engine.load(), gallery()):
        by_file[shown.file].append(Words(question=shown.question, answer=shown.answer, truth=shown.truth))
    return [(frames_in(file), words) for file, words in by_file.items()]


def frames_in(file: Path) -> list[Image.Image]:
    """An image, or what the model sees of a video: one frame a second."""
    if file.suffix == ".png":
        return [Image.open(file)]
    return [frame.image for frame in frames_of(file, FrameSampling())]


def heading(shown: Sequence[Panel]) -> Image.Image:
    words = [one for _, about in shown for one in about]
    whole = Image.new("RGB", (WIDTH, 2 * LINE + MARGIN), "white")
    draw = ImageDraw.Draw(whole)
    title = "The first images and clips of the test split, chosen before the model had answered"
    draw.text((MARGIN, MARGIN), title, INK, font(18))
    count = f"{sum(one.right for one in words)} of {len(words)} right"
    draw.text((WIDTH - MARGIN, MARGIN), count, INK, font(18), anchor="ra")
    return whole


def image_row(row: Sequence[Panel]) -> Image.Image:
    """Images side by side, the questions below each."""
    heights = [sum(words_height(one, SIDE) for one in words) for _, words in row]
    whole = Image.new("RGB", (WIDTH, int(SIDE + 6 + max(heights) + MARGIN)), "white")
    draw = ImageDraw.Draw(whole)
    for number, (frames, words) in enumerate(row):
        x, y = MARGIN + number * COLUMN, SIDE + 6.0
        whole.paste(strip(frames, SIDE), (x, 0))
        for one in words:
            y = draw_words(draw, one, x, y, SIDE)
    return whole


def clip_row(frames: Sequence[Image.Image], words: Sequence[Words]) -> Image.Image:
    """The frames of a clip, the questions to their right."""
    side = min(SIDE // 2, FRAMES // len(frames) - 4)
    x, width = MARGIN + FRAMES + MARGIN, WIDTH - FRAMES - 3 * MARGIN
    height = max(side, sum(words_height(one, width) for one in words))
    whole = Image.new("RGB", (WIDTH, int(height + MARGIN)), "white")
    whole.paste(strip(frames, side), (MARGIN, 0))
    draw, y = ImageDraw.Draw(whole), 0.0
    for one in words:
        y = draw_words(draw, one, x, y, width)
    return whole


def main() -> None:
    shown = panels()
    images = [panel for panel in shown if len(panel[0]) == 1]
    rows = [heading(shown)]
    rows += [image_row(images[start : start + COLUMNS]) for start in range(0, len(images), COLUMNS)]
    rows += [clip_row(frames, words) for frames, words in shown if len(frames) > 1]
    whole = Image.new("RGB", (WIDTH, sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        whole.paste(row, (0, y))
        y += row.height
    whole.save(PICTURE, optimize=True)
    print(PICTURE.relative_to(EXAMPLES.parent))


if __name__ == "__main__":
    main()
