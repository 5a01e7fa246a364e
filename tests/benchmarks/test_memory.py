"""Bytes that a frame keeps are what the cost model counts; peaks come from new processes."""

import json

import pytest

from llava_mini.benchmarks import memory
from llava_mini.benchmarks.memory import Settings


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            memory, "peak_in_process", lambda bench, request: memory.peak_here(json.loads(json.dumps(request)))
        )
        return memory.run(Settings(size="tiny", tokens=(1, 4), frames=(1, 2), device="cpu"))


def test_measured_bytes_of_a_frame_are_the_counted_ones(report):
    ways = report.results["ways"]
    assert list(ways) == ["LLaVA-Mini, 1 token", "LLaVA-Mini, 4 tokens", "LLaVA-v1.5"]
    for one in ways.values():
        row = one["counted"]["features"] // 144  # the class token, of which the features are a view
        assert one["kept"] == {**one["counted"], "features": one["counted"]["features"] + row}
    assert ways["LLaVA-v1.5"]["kept"]["prefusion"] == 0


def test_peaks_and_estimates_are_there_for_all_numbers_of_frames(report):
    for one in json.loads(report.line())["results"]["ways"].values():
        assert list(one["peak"]) == list(one["estimated"]) == ["1", "2"]
        assert all(peak >= 0 for peak in one["peak"].values())


def test_tables_name_all_ways(report):
    assert "LLaVA-Mini, 4 tokens" in str(report)
    assert "What a frame keeps" in str(report)


def test_a_peak_without_enough_memory_says_so():
    ways = {"ours": {"peak": {"1": None}, "estimated": {"1": 5}}}
    assert "out of memory" in str(memory._peak_table(ways, Settings(dtype="bfloat16")))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"frames": (0,)}, r"frames are numbers from 1 on.*\[0\]"),
        ({"frames": (2, 2)}, r"each of them once.*\[2, 2\]"),
        ({"tokens": ()}, "tokens are numbers"),
        ({"tokens": (2,)}, "square"),
        ({"text_tokens": 0}, "at least one text token"),
    ],
)
def test_wrong_settings_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)
