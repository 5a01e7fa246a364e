"""Where a model runs, and in which number format.

A choice left open is made from the hardware and the size of the model; a choice that was made is
kept, or refused with the reason.
"""

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Number formats by name."""

SMALL_MODEL = 50_000_000
"""Parameters below which float32 answers sooner on a CPU than bfloat16: overhead weighs more than arithmetic."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MOST_INT = -1, -3, 2**31 - 1
"""From glibc's malloc.h."""


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``, or the fastest one there is: CUDA, then Apple's MPS, then the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine or this build of torch does not have it.
    """
    if name is None:
        for kind in ("cuda", "mps"):
            if _is_available(kind):
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"There is no device {name!r}. The devices are cpu, cuda (or cuda:N) and mps.")
    if not _is_available(device.type):
        raise ValueError(
            f"The device {name!r} was asked for, but torch {torch.__version__} finds none. Is the driver, or a build "
            "of torch for it, missing? Leave the device out to take what there is."
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"The device {name!r} was asked for, but there are only {torch.cuda.device_count()}, counted from cuda:0."
        )
    return device


def choose_dtype(name: str | None, device: torch.device, num_parameters: int) -> torch.dtype:
    """The number format called ``name``, or a sensible one for this device and size of model.

    On CUDA bfloat16, or float16 on cards without it; on MPS float16; on a CPU bfloat16 if it has the
    instructions and the model is not small, otherwise float32. float16 is never used on a CPU, where
    it can be a hundred times slower.

    Raises:
        ValueError: there is no such number format, or it does not suit the device.
    """
    if name is not None:
        if name not in DTYPES:
            raise ValueError(f"There is no dtype {name!r}. The dtypes are {', '.join(DTYPES)}.")
        if name == "float16" and device.type == "cpu":
            raise ValueError("float16 is too slow on a CPU to be of use. Take bfloat16 (as small) or float32.")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if num_parameters >= SMALL_MODEL and cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by its own instructions, so that it is faster than float32."""
    read = getattr(torch.cpu, "get_capabilities", None)  # absent from older torch: the slower, safe answer
    found: Mapping[str, Any] = read() if read is not None else {}
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors on the CPU leave, for the next ones. For programs, not libraries.

    glibc gives large blocks back to the system at once and asks for them again, page by page, in the next layer. On
    two cores that is 8 to 11 % of the time of the vision tower at full size, and what the process holds at most grows
    by about a tenth of what it holds beside the weights.

    Returns:
        Whether it could: only Linux with glibc has this.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        change = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(change(option, _MOST_INT) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))


def _is_available(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    return True
