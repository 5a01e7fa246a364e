"""The film that is made has what was asked for, and all ways read it."""

import importlib.util

import pytest

from llava_mini.benchmarks import decode
from llava_mini.benchmarks.decode import Settings

SMALL = {"size": "tiny", "width": 64, "height": 48, "rate": 5, "seconds": 2, "repeats": 1, "warmup": 0}


def test_every_way_reads_its_frames():
    report = decode.run(Settings(**SMALL))
    frames = {name: one["frames"] for name, one in report.results["ways"].items()}
    assert frames == {
        "PyAV alone, every frame": 10,
        "frames_of, every frame": 10,
        "processor.stream, every frame": 10,
        "frames_of, one per second": 2,
        "processor.stream, one per second": 2,
    }
    assert all(len(one["seconds"]) == 1 for one in report.results["ways"].values())
    assert report.results["image_size"] == 96
    assert "64 x 48 at 5 frames/s, libx264" in str(report)


@pytest.mark.parametrize(("codec", "told"), [("nonsense", "no encoder 'nonsense'"), ("aac", "but of audio")])
def test_what_is_no_encoder_of_video_is_refused(codec, told):
    with pytest.raises(ValueError, match=told):
        decode.run(Settings(**SMALL, codec=codec))


@pytest.mark.parametrize("film", [{"width": 40_000}, {"codec": "mpeg1video", "rate": 7}])
def test_a_film_that_an_encoder_does_not_make_is_refused(film):
    with pytest.raises(ValueError, match=r"The encoder \w+ makes no film of \d+ x 48 pixels at \d frames/s"):
        decode.run(Settings(**{**SMALL, **film}))


def test_without_pyav_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install av"):
        decode.run(Settings(**SMALL))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"width": 15}, "width must be at least 16, got 15"),
        ({"height": 17}, "even sides, got 1280 x 17"),
        ({"seconds": 0}, "seconds must be at least 1"),
        ({"size": "huge"}, "no size"),
    ],
)
def test_wrong_settings_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)
