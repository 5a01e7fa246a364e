"""All ways of a film answer alike where they compute the same, and the table holds what was asked for."""

import json
from dataclasses import replace

import pytest
import torch

from llava_mini.benchmarks import video
from llava_mini.benchmarks.film_ways import Film, film_model, make_way, tokens_of
from llava_mini.benchmarks.timing import PARTS, Laps
from llava_mini.benchmarks.video import Settings, peak_here

CPU = torch.device("cpu")
SETTINGS = Settings(
    size="tiny", frames=(3, 11), dtypes=("float32",), repeats=1, warmup=0, most_tokens=500, device="cpu"
)


def film(frames):
    return Film(frames=frames, kept=23, question=20)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return film_model(film(11), "tiny", CPU, torch.float32, most_tokens=3000)


def last_keys(answering):
    """What the language model holds after the prompt: a function of every row of it."""
    return answering.cache.layers[-1].keys


@pytest.mark.parametrize("frames", [3, 11])
@torch.inference_mode()
def test_the_released_order_and_a_later_question_say_what_the_order_here_says(model, frames):
    laps = Laps(device=CPU, by_part=False)
    here = make_way("here", film(frames), model)
    released = make_way("released", film(frames), model)
    released.pool = here.pool
    first = last_keys(here.first(laps))
    torch.testing.assert_close(last_keys(released.first(laps)), first, atol=1e-4, rtol=1e-3)
    kept = here.keep()
    for _ in range(2):
        torch.testing.assert_close(last_keys(here.later(kept, laps)), first, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["here", "all tokens", "video-llava"])
@torch.inference_mode()
def test_a_way_gives_the_language_model_the_tokens_it_names_and_keeps_them_for_later(model, name):
    laps = Laps(device=CPU, by_part=False)
    way = make_way(name, film(3), model)
    first = way.first(laps)
    assert first.cache.get_seq_length() == 43 + tokens_of(name, film(3), "tiny")
    later = way.later(way.keep(), laps)
    torch.testing.assert_close(last_keys(later), last_keys(first), atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_a_prompt_that_is_read_in_pieces_is_read_whole(model):
    laps, way = Laps(device=CPU, by_part=False), make_way("video-llava", film(40), model)
    answering = way.first(laps)
    assert answering.cache.get_seq_length() == 43 + 40 * 65 > 2048
    rows = torch.cat([way._embeds()[0], way.front.tokens(laps), way._embeds()[1]], dim=1)
    whole = model.language_model(inputs_embeds=rows, use_cache=True).past_key_values
    torch.testing.assert_close(last_keys(answering), whole.layers[-1].keys, atol=1e-4, rtol=1e-3)


def test_all_ways_are_measured_as_far_as_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(video, "peak_in_process", lambda bench, request: peak_here(json.loads(json.dumps(request))))
    report = video.run(SETTINGS)
    ways = json.loads(report.line())["results"]["ways"]
    assert [(one["way"], one["frames"], one["tokens"]) for one in ways] == [
        ("here", 3, 3),
        ("released", 3, 3),
        ("all tokens", 3, 432),
        ("video-llava", 3, 195),
        ("here", 11, 11),
        ("released", 11, 11),
    ]
    for one in ways:
        assert len(one["first_s"]) == len(one["later_s"]) == len(one["token_s"]) == 1
        assert set(one["parts_s"]) >= {"vision", "reduction", "prefill"}
        assert set(one["parts_s"]) <= {*PARTS}
        assert sum(times[0] for times in one["parts_s"].values()) == pytest.approx(one["first_s"][0], rel=0.2)
        assert one["peak"]["host"] >= 0
    assert "frames/s" in str(report)


def test_a_way_without_enough_memory_to_keep_a_film_has_no_times_and_the_others_do(monkeypatch):
    def too_much(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(video, "peak_in_process", lambda bench, request: None)
    monkeypatch.setattr("llava_mini.benchmarks.film_ways.VideoLlava.keep", too_much)
    report = video.run(replace(SETTINGS, frames=(3,)))
    times = {one["way"]: len(one["first_s"]) for one in report.results["ways"]}
    assert times == {"here": 1, "released": 1, "all tokens": 1, "video-llava": 0}
    row = next(line for line in str(report).splitlines() if line.startswith("Video-LLaVA"))
    assert row.split()[4] == "-"


def test_a_format_that_does_not_suit_the_device_is_refused():
    with pytest.raises(ValueError, match="float16 is too slow on a CPU"):
        video.run(replace(SETTINGS, dtypes=("float32", "float16")))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"frames": (0,)}, r"frames are numbers from 1 on.*\[0\]"),
        ({"dtypes": ("float8",)}, r"dtypes are some of float32.*\['float8'\]"),
        ({"dtypes": ()}, "dtypes are some of"),
        ({"dtypes": ("float32", "float32")}, "each of them once"),
        ({"kept_tokens": 43}, "kept words"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"size": "huge"}, "no size 'huge'"),
    ],
)
def test_wrong_settings_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)
