"""Ask the embedded model about two files, and about the first pictures and clips of the test split.

The gallery was chosen before any model had answered: ``examples/gallery`` holds the first 8 images and 3 clips of the
split that training never sees, whatever the model says to them. ``make gallery`` makes it again.

Run:  make demo
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_mini import Engine

EXAMPLES = Path(__file__).parent
FILES = {
    "picture.png": {
        "What color is the star?": "blue",
        "What shape is the yellow thing?": "triangle",
        "How many things are there?": "3",
        "Where is the red circle?": "top left",
        "Is the red circle left or right of the blue star?": "left",
        "Which is larger, the blue star or the yellow triangle?": "the yellow triangle",
        "What word is written?": "stop",
    },
    "clip.mp4": {
        "What moves?": "the purple heart",
        "Which way does the purple heart move?": "right",
        "What color is the square?": "green",
    },
}
"""Questions about the two files in ``examples/media``, with the right answers."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One question about a file, with the right answer and the model's."""

    file: Path
    question: str
    truth: str
    answer: str

    @property
    def right(self) -> bool:
        """Whether the answer is the right one word for word."""
        return self.answer == self.truth


def questions() -> Iterator[tuple[Path, str, str]]:
    """Files with questions and right answers: the two files, then the gallery."""
    for name, asked in FILES.items():
        for question, truth in asked.items():
            yield EXAMPLES / "media" / name, question, truth
    for file, question, truth in gallery():
        yield file, question, truth


def gallery() -> Iterator[tuple[Path, str, str]]:
    """The same for the gallery alone."""
    folder = EXAMPLES / "gallery"
    for line in (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for turn in record["turns"]:
            yield folder / record["file"], turn["question"], turn["answer"]


def answered(engine: Engine, asked: Iterator[tuple[Path, str, str]]) -> Iterator[Shown]:
    """Ask each question by itself."""
    for file, question, truth in asked:
        answer = engine.ask(question, [str(file)], max_tokens=120)
        yield Shown(file=file, question=question, truth=truth, answer=answer.text.strip())


def main() -> int:
    start = time.perf_counter()
    engine = Engine.load()
    before, total, right = Path(), 0, 0
    for shown in answered(engine, questions()):
        if shown.file != before:
            print(f"\n{shown.file.relative_to(EXAMPLES.parent)}", flush=True)
            before = shown.file
        verdict = "right" if shown.right else f"wrong, should be: {shown.truth}"
        print(f"  {shown.question}\n    {shown.answer}  ({verdict})", flush=True)
        total, right = total + 1, right + shown.right
    print(f"\n{right} of {total} right, in {time.perf_counter() - start:.1f} seconds.")
    print("On the command line: llava-mini ask QUESTION FILE, or llava-mini chat FILE")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
