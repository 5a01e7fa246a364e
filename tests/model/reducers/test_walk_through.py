"""The reducer that docs/add_a_reducer.md adds owes what all reducers owe, and is as short as the page promises."""

import re
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from llava_mini.model.reducers import REDUCERS
from llava_mini.reducer_settings import REDUCER_SETTINGS
from tests.model.reducers import test_contract
from tests.tiny_models import tiny_model

PAGE = Path(__file__).parents[3] / "docs" / "add_a_reducer.md"
CONTRACT = [
    test for name, test in vars(test_contract).items() if name.startswith("test_") and "model" in test.__annotations__
]


def blocks() -> list[str]:
    """The class, its lines in two tables, and what shows that it works."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_whole_method_is_a_file_of_fewer_than_80_lines():
    file = blocks()[0]
    assert "class CellFilter(Reducer)" in file
    assert len(file.splitlines()) < 80


def test_the_contract_was_found():
    assert len(CONTRACT) >= 8


@pytest.mark.parametrize("owed", CONTRACT, ids=lambda test: test.__name__)
def test_it_keeps_the_contract(owed: Any, tmp_path: Path):
    file, tables, _ = blocks()
    with patch.dict(REDUCERS), patch.dict(REDUCER_SETTINGS):
        exec(file + tables, {"__name__": "__walk_through__"})
        given = {"model": tiny_model(reducer="cell_filter", reducer_grid=2), "side": "left", "tmp_path": tmp_path}
        owed(**{name: given[name] for name in signature(owed).parameters})
