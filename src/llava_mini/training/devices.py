"""Where training runs: the device, how many threads and processes help it, and what is moved there."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from llava_mini.inference.devices import choose_device

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a run may use. None of it changes the batches; results of two devices differ by rounding."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    """CPU threads of a matrix product. With small matrices on busy cores, two were 3 to 4 times slower than one."""
    workers: int = 0
    """Processes that make batches. 0: one thread of this process, enough beside training on a CPU."""

    def __post_init__(self) -> None:
        if self.threads < 1 or self.workers < 0:
            raise ValueError(
                f"A run needs at least 1 thread and 0 or more workers, got {self.threads} thread(s) and {self.workers} "
                "worker(s)."
            )

    def prepare(self) -> None:
        """Set the threads of torch, and full float32 precision on a GPU."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in place. On a GPU attention runs in fused kernels."""
        module.to(self.device)
        if self.device.type == "cuda":
            fuse_attention(module)


def choose_hardware(device: str | None = None, threads: int | None = None, workers: int | None = None) -> Hardware:
    """Return what was asked for, and what suits the machine where nothing was.

    Args:
        device: cpu, cuda or cuda:N. None: a GPU if there is one.
        threads: None: 1.
        workers: None: none on a CPU, all cores but one beside a GPU (at most 16).

    Raises:
        ValueError: If there is no such device, or a number is too small.
    """
    chosen = choose_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"Training runs on cpu and cuda, but device={device!r} was asked for. Take one of them.")
    if workers is None:
        workers = 0 if chosen.type == "cpu" else min(max((os.cpu_count() or 1) - 1, 1), 16)
    return Hardware(device=chosen, threads=1 if threads is None else threads, workers=workers)


def require_flash_attention(device: torch.device, dtype: torch.dtype) -> None:
    """See whether the kernels of flash attention 2 can run.

    Raises:
        ValueError: They cannot compute on this device or in this number format, or are not installed.
    """
    advice = "Leave --attention out: sdpa has fused kernels of its own."
    if device.type != "cuda":
        raise ValueError(f"flash_attention_2 runs on a GPU alone, but this training runs on {device.type}. {advice}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLASH_CAPABILITY:
        raise ValueError(
            f"flash_attention_2 needs a GPU of compute capability {'.'.join(map(str, _FLASH_CAPABILITY))} (Ampere) or "
            f"later, but this one has {'.'.join(map(str, capability))}. {advice}"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"flash_attention_2 computes in 16 bits alone, but this training in {dtype}. {advice}")
    if not is_flash_attn_2_available():
        raise ValueError(
            "flash_attention_2 needs the package flash-attn, 2.3.3 or later, which is not installed: pip install "
            f"flash-attn. {advice}"
        )


_FLASH_CAPABILITY = (8, 0)


def fuse_attention(module: nn.Module) -> None:
    """Let all transformers models in a module compute attention in fused kernels; one that was chosen stays."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation == "eager":
            part.set_attn_implementation("sdpa")


def to_device(value: Value, device: torch.device) -> Value:
    """Return a batch with all its tensors on a device; arrays become tensors.

    Args:
        value: A tensor or array, or dataclasses, mappings, tuples and lists of them. Other values stay as they are.
        device: Where to.
    """
    return _moved(value, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: _moved(getattr(value, part.name), device) for part in fields(value)})
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device) for part in value)
    return value
