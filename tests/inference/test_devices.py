"""Devices and number formats: sensible when left open, kept or refused when chosen."""

import pytest
import torch

from llava_mini.inference import devices
from llava_mini.inference.devices import SMALL_MODEL, choose_device, choose_dtype

CPU = torch.device("cpu")


def test_the_cpu_is_taken_where_there_is_nothing_faster(monkeypatch):
    monkeypatch.setattr(devices, "_is_available", lambda kind: False)
    assert choose_device(None) == CPU


def test_the_fastest_device_is_taken(monkeypatch):
    monkeypatch.setattr(devices, "_is_available", lambda kind: True)
    assert choose_device(None).type == "cuda"
    monkeypatch.setattr(devices, "_is_available", lambda kind: kind != "cuda")
    assert choose_device(None).type == "mps"


@pytest.mark.parametrize("name", ["gpu", "xla", "cuda:x", ""])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"The devices are cpu, cuda \(or cuda:N\) and mps"):
        choose_device(name)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "_is_available", lambda kind: kind == "cpu")
    with pytest.raises(ValueError, match=r"'cuda' was asked for, but torch .* finds none"):
        choose_device("cuda")


def test_a_card_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "_is_available", lambda kind: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="there are only 2"):
        choose_device("cuda:2")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_cpu_takes_bfloat16_for_large_models_if_it_has_the_instructions(monkeypatch, has_bfloat16):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: has_bfloat16)
    assert choose_dtype(None, CPU, SMALL_MODEL - 1) == torch.float32
    assert choose_dtype(None, CPU, SMALL_MODEL) == (torch.bfloat16 if has_bfloat16 else torch.float32)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_cuda_takes_float16_only_on_cards_without_bfloat16(monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    expected = torch.bfloat16 if has_bfloat16 else torch.float16
    assert choose_dtype(None, torch.device("cuda"), 10**9) == expected


def test_a_chosen_number_format_is_kept():
    assert choose_dtype("float32", torch.device("cuda"), 10**10) == torch.float32
    assert choose_dtype("bfloat16", CPU, 1) == torch.bfloat16


def test_float16_is_never_used_on_a_cpu():
    with pytest.raises(ValueError, match="Take bfloat16"):
        choose_dtype("float16", CPU, 10**10)


def test_an_unknown_number_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        choose_dtype("int4", CPU, 1)


def test_instructions_are_read_from_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)
    assert not devices.cpu_has_bfloat16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert devices.cpu_has_bfloat16()
