"""The numbers of docs/methods.md are those of the cost model, and every reducer is on the page."""

from pathlib import Path
from typing import Any

import pytest

from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.model import cost
from llava_mini.reducer_settings import REDUCER_SETTINGS

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
KEPT = 23
"""Of the prompt's words, those before the image, which a later question finds kept."""

ROWS: dict[str, dict[str, Any]] = {
    "LLaVA-v1.5": {"reducer": "identity", "prefusion_num_layers": 0},
    "LLaVA-Mini": {},
    "LLaVA-Mini with average pooling": {"reducer": "average_pool"},
    "average pooling": {"reducer": "average_pool", "prefusion_num_layers": 0},
    "query": {"reducer": "query", "prefusion_num_layers": 0},
    "M3": {"reducer": "m3", "prefusion_num_layers": 0},
    "MQT, 2 tokens": {"reducer": "mqt", "reducer_tokens": 2, "prefusion_num_layers": 0},
    "MQT, 36 tokens": {"reducer": "mqt", "reducer_tokens": 36, "prefusion_num_layers": 0},
    "MQT, 256 tokens": {"reducer": "mqt", "reducer_tokens": 256, "prefusion_num_layers": 0},
    "TokenPacker, 36 tokens": {"reducer": "token_packer", "reducer_grid": 6, "prefusion_num_layers": 0},
    "TokenPacker, 144 tokens": {"reducer": "token_packer", "reducer_grid": 12, "prefusion_num_layers": 0},
    "PruMerge": {"reducer": "prumerge", "prefusion_num_layers": 0},
    "PruMerge+": {"reducer": "prumerge_plus", "prefusion_num_layers": 0},
    "VisionZip, 64 tokens": {"reducer": "visionzip", "reducer_tokens": 64, "prefusion_num_layers": 0},
    "DivPrune, 56 tokens": {"reducer": "divprune", "reducer_tokens": 56, "prefusion_num_layers": 0},
    "QueCC": {"reducer": "quecc", "prefusion_num_layers": 0},
    "LLaMA-VID": {"reducer": "llama_vid", "prefusion_num_layers": 0},
    "FastV, half": {"reducer": "fastv", "reducer_tokens": 288, "prefusion_num_layers": 0},
    "FastV, a quarter": {"reducer": "fastv", "reducer_tokens": 144, "prefusion_num_layers": 0},
    "VoCo": {"reducer": "voco", "reducer_tokens": 2, "prefusion_num_layers": 0},
    "LLaVA-Mini inside": {"reducer": "query_inside", "reducer_layer": 4, "prefusion_num_layers": 0},
}
"""The rows of the table of costs, and the model of each; everything else is as in the preset of LLaVA-Mini at 7B."""


def row_of(name: str) -> str:
    fields = {"text_config": preset("llava-mini-vicuna-7b").text, "prefusion_num_layers": 4, **ROWS[name]}
    config, words = LlavaMiniConfig(**fields), cost.PAPER_TEXT_TOKENS - KEPT
    first = cost.flops(config).total
    counts = (
        cost.paper_flops(config).total,
        first,
        cost.flops(config, num_frames=2).total - first,
        cost.later_question_flops(config, num_text_tokens=words, num_kept_tokens=KEPT).total,
    )
    tokens = cost.rows_of_layers(config, 1, 0)[-1]
    return f"| {name} | {tokens} | {' | '.join(f'{count / 1e12:.2f}' for count in counts)} |"


@pytest.mark.parametrize("name", ROWS)
def test_the_costs_of_the_page_are_those_of_the_cost_model(name):
    assert row_of(name) in PAGE.read_text(encoding="utf-8").splitlines(), f"docs/methods.md needs: {row_of(name)}"


def test_the_page_has_no_other_costs():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| method | tokens |")) + 2
    table = lines[start : lines.index("", start)]
    assert [line.split("|")[1].strip() for line in table] == list(ROWS)


@pytest.mark.parametrize("reducer", list(REDUCER_SETTINGS))
def test_every_reducer_has_a_cost_and_a_line_that_says_what_it_is(reducer):
    assert any(fields.get("reducer", "query") == reducer for fields in ROWS.values())
    assert f"| `{reducer}`" in PAGE.read_text(encoding="utf-8")
