import pytest

from llava_mini.training.world import World
from tests.training.ranks import run_ranks

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_without_torchrun_a_process_trains_alone():
    world = World.from_environment({})
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert world.gather("a") == ["a"]
    assert world.sum({"a": 2.0}) == {"a": 2.0}
    assert world.each(lambda: 3) == [3]
    assert world.first(lambda: 4) == 4


def test_half_an_environment_of_torchrun_is_refused():
    environment = {name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but MASTER_PORT is not set. Start the processes"):
        World.from_environment(environment)


def told(world):
    assert world.gather(world.rank) == [0, 1]
    assert world.sum({"all": 1.5, str(world.rank): 1.0}) == {"all": 3.0, "0": 1.0, "1": 1.0}
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
