"""docs/world.md and docs/world.png are what docs/world.py makes of the world as it is."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from llava_mini.data.synthetic.world import CLIP_KINDS, IMAGE_KINDS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def world():
    specification = importlib.util.spec_from_file_location("world_page", DOCS / "world.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_table_of_questions_is_that_of_the_world(world):
    text = (DOCS / "world.md").read_text(encoding="utf-8")
    assert world.with_table(text, world.table()) == text, "Run: python docs/world.py"
    assert set(world.BALANCE) == set(IMAGE_KINDS) | set(CLIP_KINDS)


def test_the_page_of_samples_draws_and_has_the_size_of_the_file(world):
    page = world.draw_page()
    with Image.open(DOCS / "world.png") as file:
        assert file.size == page.size, "Run: python docs/world.py"
    assert (DOCS / "world.png").stat().st_size < 1_500_000
