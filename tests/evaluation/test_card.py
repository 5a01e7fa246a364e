import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava_mini.data.records import Turn
from llava_mini.data.synthetic.world import WorldSettings
from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.card import (
    BEGIN,
    END,
    card_facts,
    card_files,
    card_table,
    read_scores,
    weights_digest,
    with_table,
    write_card,
)
from llava_mini.evaluation.exact_match import Mark

BENCH = Bench(world=WorldSettings(image_kinds={"colour": 1.0, "caption": 1.0}), questions=3)
ENVIRONMENT = {"device": "cpu", "threads": 1, "dtype": "float32"}


def marked(kind: str, truth: str, answer: str) -> Mark:
    return Mark(turn=Turn(question="?", answer=truth, kind=kind, form=kind), index=0, answer=answer, guess="red")


MARKS = [
    *[marked("colour", "red", answer) for answer in ("red", "blue", "red")],
    *[marked("caption", "a red star", "a red star")] * 3,
]


@pytest.fixture
def facts(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return card_facts(BENCH, MARKS, folder=tmp_path, seconds=12.34, processor_seconds=10.04, environment=ENVIRONMENT)


def test_facts_hold_scores_marks_and_what_they_belong_to(facts):
    assert facts["marks"] == {"colour": "101"}
    assert facts["scores"]["colour"]["exact"] == 0.6667
    assert (facts["seconds"], facts["questions_per_kind"], facts["split"]) == (12.3, 3, "test")
    json.dumps(facts)


def test_other_weights_or_questions_have_another_digest(facts, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    other = card_facts(
        replace(BENCH, split="validation"),
        MARKS,
        folder=tmp_path,
        seconds=1,
        processor_seconds=1,
        environment=ENVIRONMENT,
    )
    assert other["weights_sha256"] != facts["weights_sha256"]
    assert other["questions_sha256"] != facts["questions_sha256"]


def test_the_digest_is_that_of_all_bytes_and_no_file_is_held_in_memory(tmp_path, monkeypatch):
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 3_000_000)
    monkeypatch.setattr(Path, "read_bytes", None)
    expected = hashlib.sha256(b"a" * 3_000_000 + b"b" * 3_000_000).hexdigest()
    assert weights_digest(tmp_path) == expected[:16]


def test_the_files_of_a_card_are_those_that_are_written(facts, tmp_path):
    assert card_files(tmp_path) == [tmp_path / "scores.json"]
    page = tmp_path / "README.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    files = card_files(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    write_card(tmp_path, facts)
    assert sorted(files) == sorted(path for path in tmp_path.iterdir() if path not in before or path == page)
    page.write_text(BEGIN)
    with pytest.raises(ValueError, match="one of the marks"):
        card_files(tmp_path)


def test_a_card_is_a_file_of_scores_and_a_table_between_two_marks(facts, tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_card(tmp_path, facts)
    page = (tmp_path / "README.md").read_text()
    assert page == f"before\n{BEGIN}\n{card_table(facts)}\n{END}\nafter\n"
    assert "| colour | .67 | .21 to .94 | 1.00 | 3 |" in page
    assert read_scores(tmp_path) == facts
    write_card(tmp_path, facts)
    assert (tmp_path / "README.md").read_text() == page


def test_a_model_without_a_page_gets_its_file_all_the_same(facts, tmp_path):
    write_card(tmp_path, facts)
    assert not (tmp_path / "README.md").exists()
    assert read_scores(tmp_path) == facts


def test_pages_without_marks_stay_and_half_a_pair_is_refused():
    assert with_table("text", "table") == "text"
    with pytest.raises(ValueError, match="one of the marks"):
        with_table(f"text {END}", "table")
    with pytest.raises(ValueError, match="one of the marks"):
        with_table(f"{END} {BEGIN}", "table")


def test_a_folder_without_scores_says_how_to_make_them(tmp_path):
    with pytest.raises(ValueError, match="evaluate tiny --model .* --write-card"):
        read_scores(tmp_path)
