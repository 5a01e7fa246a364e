"""The least time that a question can take on a device: what it must multiply, and what it must read.

Both rates are measured where the benchmark runs, by one large product and by one large sum, so a floor says how much
faster the same arithmetic could be at most, not what a data sheet promises.
"""

from dataclasses import dataclass

import torch

from llava_mini.benchmarks.timing import seconds_of
from llava_mini.config import LlavaMiniConfig
from llava_mini.model import cost

SIDE = {"cuda": 8192, "cpu": 3072}
"""Rows and columns of the matrices of the product."""
BYTES = {"cuda": 4 * 2**30, "cpu": 2**30}
"""What is read for the bandwidth."""
ROUNDS = {"cuda": 20, "cpu": 5}
"""Each is measured so often; the fastest counts. A GPU takes a while to reach its pace."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does at best."""

    operations: float
    """Floating-point operations per second of a matrix product."""
    bandwidth: float
    """Bytes read per second from the device's memory."""


@dataclass(frozen=True, kw_only=True)
class Floors:
    """Least seconds."""

    first: float
    """To the first token of the answer to a first question."""
    token: float
    """For each further token."""


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a device with one number format. It should be empty: this takes a few GiB, and gives them back."""
    kind = device.type if device.type in SIDE else "cpu"
    rates = Rates(operations=_operations(kind, device, dtype), bandwidth=_bandwidth(kind, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rates


def _operations(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE[kind]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda: left @ right, device) for _ in range(ROUNDS[kind]))


def _bandwidth(kind: str, device: torch.device) -> float:
    read = torch.zeros(BYTES[kind] // 4, device=device, dtype=torch.float32)
    return BYTES[kind] / min(seconds_of(read.sum, device) for _ in range(ROUNDS[kind]))


def floors(config: LlavaMiniConfig, dtype: str, num_text_tokens: int, rates: Rates) -> Floors:
    """The least time of a question about one image, all weights read once.

    Args:
        config: the model.
        dtype: number format of its weights.
        num_text_tokens: words of the prompt.
        rates: of the device, in that format.
    """
    weights = cost.weight_bytes(config, dtype)
    operations = cost.flops(config, num_text_tokens=num_text_tokens).total
    return Floors(
        first=max(operations / rates.operations, weights.total / rates.bandwidth),
        token=weights.language_model / rates.bandwidth,
    )
