"""Working ahead changes when items are made, and nothing else."""

import threading
import time

import pytest

from llava_mini.inference.ahead import Ahead


def number_of_threads():
    return sum(thread.name == "llava-mini media" for thread in threading.enumerate())


def test_items_come_in_order_and_end():
    ahead = Ahead(iter(range(20)), depth=2)
    assert list(ahead) == list(range(20))
    assert list(ahead) == []
    ahead.close()


def test_at_most_depth_items_wait():
    made = []

    def items():
        for number in range(10):
            made.append(number)
            yield number

    ahead = Ahead(items(), depth=1)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(made) <= 3  # one taken, one waiting, one in hand
    ahead.close()
    assert len(made) <= 3
    assert number_of_threads() == 0


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise ValueError("damaged")

    ahead = Ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(ahead)
    assert list(ahead) == []


def test_closing_closes_what_is_read_in_its_own_thread():
    closed = []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    ahead = Ahead(items())
    next(ahead)
    ahead.close()
    assert closed == ["llava-mini media"]
    assert number_of_threads() == 0
    Ahead(items()).close()  # never begun
