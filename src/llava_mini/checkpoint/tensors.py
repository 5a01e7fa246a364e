"""Tensors in files: mapped into memory, read when they are written elsewhere.

Opening a folder of any size takes no memory: safetensors and ``torch.load(mmap=True)`` map the
files. Pages are read when a tensor is used, and are given back when the last tensor of its file is
dropped, which ``write_shards`` does shard by shard.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)


def holds_weights(folder: Path) -> bool:
    """Whether ``read_folder`` would find the weights of a model."""
    return any((folder / name).exists() for name in SINGLE_FILES + INDEX_FILES)


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration or an index.

    Raises:
        ValueError: the file is absent or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read. Is {str(path.parent)!r} the folder of a model?") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}). Is the download complete?") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{str(path)!r} holds a {type(content).__name__} instead of named values. Is it the right file?"
        )
    return content


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder, mapped: one file or shards with an index, safetensors before ``.bin``.

    Raises:
        ValueError: there are no weights, or a shard is absent or damaged.
    """
    for name, index_name in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / index_name).exists():
            shards = sorted(set(read_json(folder / index_name).get("weight_map", {}).values()))
            if absent := [shard for shard in shards if not (folder / shard).exists()]:
                raise ValueError(
                    f"{str(folder / index_name)!r} names {len(shards)} shards, of which {', '.join(absent)} are "
                    "absent. Is the download complete?"
                )
            return {key: tensor for shard in shards for key, tensor in read_file(folder / shard).items()}
        if (folder / name).exists():
            return read_file(folder / name)
    raise ValueError(
        f"{str(folder)!r} holds no weights: expected {SINGLE_FILES[0]}, {SINGLE_FILES[1]}, or shards with an index."
    )


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, mapped. A ``.bin`` file is opened without running any code that it may hold.

    Raises:
        ValueError: the file is damaged, or holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  a file, not a dictionary
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{str(path)!r} cannot be read as a file of tensors ({reason}). Is the download "
            "complete, and does it come from a source you trust?"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{str(path)!r} holds something else than named tensors. Is it a checkpoint of training?")
    return content


def write_shards(
    tensors: dict[str, Tensor], folder: Path, finish: Callable[[str, Tensor], Tensor], max_shard_size: int | str
) -> None:
    """Write safetensors shards, with an index if there are several, and empty ``tensors`` on the way.

    Memory holds at most one shard at a time.

    Args:
        tensors: names and mapped tensors, in the order of their files.
        folder: where to.
        finish: what to do with each tensor when its turn comes.
        max_shard_size: bytes, or as in "5GB".
    """
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            tensor = finish(name, tensors.pop(name)).contiguous()
            shared = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
            shard[name] = tensor.clone() if shared else tensor
        save_file(shard, folder / file, metadata={"format": "pt"})
        share(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILES[0]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def size_in_bytes(tensors: dict[str, Tensor]) -> int:
    """What the tensors take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def share(path: Path) -> None:
    """Give a file that safetensors made for its owner only the rights of any other new file."""
    umask = os.umask(0o022)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
