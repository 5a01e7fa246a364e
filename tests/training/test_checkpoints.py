import resource

import pytest
import torch
from safetensors.torch import save_file

from llava_mini.training.checkpoints import (
    fill,
    held,
    random_states,
    read_checkpoint,
    read_facts,
    replaced,
    restore_random_states,
    write_checkpoint,
)


def test_tensors_and_facts_come_back(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    shared = torch.arange(4.0)
    tensors = {"a": shared, "b": shared[:2], "c": torch.ones(1, dtype=torch.bfloat16)}
    write_checkpoint(path, tensors, {"step": 3, "phase": "one"})
    read, facts = read_checkpoint(path)
    assert facts == read_facts(path) == {"step": 3, "phase": "one"}
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_nothing_but_the_checkpoint_is_left(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    for step in range(2):
        write_checkpoint(path, {"a": torch.ones(1)}, {"step": step})
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.ones(1)}, {"step": 1})

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("llava_mini.training.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, {"a": torch.zeros(1)}, {"step": 2})
    assert read_checkpoint(path)[1] == {"step": 1}


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.ones(1)}, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .*\. The checkpoint before it is whole\. Make room"):
            write_checkpoint(path, {"a": torch.zeros(5000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_checkpoint(path)[1] == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("stored", [{"b": torch.ones(2)}, {"a": torch.ones(1)}, {}])
def test_tensors_of_other_names_or_shapes_are_refused(tmp_path, stored):
    with pytest.raises(ValueError, match="holds other tensors than this stage has, for example a "):
        fill(tmp_path / "checkpoint.safetensors", stored, {"a": torch.zeros(2)})


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        read_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize("read", [read_facts, read_checkpoint])
@pytest.mark.parametrize("num_bytes", [0, 4, 40, -7])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, read, num_bytes):
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.ones(50)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged .* start that phase anew, or restore it"):
        read(path)


def test_facts_that_are_no_json_are_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={"facts": "three"})
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is a safetensors file but no checkpoint of a run"):
        read_facts(path)


def test_a_draft_takes_the_place_of_a_file_only_when_it_is_complete(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replaced(path) as draft:
        draft.write_text("ne")
        raise OSError("disk full")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with replaced(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


def test_random_numbers_go_on_from_a_stored_state():
    states = random_states()
    first = torch.rand(3)
    torch.manual_seed(7)
    restore_random_states({**states, "cuda": torch.zeros(1)})  # a state from a GPU that is not here
    assert torch.equal(torch.rand(3), first)


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with held(tmp_path), pytest.raises(ValueError, match="Another process trains in"), held(tmp_path):
        pytest.fail("held twice")
    with held(tmp_path):
        pass
