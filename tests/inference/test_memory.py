"""The estimate of memory, and the refusal of what cannot fit."""

import pytest
import torch

from llava_mini.config import preset
from llava_mini.inference import memory
from llava_mini.inference.memory import (
    MemoryNeed,
    available_memory,
    check_memory,
    fitting_frames,
    memory_need,
    meta_model,
)
from tests.tiny_models import tiny_config, tiny_model


def test_a_meta_model_takes_no_memory_and_has_every_parameter():
    real, empty = tiny_model(), meta_model(tiny_config())
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimated_weights_are_the_bytes_of_the_real_ones(dtype):
    real = tiny_model().to(dtype)
    assert memory_need(meta_model(tiny_config()), dtype).weights == sum(p.nbytes for p in real.parameters())


def test_the_released_model_needs_what_its_files_take():
    need = memory_need(meta_model(preset("llava-mini-llama-3.1-8b")), torch.bfloat16)
    assert need.weights == 2 * (8_927_893_504 + 303_507_456)
    assert 0 < need.working < 0.2 * need.weights


def test_8_bit_weights_save_a_byte_for_each_weight_of_the_language_models_layers():
    model = meta_model(preset("llava-mini-llama-3.1-8b"))
    linear = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 4096 * 14336 * 3)
    saved = memory_need(model, torch.bfloat16).weights - memory_need(model, torch.bfloat16, "int8").weights
    assert saved == linear


def test_more_frames_at_a_time_need_more():
    model = meta_model(preset("llava-mini-vicuna-7b"))
    few, many = (memory_need(model, torch.bfloat16, frames=frames) for frames in (4, 16))
    assert few.weights == many.weights
    assert few.working < many.working


def test_as_many_frames_go_through_as_fit():
    model = meta_model(preset("llava-mini-vicuna-7b"))
    eight = memory_need(model, torch.bfloat16, frames=8).total
    assert fitting_frames(model, torch.bfloat16, None, None) == model.frames_per_pass == 16
    assert fitting_frames(model, torch.bfloat16, None, eight) == 8
    assert fitting_frames(model, torch.bfloat16, None, eight - 1) == 4
    assert fitting_frames(model, torch.bfloat16, None, 0) == 1


def test_what_fits_is_not_refused_and_neither_is_what_cannot_be_known():
    need = MemoryNeed(weights=90, working=10)
    check_memory("m", need, 100, "cpu", {})
    check_memory("m", need, None, "cpu", {})


def test_a_refusal_names_the_need_what_is_free_and_what_would_help():
    need = MemoryNeed(weights=int(36e9), working=int(4e9))
    others = {
        "dtype bfloat16": MemoryNeed(weights=int(18e9), working=int(2e9)),
        "quantization int8": MemoryNeed(weights=int(11e9), working=int(2e9)),
        "dtype float64": MemoryNeed(weights=int(72e9), working=int(8e9)),
    }
    with pytest.raises(ValueError, match="but 15") as refusal:
        check_memory("a/model", need, int(15e9), "cpu in float32", others)
    assert str(refusal.value) == (
        "The model 'a/model' needs about 40.0 GB (36.0 GB of weights) on cpu in float32, but 15.0 GB are free. "
        "Options: dtype bfloat16 (20.0 GB, still too much); quantization int8 (13.0 GB); another device; a smaller "
        "model."
    )


def test_free_memory_is_at_most_what_the_container_may_have(monkeypatch):
    monkeypatch.setattr(memory, "_free_by_system", lambda: 1000)
    monkeypatch.setattr(memory, "_free_by_cgroup", lambda: 300)
    assert available_memory(torch.device("cpu")) == 300
    monkeypatch.setattr(memory, "_free_by_cgroup", lambda: None)
    assert available_memory(torch.device("cpu")) == 1000
    monkeypatch.setattr(memory, "_free_by_system", lambda: None)
    assert available_memory(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("folder", "names", "droppable"),
    [
        ("", ("memory.max", "memory.current"), "inactive_file"),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_a_containers_limit_is_read_and_files_it_can_drop_do_not_count(monkeypatch, tmp_path, folder, names, droppable):
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in zip((*names, "memory.stat"), ("1000\n", "700\n", f"anon 500\n{droppable} 200\n"), strict=True):
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._free_by_cgroup() == 500


def test_a_container_without_a_limit_limits_nothing(monkeypatch, tmp_path):
    for name, text in {"memory.max": "max\n", "memory.current": "7\n", "memory.stat": "inactive_file 1\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._free_by_cgroup() is None
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "nothing")
    assert memory._free_by_cgroup() is None
