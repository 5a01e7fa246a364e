import pytest

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
