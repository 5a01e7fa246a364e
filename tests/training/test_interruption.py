import os
import signal
import threading

import pytest

from llava_mini.training.interruption import Interruption


def test_time_runs_out():
    assert not Interruption().is_due(1e9)
    assert not Interruption(seconds=60).is_due()
    assert Interruption(seconds=60).is_due(needed_seconds=61)
    assert Interruption(seconds=0).is_due()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_waits_inside_a_block_and_is_acted_on_at_its_end(number, error):
    reached = []
    with Interruption() as interruption, pytest.raises(error) as end:
        with interruption.deferred():
            assert not interruption.is_due()
            os.kill(os.getpid(), number)
            assert interruption.is_due()
            reached.append("end of the block")
        reached.append("after the block")
    assert reached == ["end of the block"]
    if error is SystemExit:
        assert end.value.code == 143


def test_a_second_signal_does_not_wait():
    with Interruption() as interruption, pytest.raises(KeyboardInterrupt), interruption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal waited")


def test_outside_a_block_a_signal_does_not_wait():
    with Interruption(), pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal waited")


def test_the_handlers_of_the_program_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_leaves_signals_alone():
    seen = []

    def enter():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
