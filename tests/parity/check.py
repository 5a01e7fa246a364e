"""Reproduce a folder of parity fixtures: ``python -m tests.parity.check FOLDER``.

Every case and preprocessing file goes through the public API. One line per case with its largest
error; with ``--all`` one line per number. The exit status is 1 if any error is above its tolerance.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.checkpoint.from_original import rename as rename_released
from tests.parity import cases, preprocess
from tests.parity.result import Result

TOWER = {"CLIP ViT-L/14 at 336": "openai/clip-vit-large-patch14-336"}


def check(folder: Path) -> Iterator[Result]:
    """All results of a folder: models, preprocessing, full-size keys, adapter formats."""
    yield from cases.check(folder)
    yield from preprocess.check(folder)
    for path in sorted(folder.glob("checkpoint_keys_*.json")):
        yield from _guarded(path.stem, lambda path=path: iter([check_keys(path)]))
    adapters = folder / "adapter_formats.json"
    if adapters.exists():
        yield from _guarded(adapters.stem, lambda: check_adapters(json.loads(adapters.read_text()), folder))


def _guarded(name: str, results: Callable[[], Iterator[Result]]) -> Iterator[Result]:
    """Results, or a failed one that names what could not be read."""
    try:
        yield from results()
    except (OSError, ValueError, KeyError) as error:
        yield Result(name, float("inf"), 0, f"{type(error).__name__}: {error}")


def check_keys(path: Path) -> Result:
    """The full-size names and shapes, against a model on the meta device."""
    stored = json.loads(path.read_text())
    names = {**stored["tensors"], **stored["vision_tower_tensors"]}
    config = {"model_type": "llava_mini_llama", "mm_vision_tower": TOWER[stored["config_used"]["vision"]]}
    with torch.device("meta"):
        model = LlavaMiniForConditionalGeneration(LlavaMiniConfig.from_dict({**config, **stored["config_used"]}))
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    renamed = {rename_released(name): list(shape) for name, shape in names.items()}
    wrong = sorted(name for name in ours.keys() | renamed.keys() if ours.get(name) != renamed.get(name))
    return Result(
        path.stem, float(len(wrong)), 0, f"{len(names)} tensors" + (f"; differ: {wrong[:5]}" if wrong else "")
    )


def check_adapters(stored: dict[str, Any], folder: Path) -> Iterator[Result]:
    """Names and shapes inside adapter files are the front end of one of the folder's models."""
    front_ends = []
    for path in sorted(one for one in (folder / "models").iterdir() if one.is_dir()):
        model = cases.load_model(path)
        parts = ("projector.", "reducer.", "prefusion.")
        front_ends.append({n: list(v.shape) for n, v in model.state_dict().items() if n.startswith(parts)})
    adapter = {rename_released(name): shape for name, shape in stored["mm_projector_bin_final"].items()}
    yield Result(
        "adapter_formats/mm_projector_bin_final", float(adapter not in front_ends), 0, f"{len(adapter)} tensors"
    )
    start = {f"model.prefusion_layers.{n}": shape for n, shape in stored["pretrain_prefusion_expected_keys"].items()}
    start = {rename_released(name): shape for name, shape in start.items()}
    fits = any({n: s for n, s in front.items() if n.startswith("prefusion.")} == start for front in front_ends)
    yield Result("adapter_formats/pretrain_prefusion", float(not fits), 0, f"{len(start)} tensors")
    for name, entry in stored.items():
        if isinstance(entry, dict) and "non_lora_trainables" in entry:
            plain = {n.removeprefix("base_model.model."): s for n, s in entry["non_lora_trainables"].items()}
            renamed = {rename_released(n): shape for n, shape in plain.items()}
            fits = any(renamed.items() <= front.items() for front in front_ends)
            yield Result(f"adapter_formats/{name}", float(not fits), 0, f"{len(renamed)} tensors beside LoRA")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="one line for every number")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    by_case: dict[str, list[Result]] = defaultdict(list)
    for result in check(arguments.folder):
        by_case[result.name if arguments.all else result.name.split("/")[0]].append(result)
    failed = 0
    for name, results in by_case.items():
        bad = [result for result in results if not result.error <= result.tolerance]
        failed += bool(bad)
        worst = max(result.error for result in results)
        notes = "; ".join(sorted({result.note for result in results if result.note}))
        print(f"{'FAIL' if bad else 'ok':4}  {name:55} {len(results):3} checks  largest error {worst:.1e}  {notes}")
        for result in bad:
            print(f"        {result.name}: {result.error:.3e} above {result.tolerance:.1e}  {result.note}")
    print(f"{len(by_case) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
