"""docs/analysis/results.md is what docs/draw_analysis.py makes of the analyses beside it."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "analysis"


@pytest.fixture(scope="module")
def pages():
    specification = importlib.util.spec_from_file_location("draw_analysis", DOCS / "draw_analysis.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_analyses(pages):
    assert pages.page() == (FOLDER / "results.md").read_text(encoding="utf-8"), "Run: python docs/draw_analysis.py"


def test_the_page_shows_every_file_that_is_kept(pages):
    shown = set(re.findall(r"\]\(([^)/]+\.png)\)", (FOLDER / "results.md").read_text(encoding="utf-8")))
    assert len(shown) >= 6
    assert shown == {path.name for path in FOLDER.glob("*.png")}
    assert {path.stem for path in FOLDER.glob("*.json")} <= set(pages.MODELS)


def test_every_analysis_says_on_what_it_was_made():
    for path in FOLDER.glob("*.json"):
        about = json.loads(path.read_text(encoding="utf-8"))
        assert about["commit"]
        assert not about["commit"].endswith("+"), "Commit first, then analyse: nobody has the files that were changed."
        assert about["questions"] >= 100
        assert about["data"] == "world"
        assert about["model"] == path.stem, "Keep it with draw_analysis.py, which leaves out where the model lay."


def test_an_analysis_is_kept_with_its_pictures(pages, tmp_path, monkeypatch):
    source, folder = tmp_path / "looks", tmp_path / "analysis"
    source.mkdir()
    (source / "about.json").write_text('{"model": "/home/somebody/model", "questions": 5}')
    (source / "dropped.csv").write_text("about\n")
    (source / "attention.png").write_bytes(b"new")
    (source / "words-2.png").write_bytes(b"not kept")
    monkeypatch.setattr(pages, "FOLDER", folder)
    folder.mkdir()
    (folder / "tiny-queries.png").write_bytes(b"of an older analysis")
    pages.keep("tiny", source)
    assert sorted(path.name for path in folder.iterdir()) == ["tiny-attention.png", "tiny-dropped.csv", "tiny.json"]
    assert json.loads((folder / "tiny.json").read_text()) == {"model": "tiny", "questions": 5}
