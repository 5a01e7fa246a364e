"""What came out of a study: facts of each row, all of them in ``study.json``, and as a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from llava_mini.config import LlavaMiniConfig
from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.carriers import carriers
from llava_mini.model import cost
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.recipes.run import RECORD
from llava_mini.recipes.study_rows import ROWS, TIME_ROWS, Row
from llava_mini.training.checkpoints import write_text
from llava_mini.training.run_log import read_log

FACTS = "facts.json"
STUDY = "study.json"
GROUPS = ("all", "images", "clips")
"""Scores that are means over kinds of questions."""

Study = Mapping[str, Any]
"""What ``study.json`` holds."""


def row_facts(
    row: Row,
    seed: int,
    model: LlavaMiniForConditionalGeneration,
    processor: LlavaMiniProcessor,
    *,
    folder: Path,
    bench: Bench,
) -> dict[str, Any]:
    """Return what is known of a trained row besides its scores, as plain values.

    Args:
        row: What was trained.
        seed: With which seed.
        model: In evaluation mode.
        processor: The model's.
        folder: Of the run.
        bench: What is asked with tokens or text spoiled.
    """
    lines = read_log(folder / "log.jsonl") if not row.weights_of else []
    curve = [
        {
            "step": line["step"],
            "answer": round(line.get("answer", line["loss"]), 4),
            "right": round(line["right"]["tokens"], 4),
        }
        for line in lines
    ]
    carried, toy = carriers(model, processor, bench), cost_of(model.config)
    return {
        "row": row.name,
        "seed": seed,
        "parameters": toy["parameters"],
        "tokens_per_frame": toy["tokens_per_frame"],
        "toy": toy,
        "full_size": cost_of(row.full_size()),
        "seconds_per_step": round(lines[-1]["seconds"], 3) if lines else 0.0,
        "curve": curve,
        "carriers": {
            way: {
                "right": {kind: round(share, 4) for kind, share in found.right.items()},
                "kept": {kind: round(share, 4) for kind, share in found.kept.items()},
            }
            for way, found in carried.items()
        },
    }


def cost_of(config: LlavaMiniConfig) -> dict[str, int]:
    """Return parameters, tokens of a frame, and operations about one picture with the paper's number of words."""
    return {
        "parameters": cost.parameters(config).total,
        "tokens_per_frame": cost.tokens_of_frame(config),
        "flops_first": cost.flops(config).total,
        "flops_later": cost.later_question_flops(config).total,
        "flops_paper": cost.paper_flops(config).total,
    }


def read_study(output_dir: Path) -> dict[str, Any]:
    """Return what there is of a study: rows in their order, each with the seeds that are done; those about time apart.

    Raises:
        ValueError: The folder holds no study.
    """
    if not (output_dir / "start").exists():
        raise ValueError(f"{str(output_dir)!r} holds no study. Start one with: llava-mini train study --output DIR")
    settings, rows = _rows(output_dir, ROWS)
    return {"settings": settings, "rows": rows, "time": _rows(output_dir, TIME_ROWS)[1]}


def _rows(output_dir: Path, wanted: Sequence[Row]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what is the same for all rows, and what there is of each."""
    rows, settings = [], {}
    for row in wanted:
        seeds = []
        folders = (output_dir / "rows" / row.name).glob("seed-*")
        for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("seed-"))):
            if not (folder / FACTS).exists():
                continue
            record = _read(folder / RECORD)
            of_all = {name: record["settings"][name] for name in ("steps", "questions", "batch", "rate", "dtype")}
            settings = {**of_all, "environment": record["starts"][-1]}
            found = {
                kind: {name: round(value, 4) for name, value in one.items()}
                for kind, one in _read(folder / "scores.json").items()
            }
            seeds.append({"seed": int(folder.name.removeprefix("seed-")), "scores": found, **_read(folder / FACTS)})
        if seeds:
            rows.append({"row": row.name, "shows": row.shows, "from": row.goes_on_from, "seeds": seeds})
    return settings, rows


def write_study(output_dir: Path) -> dict[str, Any]:
    """Write ``study.json`` of what there is, and return it."""
    study = read_study(output_dir)
    write_text(output_dir / STUDY, json.dumps(study, indent=1) + "\n")
    return study


def means_and_spreads(row: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return mean and sample standard deviation over the seeds of a row, by kind and group; None with one seed."""
    seeds = row["seeds"]
    kinds = seeds[0]["scores"]
    values = {kind: [one["scores"][kind]["exact"] for one in seeds] for kind in kinds}
    return {kind: (mean(found), stdev(found) if len(found) > 1 else None) for kind, found in values.items()}


def study_table(study: Study) -> str:
    """Return what there is of a study as lines of text: means over seeds, with their spread, and what rows cost."""
    tables = [_table(rows) for rows in (study["rows"], study["time"]) if rows]
    return "\n\n".join(tables) or "No row is done yet."


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same of rows that are asked the same."""
    columns = ["row", "seeds", "tokens", *GROUPS, "TFLOP at 7B", "s a step"]
    lines = []
    for row in rows:
        found, facts = means_and_spreads(row), row["seeds"][0]
        seconds = mean(one["seconds_per_step"] for one in row["seeds"])
        lines.append(
            [
                row["row"],
                str(len(row["seeds"])),
                str(facts["tokens_per_frame"]),
                *(_share(found.get(group)) for group in GROUPS),
                f"{facts['full_size']['flops_paper'] / 1e12:.2f}",
                f"{seconds:.2f}" if seconds else "",  # without training there is no step
            ]
        )
    kinds = [kind for kind in rows[0]["seeds"][0]["scores"] if kind not in GROUPS and "phrasings" not in kind]
    by_kind = [[row["row"], *(f"{means_and_spreads(row)[kind][0]:.2f}".lstrip("0") for kind in kinds)] for row in rows]
    blind = rows[0]["seeds"][0]["scores"]
    by_kind.append(["blind guess", *(f"{blind[kind]['blind']:.2f}".lstrip("0") for kind in kinds)])
    return f"{_aligned([columns, *lines])}\n\n{_aligned([['row', *kinds], *by_kind])}"


def _share(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ""
    middle, spread = found
    return f"{middle:.3f}" if spread is None else f"{middle:.3f} +- {spread:.3f}"


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    """Cells as columns, the first one aligned to the left."""
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = []
    for name, *numbers in cells:
        right = [number.rjust(width) for number, width in zip(numbers, others, strict=True)]
        lines.append("  ".join([name.ljust(first), *right]))
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
