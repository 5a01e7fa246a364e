"""Keep what llava-mini analyze found in docs/analysis, and write docs/analysis/results.md from it.

Run:  llava-mini analyze --samples 420 --dropped 420 --output runs/looks
      python docs/draw_analysis.py tiny runs/looks    (or without arguments: only write the page again)
"""

import csv
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "analysis"

MODELS = {
    "tiny": (
        "The embedded model",
        "One vision token for each image or frame, after three layers of pre-fusion. Its training on the drawn world "
        "has tasks beside the answers: one asks of fused words where the thing is that they name. So they look there "
        "because they were taught to, which need not hold for a model that learns from answers alone.",
    ),
    "all-token": (
        "An all-token model",
        "All patches are vision tokens, and there is no pre-fusion, as in LLaVA-1.5: the model that the paper's "
        "Figures 2 to 5 are about, on our scale. It is the row all-tokens of [the study](../study.md), seed 0, so it "
        "was trained for less long than the embedded model.",
    ),
}
"""Analyses that the page may show, by the name of their files: a title, and what is to be known of the model."""

PICTURES = {
    "attention": "What each type of token attends to, by layer (Figure 2)",
    "entropy": "How evenly: entropy (Figure 3)",
    "evenness": "How evenly: entropy as a share of the largest that there can be",
    "map-1": "Attention over the image, by layer, for the first question (Figure 4)",
    "dropped": "Answers with vision tokens dropped in ranges of layers (Figure 5)",
    "queries": "Where the compression query looks (Figure 12)",
    "prefusion": "What the text reads in pre-fusion",
    "words-1": "Which patches each word of the first question reads in pre-fusion",
    "read-1": "Which patches each word of the first question reads in the language model",
    "pointing": "Whether words look at what they name",
}
"""Pictures that are kept where there are some, with what they show."""

OPENING = """\
# What our models look at

Made by [draw_analysis.py](../draw_analysis.py) from the files beside it, which `llava-mini analyze` wrote;
[analyze.md](../analyze.md) says what is measured. The questions are the first ones of each kind of the drawn world's
test split, and the pictures of single questions show the very first one: nobody chose it.
"""


def keep(name: str, source: Path) -> None:
    """Copy the facts, the answers and the pictures of an analysis."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob(f"{name}-*"):
        old.unlink()
    about = json.loads((source / "about.json").read_text(encoding="utf-8"))
    about["model"] = name  # wherever it lay
    (FOLDER / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source / "dropped.csv", FOLDER / f"{name}-dropped.csv")
    for picture in PICTURES:
        if (source / f"{picture}.png").exists():
            shutil.copyfile(source / f"{picture}.png", FOLDER / f"{name}-{picture}.png")


def page() -> str:
    """The page, for all models that were analysed."""
    return "\n".join([OPENING, *(_section(name) for name in MODELS if (FOLDER / f"{name}.json").exists())])


def _section(name: str) -> str:
    about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    title, words = MODELS[name]
    claims = ["| the paper, of LLaVA-1.5 and LLaVA-NeXT | here |", "|---|---|"]
    claims += [f"| {claim} | {here} |" for claim, here in about["claims"]]
    pictures = [
        f"{says}:\n\n![{says}]({name}-{picture}.png)\n"
        for picture, says in PICTURES.items()
        if (FOLDER / f"{name}-{picture}.png").exists()
    ]
    opening = textwrap.fill(f"{words} {_measured(about)}", 120)
    return "\n".join([f"## {title}\n", f"{opening}\n", *claims, "", *_dropped(name), "", *_in_vain(name), *pictures])


def _measured(about: Mapping[str, Any]) -> str:
    return (
        f"{about['questions']} questions; {about['device']}, {about['dtype']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, commit {about['commit']}."
    )


def _rows(name: str) -> list[dict[str, str]]:
    """Right answers with vision tokens dropped, of images and videos apart."""
    with (FOLDER / f"{name}-dropped.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["about"] != "all"]


def _in_vain(name: str) -> list[str]:
    """A warning where a model with all its tokens is no better than a guess: it has nothing to lose then."""
    whole = [row for row in _rows(name) if row["series"] == "nowhere"]
    lost = [row["about"] for row in whole if float(row["low"]) <= float(row["blind_guess"])]
    return [
        f"With all its vision tokens this model answers questions about {about} no better than a blind guess does, so\n"
        "that column does not say in which layers they are needed.\n"
        for about in lost
    ]


def _dropped(name: str) -> list[str]:
    """The same as a table: one row for each choice of layers."""
    rows = _rows(name)
    groups = list(dict.fromkeys(row["about"] for row in rows))
    lines = [f"| vision tokens dropped | layers | {' | '.join(groups)} |", f"|---|---|{'---:|' * len(groups)}"]
    for series, layers in dict.fromkeys((row["series"], row["layers"]) for row in rows):
        found = {row["about"]: row for row in rows if (row["series"], row["layers"]) == (series, layers)}
        cells = [
            f"{float(one['right']):.3f} ({float(one['low']):.3f}-{float(one['high']):.3f})" for one in found.values()
        ]
        lines.append(f"| {series} | {layers} | {' | '.join(cells)} |")
    first = {row["about"]: row for row in reversed(rows)}
    guesses = [f"{float(first[group]['blind_guess']):.3f}" for group in groups]
    asked = [first[group]["questions"] for group in groups]
    return [*lines, f"| blind guess | | {' | '.join(guesses)} |", f"| questions | | {' | '.join(asked)} |"]


def main() -> None:
    """Keep an analysis if one is named, and write the page."""
    if len(sys.argv) == 3:
        if sys.argv[1] not in MODELS:
            sys.exit(f"There is nothing to say of {sys.argv[1]!r}. The models are: {', '.join(MODELS)}.")
        keep(sys.argv[1], Path(sys.argv[2]))
    (FOLDER / "results.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
