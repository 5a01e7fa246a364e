"""Seconds by part, on a device that is waited for and on one that works ahead."""

import itertools

import pytest
import torch

from llava_mini.inference.stats import Clock


class Mark:
    """Stands in for a CUDA event: the n-th one lies n seconds after the first."""

    count = itertools.count()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = next(Mark.count)

    def elapsed_time(self, other):
        return 1000.0 * (other.at - self.at)


@pytest.fixture
def waits(monkeypatch):
    """What was waited for, of a GPU that need not be there."""
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    return waits


def test_a_gpu_is_waited_for_once_however_many_parts_it_works_on(waits):
    seconds = {}
    clock = Clock(seconds, torch.device("cuda"))
    assert clock.timed("vision", lambda a, b: a + b)(1, b=2) == 3
    clock.timed("reduction", lambda: None)()
    clock.timed("vision", lambda: None)()
    assert (waits, seconds) == ([], {})
    clock.settle()
    assert (waits, seconds) == ([torch.device("cuda")], {"vision": 2.0, "reduction": 1.0})
    clock.settle()
    assert len(waits) == 1
    assert seconds["vision"] == 2.0


def test_what_the_host_waits_for_is_counted_at_once(waits):
    seconds = {}
    Clock(seconds, torch.device("cuda")).timed("media", lambda: None)()
    Clock(seconds, torch.device("cpu")).timed("vision", lambda: None)()
    assert set(seconds) == {"media", "vision"}
    assert waits == []


def test_a_part_that_fails_is_counted(waits):
    def fail():
        raise ValueError("It broke.")

    seconds = {}
    for device in ("cpu", "cuda"):
        clock = Clock(seconds, torch.device(device))
        with pytest.raises(ValueError, match="broke"):
            clock.timed(device, fail)()
        clock.settle()
    assert seconds["cuda"] == 1.0
    assert seconds["cpu"] > 0
