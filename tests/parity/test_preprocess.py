"""The preprocessing check sees a wrong number in every file, and a file or entry that it has no rule for."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity import preprocess

FIXTURES = Path(__file__).parent / "fixtures"


def change_image(folder: Path) -> None:
    path = folder / "images.npz"
    arrays = dict(np.load(path))
    arrays["img0_pad"][0, 0, 0] += 1e-3
    np.savez(path, **arrays)


def change_json(name: str, *keys: Any, value: Any):
    def change(folder: Path) -> None:
        path = folder / f"{name}.json"
        about = entry = json.loads(path.read_text())
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value
        path.write_text(json.dumps(about))

    return change


CHANGES = {
    "a pixel": (change_image, "images/img0_pad"),
    "an unknown array": (lambda folder: np.savez(folder / "images.npz", **extra_array(folder)), "images/img0_new"),
    "a part": (change_json("images", "items", 0, "split2", 0, "sum", value=0), "images/img0_split2"),
    "a frame": (change_json("video", "clips", 0, "fixed8", "indices", 0, value=0), "video/250_frames_at_25_fixed8"),
    "a choice without a rule": (change_json("video", "clips", 0, "random", value={}), "video/250_frames_at_25_random"),
    "a prompt": (change_json("prompts", "items", 0, "prompt", value="x"), "prompts/00_llava_v1_question"),
    "an id": (
        change_json("tokenize_image_token", "items", 0, "ids", 0, value=1),
        "tokenize_image_token/00_llama3_tiny",
    ),
    "a label": (
        change_json("label_masks", "items", 0, "labels", -20, value=5),
        "label_masks/00_llama_3_1_image_labels",
    ),
    "a template": (change_json("label_masks", "items", 0, "template", value="new"), "label_masks/00_new_image"),
    "an item": (
        change_json("dataset_items", "items", 0, "input_ids", 3, value=1),
        "dataset_items/00_llama3_tiny_ratio1_a_ids",
    ),
    "a sum": (
        change_json("dataset_items", "items", 1, "image_mean", value=0),
        "dataset_items/01_llama3_tiny_ratio1_b_sums",
    ),
    "a new file": (lambda folder: (folder / "new.json").write_text("{}"), "preprocess/new.json"),
    "a missing file": (lambda folder: (folder / "video.json").unlink(), "video"),
}


def extra_array(folder: Path) -> dict[str, np.ndarray]:
    return {**np.load(folder / "images.npz"), "img0_new": np.zeros(1)}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_a_change_in_any_file_is_seen(change, name, tmp_path):
    for part in ("preprocess", "tokenizers"):
        shutil.copytree(FIXTURES / part, tmp_path / part)
    change(tmp_path / "preprocess")
    assert [result.name for result in preprocess.check(tmp_path) if not result.passed] == [name]


def test_nothing_is_said_twice_and_every_difference_has_a_reason():
    results = list(preprocess.check(FIXTURES))
    assert len({result.name for result in results}) == len(results) > 300
    assert all(result.error == 0 or result.tolerance > 0 for result in results)
