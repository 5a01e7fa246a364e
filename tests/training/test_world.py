import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from llava_mini.training import world as world_module
from llava_mini.training.world import Board, World, name_of_start
from tests.training.ranks import run_ranks

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_without_torchrun_a_process_trains_alone():
    world = World.from_environment({})
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert world.gather("a") == ["a"]
    assert world.each(lambda: 3) == [3]
    assert world.first(lambda: 4) == 4


def test_half_an_environment_of_torchrun_is_refused():
    environment = {name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but MASTER_PORT is not set. Start the processes"):
        World.from_environment(environment)


def told(world):
    assert world.gather(world.rank) == [0, 1]
    assert world.each(lambda: 2 * world.rank) == [0, 2]
    assert world.first(lambda: world.rank) == 0
    errors = []
    for kind in (ValueError, FileNotFoundError, KeyError):

        def fail(kind=kind):
            if world.rank == 1:
                raise kind("wrong")

        try:
            world.each(fail)
        except Exception as error:
            errors.append((type(error).__name__, str(error)))
    return errors


def test_processes_agree_on_numbers_and_raise_the_errors_of_one_another(tmp_path):
    first, second = run_ranks(2, told, tmp_path)
    assert [first.text, second.text] == ["", ""]
    own = [("ValueError", "wrong"), ("FileNotFoundError", "wrong"), ("KeyError", "'wrong'")]
    assert second.value == own
    assert first.value == [own[0], ("OSError", "wrong"), ("RuntimeError", "Rank 1 failed. KeyError: 'wrong'")]


def agreed(world):
    with world.guarded():
        world.each(lambda: [][1] if world.rank == 0 else None)


def test_an_error_that_all_know_is_shown_once(tmp_path):
    ends = run_ranks(2, agreed, tmp_path, once=True)
    assert [(end.error, end.text) for end in ends] == [("SystemExit", "2")] * 2
    assert [end.terminal for end in ends] == ["llava-mini: IndexError: list index out of range\n", ""]


def unnoticed(world):
    world_module.ANSWER_SECONDS = 0.5
    with world.guarded():
        if world.rank == 1:
            raise ValueError("wrong")
        world.gather(None)  # until the other one has ended


def test_an_error_that_the_first_process_does_not_notice_is_told_by_another(tmp_path):
    ends = run_ranks(2, unnoticed, tmp_path, once=True)
    assert [(end.error, end.text) for end in ends] == [("SystemExit", "2")] * 2
    assert [end.terminal for end in ends] == ["", "llava-mini: wrong\n"]


def test_processes_that_lost_one_another_and_all_live_say_so(monkeypatch):
    monkeypatch.setattr(world_module, "ANSWER_SECONDS", 0.1)
    store = HashStore()
    store.set("process/1", f"{Board(store, 0, 1).host} {os.getpid()}")
    cause = Board(store, 0, 2).find_cause("RuntimeError: Timed out")
    assert cause.startswith("The processes lost one another, though none has ended (RuntimeError: Timed out). Was one")


def test_processes_that_are_started_again_share_a_name_that_the_dead_ones_did_not_have():
    store = HashStore()

    def come(rank):
        time.sleep(0.2 * rank)  # meanwhile the store holds what a dead one drew
        return name_of_start(store, rank, 3, seconds=10)

    with ThreadPoolExecutor(3) as pool:
        starts = [set(pool.map(come, range(3))) for _ in range(3)]
    assert [len(names) for names in starts] == [1, 1, 1]
    assert len(set.union(*starts)) == 3


def test_a_process_that_the_others_do_not_join_says_so():
    store = HashStore()
    store.set("start/1", "of a dead one")
    with pytest.raises(ChildProcessError, match="Not all of the 2 processes came within 0 seconds"):
        name_of_start(store, 0, 2, seconds=0.2)
