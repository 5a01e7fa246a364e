"""Adapters: tensors that replace those of a base model, and low-rank updates that are added to them.

``mm_projector.bin`` (projector, and for LLaVA-Mini reducer and pre-fusion), ``non_lora_trainables.bin``
(the same, saved beside a LoRA), and PEFT's own files.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_mini.checkpoint.from_original import Renamings, rename
from llava_mini.checkpoint.tensors import holds_weights, read_file, read_json

REPLACEMENTS = ("mm_projector.bin", "non_lora_trainables.bin")
PEFT_CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "alpha_pattern", "layer_replication")
_LOW_RANK = re.compile(r"\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of one weight."""

    down: Tensor
    """[rank, in]."""
    up: Tensor
    """[out, rank]."""
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """The updated weight [out, in], in its own dtype; the sum is made in float32."""
        return (weight.float() + self.scale * (self.up.float() @ self.down.float())).to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds, under our names."""

    replaced: dict[str, Tensor]
    updates: dict[str, LowRank]
    base: str
    """What PEFT's configuration names as the base model; empty if nothing does."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    files = (PEFT_CONFIG, *REPLACEMENTS)
    return any((folder / file).exists() for file in files) and not holds_weights(folder)


def read_adapter(folder: Path, renamings: Renamings) -> Adapter:
    """Read every adapter file of a folder.

    Raises:
        ValueError: a file is damaged, or the adapter is of a kind that cannot be merged.
    """
    replaced: dict[str, Tensor] = {}
    for file in REPLACEMENTS:
        if (folder / file).exists():
            replaced |= {rename(_strip(name), renamings): value for name, value in read_file(folder / file).items()}
    if not (folder / PEFT_CONFIG).exists():
        return Adapter(replaced, {}, "")

    peft = read_json(folder / PEFT_CONFIG)
    kind = peft.get("peft_type", "LORA")
    unsupported = [name for name in _UNSUPPORTED if peft.get(name)]
    if kind != "LORA" or unsupported:
        raise ValueError(
            f"The adapter {str(folder)!r} is of the kind {' with '.join([kind, *unsupported])}, which convert cannot "
            "merge. Merge it with PEFT (merge_and_unload) and save the model."
        )
    file = next((folder / file for file in PEFT_FILES if (folder / file).exists()), None)
    if file is None:
        raise ValueError(f"{str(folder)!r} has {PEFT_CONFIG} but neither of {', '.join(PEFT_FILES)}.")
    sides: dict[str, dict[str, Tensor]] = {}
    for name, value in read_file(file).items():
        if found := _LOW_RANK.search(name):
            target = rename(_strip(name[: found.start()]) + ".weight", renamings)
            sides.setdefault(target, {})[found["side"]] = value
        elif "lora_" in name:
            raise ValueError(
                f"The adapter {str(folder)!r} holds {name!r}, which convert cannot merge. Merge it with PEFT "
                "(merge_and_unload) and save the model."
            )
        else:
            replaced[rename(_strip(name), renamings)] = value
    if halves := [target for target, pair in sides.items() if len(pair) < 2]:
        raise ValueError(f"The adapter {str(folder)!r} holds only one of two matrices for {', '.join(halves[:10])}.")
    updates = {
        target: LowRank(pair["A"], pair["B"], _scale(peft, rank=pair["A"].shape[0])) for target, pair in sides.items()
    }
    return Adapter(replaced, updates, peft.get("base_model_name_or_path") or "")


def _scale(peft: dict[str, Any], rank: int) -> float:
    """What PEFT multiplies an update with."""
    return peft.get("lora_alpha", 8) / (math.sqrt(rank) if peft.get("use_rslora") else rank)


def _strip(name: str) -> str:
    """The name that PEFT wrapped."""
    return name.removeprefix("base_model.model.")
