"""Devices and number formats: sensible when left open, kept or refused when chosen."""

import platform
import subprocess
import sys

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_a_program_keeps_the_memory_that_tensors_leave_if_it_asks_for_it():
    program = (
        "import resource, sys, torch\n"
        "from llava_mini.inference.devices import keep_freed_memory\n"
        "asked = sys.argv[1] == 'ask' and keep_freed_memory()\n"
        "tensor = torch.ones(2**26)\n"  # 256 MiB
        "del tensor\n"
        "print(asked, int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize())\n"
    )
    found = {}
    for word in ("ask", "leave"):
        done = subprocess.run([sys.executable, "-c", program, word], capture_output=True, text=True, check=True)
        found[word] = done.stdout.split()
    assert [asked for asked, _ in found.values()] == ["True", "False"]
    assert int(found["ask"][1]) - int(found["leave"][1]) > 2**27
