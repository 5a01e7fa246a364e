"""All ways of a film answer alike where they compute the same, and the table holds what was asked for."""

import json

import pytest
import torch

from llava_mini.benchmarks import video
from llava_mini.benchmarks.sizes import random_model
from llava_mini.benchmarks.video import Settings, first_question, later_question, peak_here, way_config

SETTINGS = Settings(
    size="tiny", frames=(3, 11), dtypes=("float32",), repeats=1, warmup=0, most_tokens=500, device="cpu"
)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return random_model(way_config("tiny", "here", 100), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("frames", [3, 11])
@torch.inference_mode()
def test_the_released_order_and_a_later_question_say_what_the_order_here_says(model, frames):
    pool = video._pool(model)
    here = first_question(model, "here", SETTINGS, frames, pool)
    torch.testing.assert_close(first_question(model, "released", SETTINGS, frames, pool), here, atol=1e-4, rtol=1e-3)
    seen = model.see(pool, model.text_before_frames(video._prompt(model, SETTINGS)))
    prefix = video._prefix(model, SETTINGS, frames, seen)
    for _ in range(2):
        later = later_question(model, SETTINGS, frames, seen, prefix)
        torch.testing.assert_close(later, here, atol=1e-4, rtol=1e-3)


def test_all_ways_are_measured_as_far_as_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(video, "fresh_result", lambda program, request: (peak_here(request), 0.0))
    report = video.run(SETTINGS)
    results = json.loads(report.line())["results"]["ways"]
    assert list(results) == [
        "LLaVA-Mini, here, float32, 3 frames",
        "LLaVA-Mini, released order, float32, 3 frames",
        "LLaVA-v1.5, float32, 3 frames",
        "LLaVA-Mini, here, float32, 11 frames",
        "LLaVA-Mini, released order, float32, 11 frames",
    ]
    for one in results.values():
        assert len(one["first_s"]) == len(one["later_s"]) == 1
        assert one["peak"] >= 0
    assert "frames/s" in str(report)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"frames": (0,)}, r"frames are numbers from 1 on.*\[0\]"),
        ({"dtypes": ("float8",)}, r"dtypes are some of float32.*\['float8'\]"),
        ({"dtypes": ()}, "dtypes are some of"),
        ({"kept_tokens": 43}, "kept words"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"size": "huge"}, "no size 'huge'"),
    ],
)
def test_wrong_settings_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)
