from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from llava_mini.training import devices
from llava_mini.training.devices import (
    Hardware,
    choose_hardware,
    fuse_attention,
    require_flash_attention,
    to_device,
)
from tests.tiny_models import IMAGE_TOKEN, pixels, tiny_model


@dataclass(frozen=True, kw_only=True)
class Pictures:
    pixels: np.ndarray
    labels: dict[str, torch.Tensor]
    sources: tuple[torch.Tensor | None, ...] = ()
    name: str = "page"


def test_everything_in_a_batch_is_moved():
    batch = Pictures(
        pixels=np.zeros((2, 3), dtype=np.uint8), labels={"shape": torch.ones(2)}, sources=(torch.ones(1), None)
    )
    moved = to_device(batch, torch.device("meta"))
    assert moved.pixels.device.type == moved.labels["shape"].device.type == moved.sources[0].device.type == "meta"
    assert (moved.pixels.shape, moved.pixels.dtype) == ((2, 3), torch.uint8)
    assert (moved.sources[1], moved.name) == (None, "page")


def test_a_cpu_gets_one_thread_and_no_processes():
    assert choose_hardware("cpu") == Hardware(device=torch.device("cpu"), threads=1, workers=0)
    assert choose_hardware("cpu", threads=2, workers=3) == Hardware(threads=2, workers=3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"device": "cpu", "threads": 0}, "at least 1 thread"),
        ({"device": "cpu", "workers": -1}, "0 or more workers"),
    ],
)
def test_hardware_that_is_not_there_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        choose_hardware(**arguments)


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        Hardware(threads=3).prepare()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_fused_attention_gives_the_same_losses_and_reaches_every_part():
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = {
        "input_ids": torch.tensor([[1, IMAGE_TOKEN, 5, 6, 7]]),
        "pixel_values": pixels(model.config, 1),
        "labels": torch.tensor([[-100, -100, -100, 6, 7]]),
    }
    before = model(**inputs).loss
    fuse_attention(nn.ModuleList([model]))
    torch.testing.assert_close(model(**inputs).loss, before)
    layer = model.language_model.model.layers[0].self_attn
    assert {layer.config._attn_implementation, model.vision_tower.config._attn_implementation} == {"sdpa"}


def test_a_fused_kernel_that_was_chosen_stays():
    model = tiny_model()
    model.language_model.config._attn_implementation = "flash_attention_2"
    fuse_attention(model)
    assert model.language_model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "is_installed", "words"),
    [
        ("cpu", (9, 0), torch.bfloat16, True, "runs on a GPU alone, but this training runs on cpu"),
        ("cuda", (7, 5), torch.bfloat16, True, r"needs a GPU of compute capability 8.0 \(Ampere\) or later.* has 7.5"),
        ("cuda", (9, 0), torch.float32, True, "computes in 16 bits alone, but this training in torch.float32"),
        ("cuda", (9, 0), torch.bfloat16, False, "pip install flash-attn"),
    ],
)
def test_flash_attention_is_refused_where_it_cannot_run(monkeypatch, kind, capability, dtype, is_installed, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(devices, "is_flash_attn_2_available", lambda: is_installed)
    with pytest.raises(ValueError, match=words):
        require_flash_attention(torch.device(kind), dtype)


def test_flash_attention_is_let_through_where_it_can_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(devices, "is_flash_attn_2_available", lambda: True)
    require_flash_attention(torch.device("cuda"), torch.bfloat16)
