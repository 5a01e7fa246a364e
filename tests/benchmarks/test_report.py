"""What benchmarks give: tables that align, one line of JSON that holds everything, files that are whole."""

import json

import pytest

from llava_mini.benchmarks.report import Report, Table, scaled, spread, told
from llava_mini.benchmarks.run import BENCHMARKS, read_report, run_benchmark


@pytest.fixture
def report():
    table = Table(title="Times", columns=("way", "ms"), rows=[("short", "1.0"), ("a longer one", "10.0")])
    return Report(
        bench="flops",
        environment={"device": "cpu", "torch": "2", "commit": "abc"},
        settings={"size": "tiny"},
        results={"times": [1.0, 10.0]},
        tables=[table],
    )


def test_tables_align(report):
    assert str(report) == "Times\nway             ms\nshort          1.0\na longer one  10.0"


def test_the_line_is_json_with_environment_settings_and_numbers(report):
    assert json.loads(report.line()) == {
        "bench": "flops",
        "environment": {"device": "cpu", "torch": "2", "commit": "abc"},
        "settings": {"size": "tiny"},
        "results": {"times": [1.0, 10.0]},
    }
    assert "\n" not in report.line()


def test_a_table_for_a_page_sets_words_on_the_left_and_numbers_on_the_right(report):
    assert report.tables[0].markdown() == "| way | ms |\n| --- | ---: |\n| short | 1.0 |\n| a longer one | 10.0 |"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("flops", {"tokens": (1, 4)}),
        ("video", {"size": "tiny", "frames": (2,), "dtypes": ("float32",), "repeats": 1, "warmup": 0, "device": "cpu"}),
    ],
)
def test_a_report_is_read_back_with_the_same_tables(name, given):
    report = run_benchmark(name, given)
    again = read_report(report.line())
    assert str(again) == str(report)
    assert again.line() == report.line()


@pytest.mark.parametrize("line", ["", "{}", '{"bench": "speed"}', '{"bench": "flops", "settings": {"colour": 1}}'])
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError, match="not what a benchmark of this version wrote"):
        read_report(line)


def test_the_file_is_the_line_and_nothing_else_stays(report, tmp_path):
    report.write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(report.line())
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_spread_is_the_median_with_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "first_quartile": 2.0, "third_quartile": 4.0}
    assert set(spread([7.0]).values()) == {7.0}
    with pytest.raises(ValueError, match="no value was measured"):
        spread([])


def test_numbers_in_words():
    assert told([1.0, 2.0, 3.0], 1) == "2.0 (1.5-2.5)"
    assert told([]) == "-"
    assert (scaled(1.961e12, "FLOP"), scaled(512, "B")) == ("1.96 TFLOP", "512 B")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=f"'speed'.*{', '.join(BENCHMARKS)}"):
        run_benchmark("speed", {})


def test_a_setting_of_another_benchmark_is_refused_with_its_own():
    with pytest.raises(ValueError, match="flops has no --answer-tokens.*--size, --tokens, --hd, --text-tokens"):
        run_benchmark("flops", {"answer_tokens": 3})
