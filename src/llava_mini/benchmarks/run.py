"""Benchmarks by name: each is a module with ``Settings`` and a ``run`` that takes them and gives a ``Report``."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import fields

from llava_mini.benchmarks.report import Report, tupled
from llava_mini.inference.devices import keep_freed_memory

BENCHMARKS: tuple[str, ...] = ("flops", "latency", "video", "memory", "train", "decode", "load")
"""Names, which are those of modules in this folder."""


def run_benchmark(name: str, given: Mapping[str, object]) -> Report:
    """Run one benchmark.

    Args:
        name: one of ``BENCHMARKS``.
        given: its settings by name; those that are left out have their defaults.

    Raises:
        ValueError: there is no such benchmark, or it has no such setting, or a setting cannot be.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}. The benchmarks are: {', '.join(BENCHMARKS)}.")
    module = importlib.import_module(f"{__package__}.{name}")
    known = [field.name for field in fields(module.Settings)]
    for setting in given:
        if setting not in known:
            flags = ", ".join(_flag(one) for one in known) or "none"
            raise ValueError(f"The benchmark {name} has no {_flag(setting)}. Its settings are: {flags}.")
    settings = module.Settings(**given)
    keep_freed_memory()  # as every command does that loads a model
    return module.run(settings)


def read_report(line: str) -> Report:
    """Make a report of the line of JSON that it gave.

    Raises:
        ValueError: it is no line of a benchmark.
    """
    try:
        facts = json.loads(line)
        module = importlib.import_module(f"{__package__}.{facts['bench']}")
        settings = module.Settings(**tupled(facts["settings"]))
        tables = module.tables(facts["results"], settings)
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"This is not what a benchmark of this version wrote: {error}") from error
    return Report(**facts, tables=tables)


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
