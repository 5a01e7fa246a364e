"""A training state in one safetensors file that is either wholly there or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str | int | float]) -> None:
    """Write tensors and facts under another name, then rename: a kill leaves the old file or the new one.

    Args:
        path: Where the file will be; its folder exists.
        tensors: What to store; shared memory is copied.
        facts: Small values, stored as JSON in the header.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        draft,
        metadata={"facts": json.dumps(facts)},
    )
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.replace(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str | int | float]]:
    """Return the tensors and facts of a file that ``write_checkpoint`` made.

    Raises:
        ValueError: If the file is something else.
    """
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if "facts" not in header:
            raise ValueError(f"{path} is a safetensors file but no checkpoint of a run. Remove it to start anew.")
        names: list[str] = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(header["facts"])


def random_state() -> Tensor:
    """Return the state of torch's random numbers, to be stored."""
    return torch.get_rng_state()
