"""What a cold process of the embedded model reports, from real processes."""

import importlib.util
import subprocess
import sys

import pytest

from llava_mini.benchmarks import load, processes
from llava_mini.benchmarks.load import STEPS, Settings
from llava_mini.benchmarks.processes import ProcessError, fresh, fresh_result


def test_every_step_is_timed_and_told():
    report = load.run(Settings(repeats=1, device="cpu"))
    seconds = report.results["seconds"]
    assert list(seconds) == list(STEPS)
    assert all(len(times) == 1 and times[0] > 0 for times in seconds.values())
    assert sum(seconds[name][0] for name in ("import torch", "load the model")) < seconds["whole process"][0]
    assert 1 <= report.results["answer_tokens"] <= 8
    assert all(name in str(report) for name in STEPS)


def test_without_tyro_the_row_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    steps = dict.fromkeys(name for name in STEPS if name not in ("start python", "help", "whole process"))
    made = {"seconds": dict.fromkeys(steps, 1.0), "answer_tokens": 3}
    monkeypatch.setattr(load, "fresh", lambda program: ("", 0.5))
    monkeypatch.setattr(load, "fresh_result", lambda program, device: (made, 2.0))
    report = load.run(Settings(repeats=2, device="cpu"))
    assert "help" not in report.results["seconds"]
    assert "tyro is missing" in str(report)


def test_a_process_that_fails_tells_its_last_line_and_keeps_the_rest():
    with pytest.raises(ProcessError, match="ended with 1: KeyError: 'x'") as caught:
        fresh("{}['x']")
    assert "Traceback" in caught.value.told


def test_a_process_finds_the_package_and_its_arguments():
    program = "import json; from importlib.util import find_spec; print('talk')\n"
    program += "print(json.dumps([find_spec('llava_mini').name, *sys.argv[1:]]))"
    assert fresh_result(program, "a")[0] == ["llava_mini", "a"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Only Linux ends a process with its parent.")
def test_a_process_ends_with_the_one_that_started_it_if_it_asks_for_it():
    ask = f"import runpy; runpy.run_path({processes.__file__!r})['end_with_parent']()"
    inner = f"{ask}; import time; print('begun', flush=True); time.sleep(20); print('went on', flush=True)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
        assert process.stdout.read() == ""  # ends when nobody is left who could write


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        Settings(repeats=0)
