"""docs/draw_study.py on a made-up study: what it counts, and that its page and pictures come out."""

import importlib.util
from pathlib import Path
from random import Random

import pytest

from llava_mini.recipes.study_rows import ROWS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def pages():
    specification = importlib.util.spec_from_file_location("draw_study", DOCS / "draw_study.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def score(exact):
    return {"exact": exact, "low": 0.0, "high": 1.0, "blind": 0.25, "questions": 10}


def seed(number, images, clips, losses):
    """One seed of a row, with a curve of two points and more."""
    kinds = {"colour": images, "direction": clips, "images": images, "clips": clips, "all": (images + clips) / 2}
    ways = ("unchanged", "tokens zeroed", "tokens shuffled", "text raw")
    cost = {"tokens_per_frame": 1, "flops_first": 3e8, "flops_later": 1e8, "flops_paper": 2e12, "parameters": 10**6}
    return {
        "seed": number,
        "scores": {kind: score(value) for kind, value in kinds.items()},
        "tokens_per_frame": 1,
        "parameters": 10**6,
        "toy": cost,
        "full_size": cost,
        "seconds_per_step": 0.5,
        "curve": [{"step": 50 * (step + 1), "answer": loss, "right": 0.5} for step, loss in enumerate(losses)],
        "carriers": {
            way: {"right": {**kinds, "direction": clips - 0.1 * place}, "kept": {}} for place, way in enumerate(ways)
        },
    }


@pytest.fixture(scope="module")
def made_up():
    """Three rows with two seeds: the second row is ahead of the first on images for sure, on clips it is not."""
    rows = {
        "query-prefusion-0": [seed(0, 0.50, 0.40, (3.0, 2.0, 1.0)), seed(1, 0.52, 0.50, (3.0, 2.0, 1.0))],
        "query-prefusion-1": [seed(0, 0.70, 0.50, (3.1, 1.9, 0.8)), seed(1, 0.73, 0.45, (3.1, 1.9, 0.8))],
        "query-prefusion-2": [seed(0, 0.75, 0.60, (3.2, 2.1, 0.5)), seed(1, 0.75, 0.60, (3.2, 2.1, 0.5))],
    }
    ran = {"device": "cpu, a processor", "threads": 1, "torch": "2", "commit": "0123456789"}
    settings = {
        "steps": 150,
        "batch": 16,
        "rate": 1e-3,
        "dtype": "torch.bfloat16",
        "questions": 100,
        "environment": ran,
    }
    shows = {row.name: row.shows for row in ROWS}
    return {
        "settings": settings,
        "rows": [{"row": name, "shows": shows[name], "from": "", "seeds": one} for name, one in rows.items()],
        "time": [],
    }


def test_a_row_is_ahead_only_where_all_seeds_agree_and_the_mean_exceeds_the_spread(pages, made_up):
    rows = pages.rows_by_name(made_up)
    found = pages.differences(rows, "query-prefusion-1", "query-prefusion-0", "images")
    assert found == pytest.approx([0.20, 0.21])
    assert pages.verdict(found) == "ahead"
    assert pages.verdict([-one for one in found]) == "behind"
    assert (
        pages.verdict(pages.differences(rows, "query-prefusion-1", "query-prefusion-0", "clips")) == "within the spread"
    )
    assert pages.verdict([0.1, 0.4, 0.05]) == "within the spread"
    assert pages.verdict([0.0, 0.02, 0.02]) == "within the spread"
    assert pages.verdict([0.1]) == "one seed"


def test_rows_are_compared_on_the_seeds_that_both_have(pages, made_up):
    rows = pages.rows_by_name(made_up)
    fewer = {**rows, "query-prefusion-0": {"seeds": rows["query-prefusion-0"]["seeds"][1:]}}
    assert pages.differences(fewer, "query-prefusion-1", "query-prefusion-0", "images") == pytest.approx([0.21])


def test_the_page_says_how_often_equal_rows_are_told_apart_by_chance(pages):
    random = Random(0)
    for seeds, share in ((2, 0.39), (3, 0.21)):
        verdicts = [pages.verdict([random.gauss(0, 1) for _ in range(seeds)]) for _ in range(10_000)]
        assert sum(one in ("ahead", "behind") for one in verdicts) / 10_000 == pytest.approx(share, abs=0.015)
        assert f"{100 * share:.0f}" in pages.PAIRS


def test_rank_correlation_counts_pairs(pages):
    assert pages.kendall([1, 2, 3], [10, 20, 30]) == pages.kendall([1], [5]) == 1
    assert pages.kendall([1, 2, 3], [3, 2, 1]) == -1
    assert pages.kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert pages.kendall([1, 2, 2], [5, 7, 7]) == pytest.approx(1)


def test_the_order_settles_where_it_stays_the_final_one(pages, made_up):
    rows = pages.rows_by_name(made_up)
    assert pages.orders(rows) == [(50, -1.0), (100, pytest.approx(-1 / 3)), (150, 1.0)]
    assert pages.settled_at(rows) == 150


def test_the_order_is_that_of_seeds_which_all_rows_have(pages, made_up):
    rows = pages.rows_by_name(made_up)
    easy = {**rows["query-prefusion-0"]["seeds"][0], **seed(2, 0.5, 0.4, (0.1, 0.1, 0.1))}
    more = {**rows, "query-prefusion-0": {"seeds": [*rows["query-prefusion-0"]["seeds"], easy]}}
    assert pages.common_seeds(more.values()) == [0, 1]
    assert pages.orders(more) == pages.orders(rows)


def test_the_page_has_every_row_pair_and_table_that_there_is(pages, made_up):
    text = pages.page(made_up)
    assert "+0.205 ± 0.007, ahead" in text
    assert "| `query-prefusion-1` | .71 ± .02 |" in text
    assert text.count("\n### ") == len(pages.tables_of(pages.rows_by_name(made_up))) == 1
    assert "150 steps of 16 pictures" in text
    assert "At no step before the last, 150, the order of 3 rows" in text
    assert "half way, at step 100, tau is -0.33" in text
    assert "| `query-prefusion-1` | 2 | 1 (1) | .595 ± " in text
    with pytest.raises(ValueError, match="no finished row"):
        pages.page({**made_up, "rows": []})


def test_a_row_without_training_has_scores_and_no_curve(pages, made_up):
    name = "fastv-untrained"
    untrained = {**seed(0, 0.6, 0.3, ()), "seconds_per_step": 0.0}
    study = {**made_up, "rows": [*made_up["rows"], {"row": name, "shows": "No training.", "seeds": [untrained]}]}
    rows = pages.rows_by_name(study)
    assert [*pages.trained(rows)] == [row["row"] for row in made_up["rows"]]
    assert pages.orders(rows) == pages.orders(pages.rows_by_name(made_up))
    text = pages.page(study)
    assert f"| `{name}` | .60 |" in text
    time_of_step = next(line for line in text.splitlines() if line.startswith(f"| `{name}` | 1 |")).split("|")[-2]
    assert time_of_step == "  "
    for draw in pages.PICTURES.values():
        draw(study)


def test_rows_about_time_stand_apart_with_what_carries_them(pages, made_up):
    name, one = "time-plain", seed(0, 0.6, 0.5, (1.0, 0.9, 0.8))
    kinds = dict.fromkeys(("direction", "order", "event count", "clips", "all"), score(0.5))
    right = {"unchanged": 0.5, "tokens zeroed": 0.3, "tokens shuffled": 0.4, "text raw": 0.45}
    carriers = {way: {"right": {"clips": share}, "kept": {}} for way, share in right.items()}
    about_time = {"row": name, "shows": "Time.", "from": "query-prefusion-3"}
    study = {**made_up, "time": [{**about_time, "seeds": [{**one, "scores": kinds, "carriers": carriers}]}]}
    text = pages.page(study)
    cells = ".500 | .500 | .500 | .500 | +0.20 | +0.10 | +0.05 |"
    assert f"| `{name}` | `query-prefusion-3` | 1 | {cells}" in text
    assert f"| `{name}` | Time. |" in text
    assert "What keeps time" not in pages.page(made_up)


def test_a_row_about_time_has_no_loss_where_it_has_nothing_to_lose(pages, made_up):
    name, kinds = "time-all-tokens", ("direction", "order", "event count", "clips", "all")
    carriers = {way: {"right": {"clips": 0.4}, "kept": {}} for way in ("unchanged", "tokens zeroed", "tokens shuffled")}
    facts = {**seed(0, 0.6, 0.5, (1.0, 0.9, 0.8)), "scores": dict.fromkeys(kinds, score(0.5)), "carriers": carriers}
    about_time = {"row": name, "shows": "All patches.", "from": "all-tokens", "seeds": [facts]}
    assert "| .500 | +0.00 | +0.00 |  |" in pages.page({**made_up, "time": [about_time]})


def test_every_row_that_is_compared_is_a_row_of_the_study(pages):
    names = {row.name for row in ROWS}
    tables = [name for table in pages.TABLES.values() for name in table]
    assert {*tables} <= names
    assert {name for claim in pages.CLAIMS for name in (claim.more, claim.less)} <= names
    assert {row.name for row in ROWS} == {*tables}


def test_the_page_is_made_of_the_results(pages):
    text = (DOCS / "study.md").read_text(encoding="utf-8")
    assert pages.page(pages.read_study()) == text, "Run: python docs/draw_study.py"


def test_every_picture_draws(pages, made_up, tmp_path):
    for name, draw in pages.PICTURES.items():
        draw(made_up).savefig(tmp_path / f"{name}.png", format="png", dpi=50)
    assert len(list(tmp_path.iterdir())) == len(pages.PICTURES) == 3
