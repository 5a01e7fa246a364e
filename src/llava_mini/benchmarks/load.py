"""From nothing to an answer: what a cold process of the embedded model spends before it speaks, and after.

Question: how long does somebody wait who types a command, and who asks again?
Expected: help comes at once, for it imports nothing heavy; imports, not weights, are most of the way to a first
          answer; a repeated answer takes a fraction of it.
Run:      llava-mini bench load

Each repeat starts new processes. The files they read are in the system's cache from the second repeat on.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llava_mini.benchmarks.processes import fresh, fresh_result
from llava_mini.benchmarks.report import Report, Table, told
from llava_mini.benchmarks.timing import take_turns
from llava_mini.evaluation.environment import environment
from llava_mini.inference.devices import choose_device

_HELP = """
import llava_mini_cli
try:
    llava_mini_cli.main(["--help"])
except SystemExit as end:
    sys.exit(end.code)
"""
_ANSWER = """
import json, time, warnings
warnings.simplefilter("ignore")
times, since = {}, time.perf_counter()
def lap(name):
    global since
    now = time.perf_counter()
    times[name] = now - since
    since = now
import torch
lap("import torch")
import transformers
lap("import transformers")
from llava_mini import Engine
lap("import llava_mini")
engine = Engine.load("tiny", sys.argv[1])
lap("load the model")
from PIL import Image, ImageDraw
picture = Image.new("RGB", (384, 384), (150, 160, 155))
ImageDraw.Draw(picture).ellipse((40, 50, 150, 160), fill=(200, 30, 30))
since = time.perf_counter()
for name in ("first answer", "second answer", "third answer"):
    answer = engine.ask("How many things are there?", [picture], max_tokens=8)
    lap(name)
ImageDraw.Draw(picture).rectangle((210, 60, 340, 300), fill=(30, 60, 200))
since = time.perf_counter()
engine.ask("How many things are there?", [picture], max_tokens=8)
lap("another picture")
for _ in range(10):
    since = time.perf_counter()
    engine.ask("How many things are there?", [picture], max_tokens=8)
lap("repeated answer")
print(json.dumps({"seconds": times, "answer_tokens": answer.stats.answer_tokens}))
"""
STEPS = {
    "start python": "an empty program, start to end",
    "help": "llava-mini --help, start to end",
    "import torch": "in the process that answers",
    "import transformers": "",
    "import llava_mini": "with what else it needs",
    "load the model": "the embedded one",
    "first answer": "one picture, up to 8 tokens",
    "second answer": "the same question",
    "third answer": "",
    "another picture": "a first answer again, in a process that has answered before",
    "repeated answer": "the same about that picture, the tenth time",
    "whole process": "start to end, with all answers",
}
"""What is timed, in the order in which it happens."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How often, and where."""

    device: str | None = None
    """None: the fastest there is."""
    repeats: int = 5
    """Processes of each kind."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}.")


def run(settings: Settings) -> Report:
    """Start the processes, in turns.

    Raises:
        ValueError: there is no such device, or a process failed.
    """
    device = choose_device(settings.device)

    def answer() -> dict[str, Any]:
        found, seconds = fresh_result(_ANSWER, str(device))
        return {**found, "seconds": {**found["seconds"], "whole process": seconds}}

    calls = {"start python": lambda: fresh("pass")[1], "answer": answer}
    if importlib.util.find_spec("tyro") is not None:  # what the command line is made of
        calls["help"] = lambda: fresh(_HELP)[1]
    found = take_turns(calls, warmup=0, repeats=settings.repeats)
    answers = found.pop("answer")
    seconds = {
        name: found[name] if name in found else [one["seconds"][name] for one in answers]
        for name in STEPS
        if name in found or name in answers[0]["seconds"]
    }
    results = {"seconds": seconds, "answer_tokens": answers[0]["answer_tokens"]}
    return Report(
        bench="load",
        environment=environment(device, torch.float32),
        settings={**vars(settings), "device": str(device)},
        results=results,
        tables=tables(results, settings),
    )


def tables(results: Mapping[str, Any], settings: Settings) -> list[Table]:
    """Put results into words."""
    seconds = results["seconds"]
    return [
        Table(
            title=f"Seconds in new processes, median (quartiles) of {settings.repeats}",
            columns=("step", "seconds", "what"),
            left=("what",),
            rows=[
                (name, told(seconds[name], 3) if name in seconds else "tyro is missing", what)
                for name, what in STEPS.items()
                if name in seconds or name == "help"
            ],
        )
    ]
