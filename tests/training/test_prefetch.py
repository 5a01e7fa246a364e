import os
import time
from functools import partial

import pytest
import torch

from llava_mini.training.prefetch import Prefetch


def test_steps_in_any_order_give_what_the_function_gives():
    batches = Prefetch(lambda step: step * step)
    assert [batches(step) for step in (0, 1, 2, 7, 3, 3)] == [0, 1, 4, 49, 9, 9]


def test_the_next_step_is_made_ahead():
    made = []
    batches = Prefetch(made.append)
    batches(0)
    batches(1)
    assert made[:2] == [0, 1]
    assert made.count(1) == 1


def test_an_error_comes_at_the_step_that_causes_it():
    batches = Prefetch(lambda step: 1 // (step - 2))
    batches(0)
    batches(1)
    with pytest.raises(ZeroDivisionError):
        batches(2)


def square(step):
    return {"square": torch.full((2,), step * step), "half": torch.tensor(step / 2, dtype=torch.bfloat16)}


def refuse(limit, step):
    if step >= limit:
        raise ValueError(f"step {step} is too far")
    return step


def die(step):
    os._exit(step)


def test_processes_give_what_the_function_gives_in_any_order():
    with Prefetch(square, workers=2) as batches:
        for step in (0, 1, 2, 7, 3, 3):
            batch, expected = batches(step), square(step)
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
            assert all(batch[name].dtype == expected[name].dtype for name in expected)


def test_an_error_in_a_process_comes_at_the_step_that_causes_it_and_others_go_on():
    with Prefetch(partial(refuse, 2), workers=1) as batches:
        assert [batches(0), batches(1)] == [0, 1]
        with pytest.raises(ValueError, match="step 2 is too far"):
            batches(2)
        assert batches(1) == 1


def test_a_process_that_dies_is_told():
    with Prefetch(die, workers=1) as batches, pytest.raises(ChildProcessError, match="memory full") as told:
        batches(3)
    assert "died with exit code 3." in str(told.value)


def test_as_many_as_asked_for_are_made_ahead():
    made = []
    with Prefetch(made.append, ahead=3) as batches:
        batches(0)
        until = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < until:
            time.sleep(0.01)
    assert made == [0, 1, 2, 3]


def test_nothing_is_made_past_the_end():
    made = []
    with Prefetch(made.append, end=2) as batches:
        batches(0)
        batches(1)
        time.sleep(0.05)
    assert made == [0, 1]
