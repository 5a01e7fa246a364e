"""Work in processes of which one may die."""

import os
import signal

import pytest

from llava_mini.data import crash_proof
from llava_mini.data.crash_proof import Died, results


class Task:
    """Squares, except where it is told to do something else."""

    def __init__(self, **odd):
        self.odd = odd

    def __call__(self, number):
        match self.odd.get(f"n{number}"):
            case "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "fail":
                raise KeyError("no such thing")
            case "print":
                os.write(1, b"what a library says\n")
        return number**2


def test_every_number_is_answered_once_and_a_process_that_dies_costs_its_number_alone():
    found = list(results(Task(n2="die", n3="print"), 12, processes=2))
    assert len(found) == 12
    answers = dict(found)
    assert answers.pop(2) == Died(code=-signal.SIGSEGV)
    assert answers == {number: answer for number, answer in results(Task(), 12, processes=1) if number != 2}


def test_an_error_of_the_function_is_raised_with_its_traceback():
    with pytest.raises(RuntimeError, match="no such thing"):
        list(results(Task(n0="fail"), 1, processes=2))


def test_processes_that_die_one_after_the_other_are_not_blamed_on_files(monkeypatch):
    monkeypatch.setattr(crash_proof, "_DEATHS_IN_A_ROW", 1)
    with pytest.raises(ChildProcessError, match="processes in a row died"):
        list(results(Task(n0="die"), 1, processes=2))
