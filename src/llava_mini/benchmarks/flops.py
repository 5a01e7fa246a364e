"""Operations from the configuration alone: the paper's count, the first question, and a later one.

Question: what does an answer's first token cost, in operations, and where do they go?
Expected: the paper's totals by the paper's counting (its misprints named); less of them for a first question
          here, because no row is computed that nobody reads; and hardly any for a later question about the same
          image, whose vision is kept.
Run:      llava-mini bench flops --size 7b
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llava_mini.benchmarks.report import Report, Table
from llava_mini.benchmarks.sizes import changed, size_config
from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.evaluation.environment import environment
from llava_mini.model import cost

GOALS: Mapping[str, float] = {"first question": 1.70, "later question, before the language model": 0.08}
"""What this project wants to stay below with LLaVA-Mini at 7B, one token and 43 text tokens, in T."""

KEPT = (0, 23, 31)
"""Tokens of the text before the image that a later question need not run again; the others are its own."""

PAPER_KEPT = 23
"""The same for the models of the paper's tables."""


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A number of the paper, and the model it is about."""

    table: str
    model: str
    fields: Mapping[str, Any]
    printed: float
    """In T."""
    note: str = ""
    """What is wrong with it."""


PAPER: tuple[Printed, ...] = (
    Printed(table="14", model="LLaVA-v1.5", fields={"reducer": "identity", "prefusion_num_layers": 0}, printed=8.55),
    Printed(
        table="14",
        model="LLaVA-v1.5, 672 px",
        fields={"reducer": "identity", "prefusion_num_layers": 0, "resolution_ratio": 2},
        printed=40.49,
    ),
    Printed(table="14", model="LLaVA-Mini", fields={}, printed=1.96),
    Printed(
        table="14",
        model="LLaVA-Mini, 672 px, 1 token",
        fields={"resolution_ratio": 2},
        printed=7.19,
        note="the model of the text has 64 tokens",
    ),
    Printed(
        table="text",
        model="LLaVA-Mini, 672 px, 64 tokens",
        fields={"resolution_ratio": 2, "reducer_grid": 8},
        printed=8.13,
    ),
    Printed(table="6, 7", model="no pre-fusion, 1 token", fields={"prefusion_num_layers": 0}, printed=0.96),
    Printed(
        table="6, 7",
        model="no pre-fusion, 16 tokens",
        fields={"prefusion_num_layers": 0, "reducer_grid": 4},
        printed=1.16,
    ),
    Printed(
        table="6, 7",
        model="no pre-fusion, 64 tokens",
        fields={"prefusion_num_layers": 0, "reducer_grid": 8},
        printed=1.79,
    ),
    Printed(
        table="6, 7",
        model="no pre-fusion, 144 tokens",
        fields={"prefusion_num_layers": 0, "reducer_grid": 12},
        printed=2.85,
    ),
    Printed(table="7", model="1 pre-fusion layer", fields={"prefusion_num_layers": 1}, printed=1.21),
    Printed(table="7", model="2 pre-fusion layers", fields={"prefusion_num_layers": 2}, printed=1.46),
    Printed(
        table="7",
        model="3 pre-fusion layers",
        fields={"prefusion_num_layers": 3},
        printed=1.81,
        note="misprint of 1.71",
    ),
    Printed(table="7", model="4 pre-fusion layers", fields={}, printed=1.96),
    Printed(
        table="12",
        model="inside the language model",
        fields={"reducer": "query_inside", "reducer_layer": 4, "prefusion_num_layers": 0},
        printed=1.84,
        note="no code is published; 1.89 by the paper's own counting",
    ),
    Printed(table="8", model="average pooling, 1 token", fields={"reducer": "average_pool"}, printed=1.96),
    Printed(table="8", model="query, 4 tokens", fields={"reducer_grid": 2}, printed=2.01),
)
"""Totals of the paper's tables, all with Vicuna-7B."""

PAPER_PARTS: Mapping[str, float] = {
    "vision_tower": 0.349,
    "projector": 0.024,
    "reducer": 0.001,
    "prefusion": 0.125,
    "language_model": 1.460,
}
"""Table 14's parts of LLaVA-Mini at 336 px, in T."""

PARTS_NOTES: Mapping[str, str] = {
    "reducer": "counts a multiply-add as one operation",
    "prefusion": "an eighth of it",
    "language_model": "total less the other parts as printed",
}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "LLaVA-v1.5": {"reducer": "identity", "prefusion_num_layers": 0},
    "average pooling, no pre-fusion": {"reducer": "average_pool", "prefusion_num_layers": 0},
    "query, no pre-fusion": {"reducer": "query", "prefusion_num_layers": 0},
    "LLaVA-Mini": {"reducer": "query"},
    "MQT": {"reducer": "mqt", "prefusion_num_layers": 0},
    "M3": {"reducer": "m3", "prefusion_num_layers": 0},
    "TokenPacker": {"reducer": "token_packer", "prefusion_num_layers": 0},
    "QueCC": {"reducer": "quecc", "prefusion_num_layers": 0},
    "LLaMA-VID, 1 of them for what is asked": {"reducer": "llama_vid", "prefusion_num_layers": 0},
    "PruMerge": {"reducer": "prumerge", "prefusion_num_layers": 0},
    "PruMerge+": {"reducer": "prumerge_plus", "prefusion_num_layers": 0},
    "VisionZip": {"reducer": "visionzip", "prefusion_num_layers": 0},
    "DivPrune": {"reducer": "divprune", "prefusion_num_layers": 0},
    "FastV": {"reducer": "fastv", "prefusion_num_layers": 0},
    "VoCo": {"reducer": "voco", "prefusion_num_layers": 0},
    "inside the language model": {"reducer": "query_inside", "prefusion_num_layers": 0},
}
"""Ways from patches to tokens that exist here, by what they change about LLaVA-Mini. Tokens are those that the language
model's last layer gets."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is counted."""

    size: str = "7b"
    """tiny, middle, 7b or 8b."""
    tokens: tuple[int, ...] = (1,)
    """Tokens of an image in the language model: each number is a row of each way that can make so many."""
    hd: bool = False
    """Five views of the image, 672 px instead of 336."""
    text_tokens: int = cost.PAPER_TEXT_TOKENS
    """Words of the prompt, the system prompt included."""

    def __post_init__(self) -> None:
        if not self.tokens or len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"tokens are numbers from 1 on, each of them once; got {list(self.tokens)}.")
        for tokens in self.tokens:
            size_config(self.size, tokens=tokens, hd=self.hd)
        if self.text_tokens < 1:
            raise ValueError(f"A prompt has at least one text token to ask with, got {self.text_tokens}.")


def run(settings: Settings) -> Report:
    """Count everything."""
    paper = [{**_facts(one), **_costs(one.fields)} for one in PAPER]
    parts = cost.paper_flops(preset("llava-mini-vicuna-7b")).as_dict()
    methods = {name: method_costs(config, settings) for name, config in _configs(settings).items()}
    goals = _goals()
    results = {"paper": paper, "paper_parts": parts, "methods": methods, "goals": goals}
    return Report(
        bench="flops",
        environment=environment(torch.device("cpu"), torch.float32),
        settings=vars(settings),
        results=results,
        tables=tables(results, settings),
    )


def tables(results: Mapping[str, Any], settings: Settings) -> list[Table]:
    """Put results into words."""
    return [
        _paper_table(results["paper"]),
        _parts_table(results["paper_parts"]),
        *_method_tables(results["methods"], settings),
        _goal_table(results["goals"]),
    ]


def _configs(settings: Settings) -> dict[str, LlavaMiniConfig]:
    """Each way with each number of tokens."""
    found = {}
    for name, fields in METHODS.items():
        for tokens in settings.tokens:
            try:
                config = changed(size_config(settings.size, tokens=tokens, hd=settings.hd), **fields)
            except ValueError:  # so many tokens are none of its numbers
                continue
            taken = cost.rows_of_layers(config, 1, 0)[-1]
            found[f"{name}, {taken} token{'' if taken == 1 else 's'}"] = config
    return found


def method_costs(config: LlavaMiniConfig, settings: Settings) -> dict[str, Any]:
    """What one way costs: a first question by part, another frame, later questions; in operations."""
    words = settings.text_tokens
    paper = cost.paper_flops(config, num_text_tokens=words).total
    paper_two = cost.paper_flops(config, num_frames=2, num_text_tokens=words).total
    first = cost.flops(config, num_text_tokens=words)
    return {
        "paper_first": paper,
        "paper_next_frame": paper_two - paper,
        "first": {**first.as_dict(), "total": first.total},
        "next_frame": cost.flops(config, num_frames=2, num_text_tokens=words).total - first.total,
        "later": {
            str(kept): cost.later_question_flops(config, num_text_tokens=words - kept, num_kept_tokens=kept).as_dict()
            for kept in KEPT
            if kept < words
        },
    }


def _goals() -> dict[str, dict[str, float]]:
    """The goals beside what is counted for them, whatever the settings; in T."""
    config = preset("llava-mini-vicuna-7b")
    counted = (cost.flops(config).total, cost.later_question_flops(config).prefusion)
    return {
        name: {"goal": goal, "counted": count / 1e12}
        for (name, goal), count in zip(GOALS.items(), counted, strict=True)
    }


def _goal_table(goals: Mapping[str, Mapping[str, float]]) -> Table:
    return Table(
        title=f"Goals of LLaVA-Mini, Vicuna-7B, 1 token, {cost.PAPER_TEXT_TOKENS} text tokens, in T",
        columns=("question", "at most", "counted", "reached"),
        rows=[
            (
                name,
                f"{one['goal']:.2f}",
                f"{one['counted']:.3f}",
                "yes" if one["counted"] <= one["goal"] else "no",
            )
            for name, one in goals.items()
        ],
    )


def _facts(one: Printed) -> dict[str, Any]:
    return {"table": one.table, "model": one.model, "printed": one.printed, "note": one.note}


def _costs(fields: Mapping[str, Any]) -> dict[str, int]:
    """The paper's count of a model with Vicuna-7B, and a first and a later question here."""
    config, words = changed(preset("llava-mini-vicuna-7b"), **fields), cost.PAPER_TEXT_TOKENS - PAPER_KEPT
    return {
        "computed": cost.paper_flops(config).total,
        "first": cost.flops(config).total,
        "later": cost.later_question_flops(config, num_text_tokens=words, num_kept_tokens=PAPER_KEPT).total,
    }


def _paper_table(rows: list[dict[str, Any]]) -> Table:
    return Table(
        title=f"The paper's counting, Vicuna-7B, {cost.PAPER_TEXT_TOKENS} text tokens, in T; and what the code here "
        f"runs for a first question and for a later one, with {PAPER_KEPT} of the text tokens kept",
        columns=("model", "table", "printed", "computed", "first, here", "later, here", "note"),
        left=("note",),
        rows=[
            (
                row["model"],
                row["table"],
                f"{row['printed']:.2f}",
                *(_tera(row[count], 2) for count in ("computed", "first", "later")),
                row["note"],
            )
            for row in rows
        ],
    )


def _parts_table(parts: Mapping[str, int]) -> Table:
    return Table(
        title="Table 14's parts of LLaVA-Mini, in T",
        columns=("part", "printed", "computed", "note"),
        left=("note",),
        rows=[
            (name, f"{printed:.3f}", _tera(parts[name]), PARTS_NOTES.get(name, ""))
            for name, printed in PAPER_PARTS.items()
        ],
    )


def _method_tables(methods: Mapping[str, Mapping[str, Any]], settings: Settings) -> list[Table]:
    size = f"{settings.size}{', HD' if settings.hd else ''}, {settings.text_tokens} text tokens"
    first = Table(
        title=f"A first question, {size}, in T: what the code runs, attention included",
        columns=(
            "way",
            *cost.ByPart.__dataclass_fields__,
            "total",
            "next frame",
            "(paper: total",
            "next frame)",
        ),
        rows=[
            (
                name,
                *(_tera(value) for value in one["first"].values()),
                _tera(one["next_frame"]),
                _tera(one["paper_first"]),
                _tera(one["paper_next_frame"]),
            )
            for name, one in methods.items()
        ],
    )
    later = Table(
        title=f"A later question about the same image, {size}, in T, by how many of the text tokens are kept",
        columns=("way", "kept", "pre-fusion", "language model", "total"),
        rows=[
            (
                name,
                kept,
                _tera(parts["prefusion"], 4),
                _tera(parts["language_model"], 4),
                _tera(sum(parts.values()), 4),
            )
            for name, one in methods.items()
            for kept, parts in one["later"].items()
        ],
    )
    return [first, later]


def _tera(number: int, digits: int = 3) -> str:
    return f"{number / 1e12:.{digits}f}"
