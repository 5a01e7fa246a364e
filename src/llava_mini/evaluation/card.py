"""A model's card: ``scores.json`` beside its weights, and the same numbers as a table in its ``README.md``.

The file is for tests and programs, the table for people. Both are written at once, so they cannot differ.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.exact_match import CAPTION_KINDS, CAPTION_NOTE, Mark, Score, scores

SCORES = "scores.json"
BEGIN = "<!-- scores: written by llava-mini evaluate tiny --write-card -->"
END = "<!-- end of scores -->"


def card_facts(
    bench: Bench,
    marks: Sequence[Mark],
    *,
    folder: Path,
    seconds: float,
    processor_seconds: float,
    environment: Mapping[str, object],
) -> dict[str, Any]:
    """Return what a card says, as plain values.

    Args:
        bench: What was asked.
        marks: What came of it.
        folder: The model's, with its weights.
        seconds: How long drawing and answering took.
        processor_seconds: How long of it this program had a processor, over all its threads.
        environment: What it ran on.
    """
    return {
        "bench": "tiny",
        "split": bench.split,
        "questions_per_kind": bench.questions,
        "questions_sha256": bench.fingerprint(),
        "weights_sha256": weights_digest(folder),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
        "environment": dict(environment),
        "scores": {name: _rounded(one) for name, one in scores(marks, bench.weights).items()},
        "marks": marks_by_kind(marks),
    }


def marks_by_kind(marks: Sequence[Mark]) -> dict[str, str]:
    """Return a text of ones and zeros for each kind, one for each question in order; not for descriptions."""
    found: dict[str, str] = {}
    for one in marks:
        if one.turn.kind not in CAPTION_KINDS:
            found[one.turn.kind] = found.get(one.turn.kind, "") + str(int(one.right))
    return found


def card_files(folder: Path) -> list[Path]:
    """Return the files that ``write_card`` writes.

    Raises:
        ValueError: As ``write_card``.
    """
    page = folder / "README.md"
    if not page.exists():
        return [folder / SCORES]
    with_table(page.read_text(encoding="utf-8"), "", where=str(page))
    return [page, folder / SCORES]


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``scores.json`` into a model's folder, and the table into its ``README.md`` if that has a place for it.

    Raises:
        ValueError: The ``README.md`` has a beginning of the table and no end, or the other way round.
    """
    page = folder / "README.md"
    if page.exists():
        text = page.read_text(encoding="utf-8")
        page.write_text(with_table(text, card_table(facts), where=str(page)), encoding="utf-8")
    (folder / SCORES).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def with_table(text: str, table: str, *, where: str = "The text") -> str:
    """Return a page with another table between its two marks; a page without marks stays as it is.

    Args:
        text: The page.
        table: What is to stand there.
        where: What the page is called in errors.

    Raises:
        ValueError: Only one of the marks is there, or they stand the wrong way round.
    """
    if BEGIN not in text and END not in text:
        return text
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{where} has one of the marks around the scores, not both in their order: {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def card_table(facts: Mapping[str, Any]) -> str:
    """Return the scores as a table in Markdown, with a sentence about how they were made."""
    lines = ["| questions about | right | 95 % interval | blind | asked |", "|---|---|---|---|---|"]
    for name, one in facts["scores"].items():
        star = " *" if name in CAPTION_KINDS else ""
        interval = f"{_short(one['low'])} to {_short(one['high'])}"
        cells = f"{name}{star}", _short(one["exact"]), interval, _short(one["blind"]), str(one["questions"])
        lines.append(f"| {' | '.join(cells)} |")
    ran = facts["environment"]
    lines += [
        "",
        f"\\* {CAPTION_NOTE}",
        "",
        f"The first {facts['questions_per_kind']} questions of each kind of the {facts['split']} split, half as many "
        f"about clips, one question a prompt, in {facts['seconds']:.0f} seconds, {facts['processor_seconds']:.0f} of "
        f"processor time ({ran['device']}, {ran['threads']} thread(s), {ran['dtype']}). Answers are right if they are "
        "right word for word. Blind: the commonest answer to the same form of question. The guess is told the kind, "
        "which a model is not; where all answers of a kind are alike it is always right (1.00), and no model can be "
        "ahead of it. `images` and `clips` weigh kinds as the world does; `all` is 0.6 of the one and 0.4 of the "
        "other; `new phrasings` are those that no training question has.",
    ]
    return "\n".join(lines)


def read_scores(folder: Path) -> dict[str, Any]:
    """Return what ``write_card`` wrote.

    Raises:
        ValueError: There is no such file in the folder.
    """
    path = folder / SCORES
    if not path.exists():
        raise ValueError(
            f"{folder} has no {SCORES}. Make it with: llava-mini evaluate tiny --model {folder} --write-card"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def weights_digest(folder: Path) -> str:
    """Return a short text that changes when the weights in a folder do."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


def _rounded(score: Score) -> dict[str, float | int]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(score).items()}


def _short(share: float) -> str:
    """A share as ``.93``."""
    return f"{share:.2f}".removeprefix("0")
