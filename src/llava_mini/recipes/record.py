"""The record of a run, ``run.json``: what it was, when and where it ran, and how long each phase took."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llava_mini import __version__
from llava_mini.evaluation.environment import environment
from llava_mini.training.checkpoints import write_text
from llava_mini.training.devices import Hardware

LEFT_BY_A_KILL = (".run.json.draft", "tokenizer.json", ".tokenizer.json.draft")
"""Files that may lie in a folder without a record, besides empty folders: a start that was killed can leave them."""


class RunRecord:
    """What ``run.json`` holds. It is written whole after every change.

    Its entries: ``recipe`` and ``settings``, which must be the same at each start; ``starts``, a list with the time,
    versions, commit and hardware of each; ``seconds`` of training in each phase; ``started`` and ``finished``.
    """

    def __init__(self, path: Path, recipe: str, settings: Mapping[str, object], *, resume: bool) -> None:
        """Read the record of a run that goes on, or begin one.

        Args:
            path: Of the file; its folder exists.
            recipe: Name of the recipe.
            settings: Everything that decides what comes out, as plain values for JSON.
            resume: Whether there may be a record already.

        Raises:
            ValueError: If there is one and may not be, or it cannot be read, or it is of another recipe or other
                settings; or if there is none, and the folder holds files of something else.
        """
        self.path = path
        same = json.loads(json.dumps({"recipe": recipe, "settings": settings}))  # as they come back from a file
        self.facts: dict[str, Any] = {**same, "started": _now(), "finished": "", "seconds": {}, "starts": []}
        if not path.exists():
            if any(_is_foreign(other) for other in path.parent.iterdir()):
                raise ValueError(
                    f"{str(path.parent)!r} is not empty and holds no {path.name}, so its files are not of a run. Give "
                    "a new folder."
                )
            return
        if not resume:
            raise ValueError(f"{path.parent} already holds a run. Give an empty folder, or resume it.")
        found = _read(path)
        if {name: found.get(name) for name in same} != same:
            raise ValueError(
                f"{path.parent} holds a run with other settings (see run.json there{_difference(found, same)}). "
                "Give another folder."
            )
        self.facts |= found

    def start(self, hardware: Hardware, dtype: torch.dtype) -> None:
        """Add a start: now, with these versions, on this hardware."""
        ran = environment(hardware.device, dtype)
        entry = {"started": _now(), "llava-mini": __version__, **ran, "workers": hardware.workers}
        self.facts["starts"].append(entry)
        self.write()

    def phase(self, name: str, seconds: float) -> None:
        """Note how long a phase has trained so far, over all starts."""
        self.facts["seconds"][name] = round(seconds, 1)
        self.write()

    def finish(self) -> None:
        """Note that the run is complete."""
        self.facts["finished"] = self.facts["finished"] or _now()
        self.write()

    def write(self) -> None:
        """Write the file."""
        write_text(self.path, json.dumps(self.facts, indent=2) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_foreign(path: Path) -> bool:
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    return path.name not in LEFT_BY_A_KILL and not is_empty_folder


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is damaged: it is not the JSON that a run writes. Restore it, or give another folder."
        )
    return found


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Name the settings that differ, if they can be told apart."""
    before, now = found.get("settings"), expected["settings"]
    if not isinstance(before, dict) or found.get("recipe") != expected["recipe"]:
        return ""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return f"; different: {', '.join(names)}"
