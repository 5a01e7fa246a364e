import pytest
import torch
from safetensors.torch import save_file

from llava_mini.training.checkpoints import read_checkpoint, write_checkpoint


def test_tensors_and_facts_come_back(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    shared = torch.arange(4.0)
    tensors = {"a": shared, "b": shared[:2], "c": torch.ones(1, dtype=torch.bfloat16)}
    write_checkpoint(path, tensors, {"step": 3, "phase": "one"})
    read, facts = read_checkpoint(path)
    assert facts == {"step": 3, "phase": "one"}
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


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        read_checkpoint(tmp_path / "other.safetensors")
