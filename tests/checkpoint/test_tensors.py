"""Tensors in files: mapped, and written shard by shard."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_mini.checkpoint import tensors as module
from llava_mini.checkpoint.tensors import read_file, read_folder, write_shards
from tests.checkpoint.folders import assert_same_tensors, stored_tensors

SHARD = 3 * 400
"""Bytes of three of the tensors below."""


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"part.{place}": torch.randn(10, 10, generator=generator) for place in range(8)}


def test_memory_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    given, alive, held = some_tensors(), [], []
    alive = [weakref.ref(tensor) for tensor in given.values()]

    def record(shard: dict[str, torch.Tensor], *_: object, **__: object) -> None:
        gc.collect()
        held.append((sum(tensor.nbytes for tensor in shard.values()), sum(ref() is not None for ref in alive)))

    monkeypatch.setattr(module, "save_file", record)
    monkeypatch.setattr(module, "share", lambda _: None)
    write_shards(given, tmp_path, lambda _, tensor: tensor, SHARD)
    assert not given
    assert held == [(1200, 8), (1200, 5), (800, 2)]


def test_shards_and_index_hold_every_tensor_in_the_order_of_the_source(tmp_path):
    write_shards(some_tensors(), tmp_path, lambda _, tensor: tensor, SHARD)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert_same_tensors(stored_tensors(tmp_path), some_tensors())
    assert_same_tensors(read_folder(tmp_path), some_tensors())
    assert sorted(load_file(tmp_path / "model-00001-of-00003.safetensors")) == ["part.0", "part.1", "part.2"]


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    one = torch.randn(4, 4)
    write_shards({"left": one, "right": one}, tmp_path, lambda _, tensor: tensor, "5GB")
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), {"left": one, "right": one})


def test_files_of_torch_are_read_with_and_without_mapping(tmp_path):
    torch.save(some_tensors(), tmp_path / "new.bin")
    torch.save(some_tensors(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("new.bin", "old.bin"):
        assert_same_tensors(read_file(tmp_path / name), some_tensors())


@pytest.mark.parametrize("content", [{"step": 3}, [torch.zeros(1)]])
def test_a_file_with_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(ValueError, match="something else than named tensors"):
        read_file(tmp_path / "model.bin")


def test_a_damaged_file_is_refused(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors")
    torch.save(some_tensors(), tmp_path / "model.bin")
    for name in ("model.safetensors", "model.bin"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(ValueError, match=f"{name}' cannot be read as a file of tensors"):
            read_file(path)
