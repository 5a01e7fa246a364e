"""Write docs/cases.md and its pictures: what the embedded model gets right and wrong, and where it goes wrong.

Run:  llava-mini evaluate tiny --answers runs/answers.jsonl
      python docs/draw_cases.py runs/answers.jsonl
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_mini.data.synthetic.world import WorldItem
from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.exact_match import CAPTION_KINDS
from llava_mini.recipes.tiny import tiny_settings

DOCS = Path(__file__).parent
SIDE, PER_ROW = 192, 4
"""Pixels of a picture's side, and frames of a clip in a row of half as many."""

SECTIONS = {
    "Details of an image (as in the paper's Figure 10)": (
        *("existence", "colour", "shape", "size", "count", "attribute count", "location", "relation", "compare"),
    ),
    "Reading (as in Figure 14)": ("text", "chart"),
    "What has no answer in the picture": ("absence", "cannot tell", "clip absence"),
    "Descriptions (as in Figure 13)": CAPTION_KINDS,
    "Video (as in Figures 11 and 15)": (
        *("direction", "moving", "order", "change", "event count", "clip place", "clip colour"),
    ),
}
"""Every kind of question, in the order of the page."""

CLOSED = (
    *("existence", "colour", "shape", "size", "count", "attribute count", "location", "relation"),
    *("direction", "event count", "clip place", "clip colour"),
)
"""Kinds with so few different answers that the bench has all of them."""

MANY = 6
"""From so many things on, a picture is called full."""

OPENING = """\
# Cases: what the embedded model gets right and wrong

Of each kind of question, the first one of the test split that was answered rightly, and the first that was not; a dash
where there is none. Nobody chose them. A description counts as right if it has all things and no other. Clips are
shown as they are seen: one frame after the other, each through one vision token. In brackets stands what may have made
a question hard; whether such things matter over all questions is counted at the end.

This page and its pictures are written by [draw_cases.py](draw_cases.py) from the answers of `llava-mini evaluate
tiny`; `make gallery` makes them again for other weights.
"""

CLOSING = """\
## High resolution

At high resolution the paper cuts a picture into further views. The embedded model has one view of each picture and was
trained on no more, so there are no such cases here; processor and model have the views for weights that were trained
on them ([how_it_works.md](how_it_works.md#two-switches)).
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question of the bench with what was answered."""

    item: WorldItem
    facts: dict[str, Any]
    """As ``llava-mini evaluate tiny --answers`` writes them."""

    @property
    def right(self) -> bool:
        """Whether nothing is wrong with the answer."""
        return self.facts["right"] == 1

    @property
    def num_things(self) -> int:
        """Things, words and bars to be seen, in the frame that has most."""
        return max(
            len(scene.things) + len(scene.signs) + (len(scene.chart.bars) if scene.chart else 0)
            for scene in self.item.frames
        )

    @property
    def is_clip(self) -> bool:
        """Whether it is about several frames."""
        return len(self.item.frames) > 1

    def picture(self) -> Image.Image:
        """The image, or the frames of the clip in rows."""
        record = self.item.record()
        if record.image is not None:
            return record.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        side, gap = SIDE // 2, 4
        rows = -(-len(record.video) // PER_ROW)
        columns = min(len(record.video), PER_ROW)
        whole = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), "white")
        for number, frame in enumerate(record.video):
            row, column = divmod(number, PER_ROW)
            whole.paste(
                frame.resize((side, side), Image.Resampling.BICUBIC), (column * (side + gap), row * (side + gap))
            )
        return whole


def read_cases(answers: Path) -> list[Case]:
    """All questions of the bench with their answers.

    Raises:
        ValueError: the file was written for other questions.
    """
    cases, bench = [], Bench(world=tiny_settings().world)
    for line in answers.read_text(encoding="utf-8").splitlines():
        facts = json.loads(line)
        item = bench.item(facts["kind"], facts["index"])
        if item.turns[0].question != facts["question"]:
            raise ValueError(
                f"{answers} holds the question {facts['question']!r}, but the bench now asks "
                f"{item.turns[0].question!r}. Make it again: llava-mini evaluate tiny --answers {answers}"
            )
        cases.append(Case(item=item, facts=facts))
    return cases


def page(cases: Sequence[Case], folder: Path) -> str:
    """The page; its pictures are written into ``folder``.

    Raises:
        ValueError: a kind of question has no place on the page.
    """
    asked = {case.facts["kind"] for case in cases}
    placed = {kind for kinds in SECTIONS.values() for kind in kinds}
    if asked - placed:
        raise ValueError(f"These kinds have no section on the page: {', '.join(sorted(asked - placed))}.")
    parts = [OPENING]
    for title, kinds in SECTIONS.items():
        lines = [f"## {title}", "", "| | right | wrong |", "|---|---|---|"]
        for kind in kinds:
            found = [case for case in cases if case.facts["kind"] == kind]
            if found:
                cells = [cell(found, right, folder) for right in (True, False)]
                lines.append(f"| {kind} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, CLOSING, where(cases), confusions(cases)])


def cell(cases: Sequence[Case], right: bool, folder: Path) -> str:
    """The first right or wrong case of a kind."""
    case = next((one for one in cases if one.right == right), None)
    if case is None:
        return "-"
    verdict = "right" if right else "wrong"
    name = f"{case.facts['kind'].replace(' ', '-')}-{verdict}.jpg"
    case.picture().save(folder / name, quality=88)
    lines = [f"![{case.facts['kind']}, {verdict}]({folder.name}/{name})", case.facts["question"]]
    lines.append(f"**{case.facts['answer'] or '(nothing)'}**")
    if not right:
        lines.append(f"should be: {case.facts['right_answer']}")
        if reasons := "; ".join(hard_for(case, {one.facts["right_answer"] for one in cases})):
            lines.append(f"*({reasons})*")
    return "<br>".join(lines)


def hard_for(case: Case, answers: Container[str]) -> Iterator[str]:
    """What may have made a question hard.

    Args:
        case: the question.
        answers: all right answers to questions of its kind.
    """
    if case.facts["kind"] in CLOSED and case.facts["answer"] not in answers:
        yield "answers another sort of question"
    if case.facts["new_phrasing"]:
        yield "no training question has these words"
    if case.num_things >= MANY:
        yield f"{case.num_things} things to tell apart"
    shapes = [thing.shape for thing in case.item.frames[-1].things]
    named = {noun.phrase.split()[-1] for noun in case.item.turns[0].nouns}
    yield from (f"{shapes.count(shape)} things of that shape" for shape in sorted(named) if shapes.count(shape) > 1)
    for sign in case.item.frames[0].signs if case.facts["kind"] == "text" else ():
        yield f"{sign.font} font of size {sign.height}"


def length_of(case: Case) -> str:
    """What is written, by its length: ``word of 4 letters``."""
    answer = case.facts["right_answer"]
    return f"number of {len(answer)} digit(s)" if answer.isdigit() else f"word of {len(answer)} letters"


def where(cases: Sequence[Case]) -> str:
    """A table of shares of right answers by what might make a question hard."""
    exact = [case for case in cases if case.facts["kind"] not in CAPTION_KINDS]
    images, clips = [case for case in exact if not case.is_clip], [case for case in exact if case.is_clip]
    written = [case for case in of_kind(images, "text") if case.item.frames[0].signs]
    lines = [
        "## Where it goes wrong",
        "",
        "Share of right answers, descriptions left out, each question counted once.",
        "",
        "| | right | asked |",
        "|---|---|---|",
        *rows("image: {} things, words and bars", images, lambda case: bin_of(case.num_things, (2, 4, 6))),
        *rows("location: {} in the picture", of_kind(images, "location"), of_same_shape),
        *rows("text: {} font", written, lambda case: case.item.frames[0].signs[0].font),
        *rows("text: {}", written, length_of),
        *rows("clip: {} frames", clips, lambda case: bin_of(len(case.item.frames), (3, 4, 5))),
        *rows("clip: {} things at once", clips, lambda case: bin_of(case.num_things, (1, 2))),
        *rows(
            "phrasing: {} in training",
            exact,
            lambda case: "not" if case.facts["new_phrasing"] else "also",
        ),
    ]
    return "\n".join(lines) + "\n"


def of_same_shape(case: Case) -> str:
    """Whether a picture has another thing of the shape that is asked about."""
    shapes = [thing.shape for thing in case.item.frames[0].things]
    alone = all(shapes.count(noun.phrase.split()[-1]) == 1 for noun in case.item.turns[0].nouns)
    return "no other thing of that shape" if alone else "another thing of that shape"


def of_kind(cases: Iterable[Case], kind: str) -> list[Case]:
    """Those of one kind."""
    return [case for case in cases if case.facts["kind"] == kind]


def rows(label: str, cases: Sequence[Case], group_of: Callable[[Case], str]) -> Iterator[str]:
    """A line for each group of at least five."""
    groups = Counter(group_of(case) for case in cases)
    right = Counter(group_of(case) for case in cases if case.right)
    for group in sorted(groups):
        if groups[group] >= 5:
            share = f"{right[group] / groups[group]:.2f}".removeprefix("0")
            yield f"| {label.format(group)} | {share} | {groups[group]} |"


def bin_of(number: int, ends: Sequence[int]) -> str:
    """The range that holds a number: ``1 to 2``, ``3 to 4``, ..., ``7 or more``."""
    first = 1
    for end in ends:
        if number <= end:
            return str(end) if first == end else f"{first} to {end}"
        first = end + 1
    return f"{first} or more"


def confusions(cases: Sequence[Case]) -> str:
    """For each kind, the wrong answer that comes most often in place of a right one."""
    lines = ["## What it says instead", "", "| kind | says | should say | how often |", "|---|---|---|---|"]
    for kind in (kind for kinds in SECTIONS.values() for kind in kinds if kind not in CAPTION_KINDS):
        wrong = [case.facts for case in of_kind(cases, kind) if not case.right]
        pairs = Counter((facts["answer"], facts["right_answer"]) for facts in wrong)
        for (answer, truth), count in pairs.most_common(1):
            if count > 1:
                lines.append(f"| {kind} | {answer} | {truth} | {count} of {len(wrong)} wrong ones |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"Give the file of answers: python {Path(__file__).name} runs/answers.jsonl")
    folder = DOCS / "cases"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (DOCS / "cases.md").write_text(page(read_cases(Path(sys.argv[1])), folder), encoding="utf-8")
    print(f"docs/cases.md, {len(list(folder.iterdir()))} pictures")


if __name__ == "__main__":
    main()
