"""Folders of small models in foreign layouts, made from the parity fixtures."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
RELEASED = FIXTURES / "models" / "llama_c1"
TOWER = "model.vision_tower.vision_tower.vision_model."


def released_tensors(folder: Path = RELEASED) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def copy_released(destination: Path, tensors: Mapping[str, Tensor] | None = None, source: Path = RELEASED) -> Path:
    """A released model's folder, with other tensors if they are given."""
    destination.mkdir(parents=True)
    for name in ("config.json", "vision_config.json"):
        shutil.copyfile(source / name, destination / name)
    write_tensors(destination, released_tensors(source) if tensors is None else tensors)
    return destination


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], num_shards: int = 1) -> None:
    """Write tensors as one safetensors file, or as shards with an index."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for place in range(num_shards):
        file = f"model-{place + 1:05}-of-{num_shards:05}.safetensors"
        part = names[place::num_shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in the safetensors files of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert left, "there is nothing to compare"
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
