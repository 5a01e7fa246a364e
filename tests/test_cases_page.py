"""docs/cases.md shows the first right and the first wrong answer of each kind; the gallery is what it says it is."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from llava_mini.data.synthetic.world import CLIP_KINDS, IMAGE_KINDS
from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.exact_match import Mark
from llava_mini.recipes.tiny import tiny_settings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def draw_cases():
    specification = importlib.util.spec_from_file_location("draw_cases", ROOT / "docs" / "draw_cases.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def answers(tmp_path):
    """Two questions of each of three kinds: the first answered wrongly, the second rightly."""
    bench, marks = Bench(world=tiny_settings().world), []
    for kind in ("colour", "direction", "caption"):
        for index in range(2):
            turn = bench.item(kind, index).turns[0]
            marks.append(Mark(turn=turn, index=index, answer=turn.answer if index else "an apple", guess=""))
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(one.facts()) + "\n" for one in marks))
    return file


def test_the_page_shows_the_first_right_and_the_first_wrong_case_of_each_kind(draw_cases, answers, tmp_path):
    page = draw_cases.page(draw_cases.read_cases(answers), tmp_path)
    for kind in ("colour", "direction", "caption"):
        row = next(line for line in page.splitlines() if line.startswith(f"| {kind} |"))
        assert re.findall(r"\]\((.*?)\)", row) == [f"{tmp_path.name}/{kind}-{word}.jpg" for word in ("right", "wrong")]
        assert "**an apple**<br>should be:" in row
    assert "| count |" not in page
    with Image.open(tmp_path / "direction-wrong.jpg") as strip, Image.open(tmp_path / "colour-wrong.jpg") as image:
        assert strip.width > image.width


def test_every_kind_has_a_section(draw_cases):
    placed = [kind for kinds in draw_cases.SECTIONS.values() for kind in kinds]
    assert sorted(placed) == sorted([*IMAGE_KINDS, *CLIP_KINDS])


def test_answers_to_other_questions_are_refused(draw_cases, answers):
    answers.write_text(answers.read_text().replace('"question": "', '"question": "Well, '))
    with pytest.raises(ValueError, match="Make it again: llava-mini evaluate tiny --answers"):
        draw_cases.read_cases(answers)


def test_a_kind_without_a_section_is_named(draw_cases, answers):
    answers_of_new_kind = draw_cases.read_cases(answers)
    answers_of_new_kind[0].facts["kind"] = "smell"
    with pytest.raises(ValueError, match="no section on the page: smell"):
        draw_cases.page(answers_of_new_kind, answers.parent)


def test_ranges_of_numbers_have_names(draw_cases):
    assert [draw_cases.bin_of(number, (2, 4)) for number in (1, 2, 3, 4, 5)] == ["1 to 2"] * 2 + ["3 to 4"] * 2 + [
        "5 or more"
    ]


def test_the_gallery_is_the_first_of_the_test_split():
    about = json.loads((ROOT / "examples" / "gallery" / "about.json").read_text())
    assert about["command"] == "llava-mini data synth DIR --split test --images 8 --clips 3 --first 0 --questions 2"
    records = json.loads((ROOT / "examples" / "gallery" / "test.json").read_text())
    files = [record.get("image") or record["video"] for record in records]
    assert len(files) == 11
    assert all((ROOT / "examples" / "gallery" / file).is_file() for file in files)
