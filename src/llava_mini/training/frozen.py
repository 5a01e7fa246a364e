"""What does not train: no checkpoint holds it, and each knows it when it sees it again.

A model that goes on is built as it was at first, so what is frozen comes from where it came from then, and a checkpoint
adds what was learned. Digests of all frozen tensors tell whether they are still those beside which it was learned.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_mini.training.checkpoints import Facts, buffer_names, weights_of

FROZEN = "frozen"
"""Name of the digests among the facts of a checkpoint."""


def frozen_digests(module: nn.Module, learned: Collection[str]) -> dict[str, str]:
    """Return what tells the weights of a module that do not train from others, by part: the beginning of their names.

    Everything is read once, in several threads.

    Args:
        module: Whole, in the number format in which it was built.
        learned: Names of what trains, as in ``weights_of``.
    """
    moving = {*learned, *buffer_names(module)}
    frozen = {name: value for name, value in sorted(weights_of(module).items()) if name not in moving}
    parts: dict[str, list[bytes]] = {}
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(frozen, pool.map(_digest, frozen.values()), strict=True):
            parts.setdefault(name.split(".")[1], []).append(name.encode() + digest)
    return {part: blake2b(b"".join(found), digest_size=16).hexdigest() for part, found in parts.items()}


def check_frozen(path: Path, facts: Facts, present: Mapping[str, str]) -> None:
    """Refuse to add a checkpoint to other frozen weights than those beside which it was learned.

    Args:
        path: Of the checkpoint.
        facts: Of it.
        present: Digests of what is frozen here.

    Raises:
        ValueError: If some digests differ.
    """
    stored = facts[FROZEN]
    if differing := sorted(part for part in {*stored, *present} if stored.get(part) != present.get(part)):
        raise ValueError(
            f"{path} was learned beside other frozen weights than those that are here, in {', '.join(differing)}. "
            "Was the model replaced that the run started from? Restore it, or give an empty folder."
        )


def check_version(path: Path, facts: Facts) -> None:
    """Refuse a checkpoint of an earlier version.

    Raises:
        ValueError: If it does not tell what was frozen.
    """
    if FROZEN not in facts:
        raise ValueError(
            f"{path} was written by an earlier version, whose checkpoints held frozen weights too. Finish the run with "
            "that version, or start it anew in an empty folder."
        )


def _digest(tensor: Tensor) -> bytes:
    found = blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    found.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return found.digest()
