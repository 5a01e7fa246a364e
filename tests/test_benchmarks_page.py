"""docs/benchmarks/results.md is what docs/draw_benchmarks.py makes of the results beside it."""

import importlib
import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from llava_mini.benchmarks.report import tupled

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def pages():
    specification = importlib.util.spec_from_file_location("draw_benchmarks", DOCS / "draw_benchmarks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reports(pages):
    return pages.read_reports()


def test_the_page_is_made_of_the_results(pages, reports):
    assert len(reports) == len(pages.SECTIONS) >= 6
    text = (DOCS / "benchmarks" / "results.md").read_text(encoding="utf-8")
    assert pages.page(reports) == text, "Run: python docs/draw_benchmarks.py"


def test_every_result_says_on_what_it_was_measured(reports):
    for report in reports.values():
        assert report.environment["commit"]
        assert report.environment["torch"]
        assert "cpu" in str(report.environment["device"]) or "NVIDIA" in str(report.environment["device"])


def test_every_picture_of_the_page_draws(pages, reports, tmp_path):
    drawn = [section for section in pages.SECTIONS if section.draw is not None]
    assert len(drawn) >= 3
    for section in drawn:
        pages.draw(section, reports[section.name], tmp_path / "picture.png")
        with (
            Image.open(tmp_path / "picture.png") as made,
            Image.open(DOCS / "benchmarks" / f"{section.name}.png") as file,
        ):
            assert made.size == file.size, "Run: python docs/draw_benchmarks.py"


def test_the_command_beside_a_result_has_every_setting_that_is_not_the_usual_one(pages, reports):
    changed = 0
    for report in reports.values():
        module = importlib.import_module(f"llava_mini.benchmarks.{report.bench}")
        usual, flags = vars(module.Settings()), pages._origin("result", report).split("`")[1].split()
        for name, value in tupled(report.settings).items():
            if value not in (usual[name], False):
                assert f"--{name.replace('_', '-')}" in flags
                changed += 1
    assert changed >= 20


def test_a_result_without_a_section_is_named(pages, reports):
    with pytest.raises(ValueError, match="They go together"):
        pages.page({**reports, "speed": reports["flops"]})
