"""The count from the configuration: the paper's numbers beside ours, and every way that exists here."""

import pytest

from llava_mini.benchmarks import flops
from llava_mini.benchmarks.flops import METHODS, PAPER, Settings
from llava_mini.config import preset
from llava_mini.model import cost
from llava_mini.reducer_settings import REDUCER_SETTINGS


@pytest.fixture(scope="module")
def report():
    return flops.run(Settings())


def test_computed_totals_are_the_printed_ones_but_for_the_misprint(report):
    rows = report.results["paper"]
    assert len(rows) == len(PAPER) == 16
    wrong = [row for row in rows if round(row["computed"] / 1e12, 2) != row["printed"]]
    assert [(row["printed"], row["note"]) for row in wrong] == [
        (1.81, "misprint of 1.71"),
        (1.84, "no code is published; 1.89 by the paper's own counting"),
    ]


def test_rows_of_the_paper_have_a_first_and_a_later_question_here(report):
    rows = {row["model"]: row for row in report.results["paper"]}
    layers = [rows[name] for name in ("no pre-fusion, 1 token", "1 pre-fusion layer", "2 pre-fusion layers")]
    assert layers[0]["later"] < layers[1]["later"] < layers[2]["later"] < 0.3e12
    assert all(row["later"] < row["first"] for row in rows.values())
    ours = report.results["methods"]["LLaVA-Mini, 1 token"]
    assert rows["LLaVA-Mini"]["first"] == ours["first"]["total"]
    assert rows["LLaVA-Mini"]["later"] == sum(ours["later"]["23"].values())
    line = next(line for line in str(report).splitlines() if line.startswith("3 pre-fusion layers"))
    of_three = rows["3 pre-fusion layers"]
    shown = [f"{count / 1e12:.2f}" for count in (of_three["computed"], of_three["first"], of_three["later"])]
    assert line.split()[4:8] == ["1.81", *shown]


def test_every_reducer_has_a_row():
    assert {fields["reducer"] for fields in METHODS.values()} == set(REDUCER_SETTINGS)


def test_numbers_are_those_of_the_cost_model(report):
    ours, config = report.results["methods"]["LLaVA-Mini, 1 token"], preset("llava-mini-vicuna-7b")
    assert ours["first"]["total"] == cost.flops(config).total
    assert ours["later"]["23"]["prefusion"] == (
        cost.later_question_flops(config, num_text_tokens=20, num_kept_tokens=23).prefusion
    )


def test_rows_of_the_peers_are_those_of_the_published_protocol(report):
    rows = {name: one["paper_first"] / 1e12 for name, one in report.results["methods"].items()}
    frames = {name: one["paper_next_frame"] / 1e12 for name, one in report.results["methods"].items()}
    assert round(rows["LLaVA-v1.5, 576 tokens"], 2) == 8.55
    assert round(frames["LLaVA-Mini, 1 token"], 2) == 1.39
    assert 0.93 < rows["average pooling, no pre-fusion, 1 token"] < rows["query, no pre-fusion, 1 token"] < 0.96


def test_tables_show_goals_misprints_and_all_ways(report):
    text = str(report)
    assert "misprint of 1.71" in text
    assert "an eighth of it" in text
    assert "later question, before the language model     0.08" in text
    assert all(name in text for name in METHODS)


def test_settings_reach_the_count():
    report = flops.run(Settings(size="8b", tokens=(4, 16), hd=True, text_tokens=20))
    names = list(report.results["methods"])
    assert (
        len(names) == len(set(names)) == 2 * (len(METHODS) - 3) + 3
    )  # all patches, and those that stand out, are no choice
    ours = report.results["methods"]["LLaVA-Mini, 4 tokens"]
    assert list(ours["later"]) == ["0"]
    assert ours["first"]["total"] > 5e12


def test_ways_that_cannot_make_so_many_tokens_are_left_out():
    names = list(flops.run(Settings(tokens=(25,))).results["methods"])
    assert "MQT, 25 tokens" in names
    assert not any("TokenPacker" in name for name in names)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"size": "70b"}, "no size '70b'.*tiny, middle, 7b, 8b"),
        ({"tokens": (3,)}, "square.*got 3"),
        ({"tokens": (0,)}, "square.*got 0"),
        ({"tokens": (1, 1)}, "each of them once.*1, 1"),
        ({"tokens": ()}, "each of them once"),
        ({"text_tokens": 0}, "at least one text token.*got 0"),
    ],
)
def test_wrong_settings_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)
