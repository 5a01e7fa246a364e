"""Write docs/study.md and its pictures from docs/study/study.json.

Run:  llava-mini train study --output runs/study
      cp runs/study/study.json docs/study/ && python docs/draw_study.py
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import copysign
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from llava_mini.data.synthetic.world import CLIP_KINDS
from llava_mini.recipes.study_results import GROUPS, means_and_spreads
from llava_mini.recipes.study_rows import TABLES, TIME_KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent
FOLDER = DOCS / "study"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
"""Of Paul Tol's bright scheme, which the colour-blind can tell apart."""
STYLES = ("-", "--", ":")
SETTLED = 0.9
"""Least rank correlation with the final order that counts as settled."""

Study = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says of two rows."""

    says: str
    more: str
    less: str
    """The row that has less of it."""


CLAIMS = (
    Claim(says="Without pre-fusion one token loses much (Table 6)", more="all-tokens", less="query-prefusion-0"),
    Claim(says="Pre-fusion wins it back (Table 6)", more="query-prefusion-3", less="query-prefusion-0"),
    Claim(says="One layer of pre-fusion helps (Table 6)", more="query-prefusion-1", less="query-prefusion-0"),
    Claim(says="A second layer helps (Table 6)", more="query-prefusion-2", less="query-prefusion-1"),
    Claim(says="A third layer helps (Table 6)", more="query-prefusion-3", less="query-prefusion-2"),
    Claim(says="A fourth layer helps (Table 6)", more="query-prefusion-4", less="query-prefusion-3"),
    Claim(
        says="Layers of pre-fusion are worth more than tokens (section 6.1)",
        more="query-prefusion-3",
        less="query-16-tokens-prefusion-0",
    ),
    Claim(says="LLaVA-Mini keeps up with all tokens (Table 1)", more="query-prefusion-4", less="all-tokens"),
    Claim(
        says="It does so against a language model as deep as both (not in the paper)",
        more="query-prefusion-3",
        less="all-tokens-deep",
    ),
    *(
        Claim(
            says=f"LLaVA-Mini is ahead of {name} ({'Table 1' if in_paper else 'not in the paper'})",
            more="query-prefusion-3",
            less=row,
        )
        for name, row, in_paper in (
            ("MQT-LLaVA", "mqt-2-tokens", True),
            ("TokenPacker", "token-packer-9-tokens", True),
            ("LLaMA-VID", "llama-vid-2-tokens", True),
            ("VoCo-LLaMA", "voco-2-tokens", True),
            ("PruMerge", "prumerge", True),
            ("QueCC", "quecc-1-token", False),
            ("M3", "m3-1-token", False),
            ("compression inside the language model", "query-inside-deep", True),
        )
    ),
    Claim(
        says="A token that tells its patches is ahead (not in the paper)",
        more="query-prefusion-3-patches",
        less="query-prefusion-3",
    ),
    Claim(
        says="A token that passes through pre-fusion is ahead (released code, not the paper's text)",
        more="query-prefusion-3",
        less="query-prefusion-3-token-before",
    ),
    Claim(
        says="Codes of the patches' own grid are ahead (section 4.1, not the released weights)",
        more="query-prefusion-3",
        less="query-prefusion-3-released-codes",
    ),
    Claim(
        says="Pre-fusion had better start as the language model's first layers (not in the paper)",
        more="query-prefusion-3",
        less="query-prefusion-3-random-start",
    ),
    Claim(
        says="A model with all patches is a good teacher (not in the paper)",
        more="query-prefusion-3-distilled",
        less="query-prefusion-3",
    ),
    Claim(
        says="It is one without pre-fusion, too (not in the paper)",
        more="query-prefusion-0-distilled",
        less="query-prefusion-0",
    ),
    Claim(says="Four tokens beat one (Table 7)", more="query-4-tokens-prefusion-3", less="query-prefusion-3"),
    Claim(says="Sixteen tokens beat one (Table 7)", more="query-16-tokens-prefusion-3", less="query-prefusion-3"),
    Claim(says="Twice the resolution helps (Table 7)", more="query-hd-1-token-prefusion-3", less="query-prefusion-3"),
    Claim(says="Queries beat pooling, one token (Table 8)", more="query-prefusion-3", less="average-pool-prefusion-3"),
    Claim(
        says="Queries beat pooling, four tokens (Table 8)",
        more="query-4-tokens-prefusion-3",
        less="average-pool-4-tokens-prefusion-3",
    ),
    Claim(says="Pre-fusion helps all tokens, too (Table 11)", more="all-tokens-prefusion-3", less="all-tokens"),
    Claim(
        says="One token beats none beside pre-fusion (not in the paper)",
        more="query-prefusion-3",
        less="no-vision-token-prefusion-3",
    ),
)
"""What is looked at pair by pair; the first row of a pair is the one that should be ahead."""

OPENING = """\
# The study: what survives when a frame is one token

Every model here begins from the same vision encoder, projector and language model, sees the same questions about the
same drawn scenes and clips at the same step, and trains for as many steps with the same rates
([how](training.md#the-study)). What differs is named in the row. The page and its pictures are made by
[draw_study.py](draw_study.py) from [study.json](study/study.json), which `llava-mini train study` wrote.

Scores are shares of validation questions answered in exactly the right words: means over seeds, with the sample
standard deviation over seeds. A seed changes the data and what starts at random.
"""

PAIRS = """\
What the paper says of its models at full size, and a few things that it leaves open, beside the difference between the
two rows that stand for it here: its mean and standard deviation over seeds, which see the same data in both rows. A row
is ahead or behind where all seeds agree and the mean is more than the deviation.
"""

COSTS = """\
Beside the scores: tokens of a frame that the language model reads here, and at full size in brackets; operations up to
the first token of the answer to the first question about a picture and to a later one, as the code runs them; the same
with CLIP ViT-L/14 at 336 px and Vicuna-7B, the first question as the paper counts it, all with the paper's 43 tokens of
text; parameters here; and the time of a training step, which also holds drawing and, for the first row of each seed
alone, the vision encoder. It says little where other work ran on the machine meanwhile, as it did here.
"""

TIME = """\
These rows go on from a trained row above and learn nothing but three kinds of questions about clips, those that another
order of the same frames would answer otherwise. Beside what is right: what of it is lost when the tokens are zeroed or
stand in another order, and when the fused text is what it was before pre-fusion, all three as means over the kinds.
"""

CARRIERS = """\
Fewer questions are asked again with something spoiled between vision and language model: vision tokens set to zero, put
into another order of a clip's frames, or taken from another picture or clip; fused text taken from another picture or
clip, or set back to what it was before pre-fusion. Where nothing is lost, nothing was needed for these questions.
"""


def read_study(path: Path = FOLDER / "study.json") -> Study:
    """What ``llava-mini train study`` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def page(study: Study) -> str:
    """The whole page.

    Raises:
        ValueError: The study has no row.
    """
    rows = rows_by_name(study)
    parts = [OPENING, _setting(study), "## Pair by pair\n", PAIRS, f"{_pairs(rows)}\n", "## Tables\n", COSTS]
    for title, shown in tables_of(rows).items():
        parts.append(f"### {title}\n\n{_scores(shown)}\n")
    parts += ["![Scores of all rows](study/scores.png)\n", "## By kind of question\n", f"{_kinds(rows)}\n"]
    parts += ["## What carries the answer\n", CARRIERS, f"{_carriers(rows)}\n"]
    parts += ["## At which budget the order settles\n", f"{_settling(rows)}\n"]
    parts += ["![Loss over steps](study/curves.png)\n", "![Order over steps](study/order.png)\n"]
    if study["time"]:
        parts += ["## What keeps time\n", TIME, f"{_time(study['time'])}\n"]
        rows = {**rows, **{row["row"]: row for row in study["time"]}}
    return "\n".join([*parts, "## What the rows are\n", _explained(rows), ""])


def rows_by_name(study: Study) -> Rows:
    """The rows of a study.

    Raises:
        ValueError: It has none.
    """
    if not study["rows"]:
        raise ValueError("The study has no finished row. Train one with: llava-mini train study")
    return {row["row"]: row for row in study["rows"]}


def tables_of(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The rows that stand beside one another, by title, where there are two and more."""
    found = {title: [rows[name] for name in names if name in rows] for title, names in TABLES.items()}
    return {title: shown for title, shown in found.items() if len(shown) > 1}


def differences(rows: Rows, more: str, less: str, group: str) -> list[float]:
    """By how much one row is ahead of another in the mean of a group, for each seed that both have."""
    first, second = (
        {one["seed"]: one["scores"][group]["exact"] for one in rows[name]["seeds"]} for name in (more, less)
    )
    return [first[seed] - second[seed] for seed in sorted(first) if seed in second]


def verdict(found: Sequence[float]) -> str:
    """What differences over seeds say: ahead or behind if all seeds agree and the mean is more than the spread."""
    if len(found) < 2:
        return "one seed"
    agree = len({copysign(1, one) for one in found}) == 1
    if not agree or abs(mean(found)) <= stdev(found):
        return "within the spread"
    return "ahead" if mean(found) > 0 else "behind"


def curves(row: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Steps, and the answer loss of the steps up to each since the one before, as a mean over seeds."""
    by_step = zip(*(one["curve"] for one in row["seeds"]), strict=True)
    return [(points[0]["step"], mean(point["answer"] for point in points)) for points in by_step]


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation of two lists: pairs in the same order less the others, as a share of all; 1 without any."""
    pairs = list(combinations(range(len(first)), 2))
    signs = [(first[a] - first[b]) * (second[a] - second[b]) for a, b in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(pairs) if pairs else 1.0


def trained(rows: Rows) -> Rows:
    """The rows that have learned something, and not taken the weights of another one."""
    return {name: row for name, row in rows.items() if curves(row)}


def orders(rows: Rows) -> list[tuple[int, float]]:
    """Steps, and the rank correlation of the losses of trained rows there with those at the end."""
    losses = [curves(row) for row in trained(rows).values()]
    final = [curve[-1][1] for curve in losses]
    return [(points[0][0], kendall([loss for _, loss in points], final)) for points in zip(*losses, strict=True)]


def settled_at(rows: Rows) -> int:
    """The step from which on the rank correlation with the final order stays high."""
    found = orders(rows)
    last = max((number for number, (_, share) in enumerate(found) if share < SETTLED), default=-1)
    return found[last + 1][0]


def draw_curves(study: Study) -> "Figure":
    """The loss over steps, a panel for each table."""
    from matplotlib.figure import Figure

    names, tables = [row["row"] for row in study["rows"]], tables_of(rows_by_name(study))
    figure = Figure(figsize=(9, 3.2 * max(len(tables), 1)), layout="constrained")
    panels = figure.subplots(max(len(tables), 1), 1, squeeze=False)[:, 0]
    for axes, (title, shown) in zip(panels, tables.items(), strict=False):
        for row in (row for row in shown if curves(row)):
            number = names.index(row["row"])
            steps, losses = zip(*curves(row), strict=True)
            style, colour = STYLES[number // len(COLOURS) % len(STYLES)], COLOURS[number % len(COLOURS)]
            axes.plot(steps, losses, style, color=colour, label=row["row"])
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("steps")
        axes.set_ylabel("answer loss")
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_scores(study: Study) -> "Figure":
    """Scores of images and clips of all rows, with their spread."""
    from matplotlib.figure import Figure

    rows = rows_by_name(study)
    names = [*rows][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.33 * len(names)), layout="constrained")
    axes = figure.subplots()
    for group, shift, colour in (("images", 0.2, COLOURS[0]), ("clips", -0.2, COLOURS[1])):
        found = [means_and_spreads(rows[name]).get(group, (0.0, None)) for name in names]
        places = [number + shift for number in range(len(names))]
        errors = [spread or 0.0 for _, spread in found]
        axes.barh(places, [middle for middle, _ in found], 0.38, xerr=errors, color=colour, label=group)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of questions answered rightly")
    axes.legend(fontsize="small", loc="lower right")
    return figure


def draw_order(study: Study) -> "Figure":
    """How much the order of the rows over steps is the final one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    steps, shares = zip(*orders(rows_by_name(study)), strict=True)
    axes.plot(steps, shares, "o-", color=COLOURS[0])
    axes.axhline(SETTLED, color=COLOURS[6], linestyle="--")
    axes.set_xlabel("steps")
    axes.set_ylabel("Kendall's tau with\nthe final order of losses")
    return figure


PICTURES = {"curves": draw_curves, "scores": draw_scores, "order": draw_order}


def _setting(study: Study) -> str:
    of, ran = study["settings"], study["settings"]["environment"]
    seeds = sorted({len(row["seeds"]) for row in study["rows"]})
    number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"{len(study['rows'])} rows with {number} seed(s) each: {of['steps']:,} steps of {of['batch']} pictures or "
        f"clips with up to six questions each, peak rate {of['rate']:g}, {of['dtype'].removeprefix('torch.')}, plain "
        f"answer loss. {of['questions']} questions of each kind about images and half as many about clips. On "
        f"{ran['device']}, {ran['threads']} thread(s), torch {ran['torch']}, commit {ran['commit']}.\n"
    )


def _pairs(rows: Rows) -> str:
    lines = []
    for claim in CLAIMS:
        if claim.more not in rows or claim.less not in rows:
            continue
        cells = []
        for group in ("images", "clips"):
            found = differences(rows, claim.more, claim.less, group)
            spread = f" ± {stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{mean(found):+.3f}{spread}, {verdict(found)}" if found else "no common seed")
        lines.append([claim.says, f"`{claim.more}` less `{claim.less}`", *cells])
    return _table(["what is said", "difference", "images", "clips"], lines, words=2)


def _scores(shown: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in shown:
        found, facts = means_and_spreads(row), row["seeds"][0]
        full = facts["full_size"]
        lines.append(
            [
                f"`{row['row']}`",
                f"{facts['tokens_per_frame']} ({full['tokens_per_frame']})",
                *(_share(found.get(group)) for group in GROUPS),
                f"{facts['toy']['flops_first'] / 1e6:,.0f}",
                f"{facts['toy']['flops_later'] / 1e6:,.0f}",
                f"{full['flops_paper'] / 1e12:.2f}",
                f"{full['flops_later'] / 1e12:.2f}",
                f"{facts['parameters'] / 1e6:.2f}",
                f"{mean(one['seconds_per_step'] for one in row['seeds']):.2f}",
            ]
        )
    names = ["row", "tokens", *GROUPS, "first, MFLOP", "later, MFLOP", "first, TFLOP at 7B", "later, TFLOP at 7B"]
    return _table([*names, "parameters, M", "s a step"], lines)


def _kinds(rows: Rows) -> str:
    scores = next(iter(rows.values()))["seeds"][0]["scores"]
    kinds = [kind for kind in scores if kind not in GROUPS and "phrasings" not in kind]
    parts = []
    for title, chosen in (
        ("images", [kind for kind in kinds if kind not in CLIP_KINDS]),
        ("clips", [kind for kind in kinds if kind in CLIP_KINDS]),
    ):
        lines = [
            [f"`{name}`", *(_share(means_and_spreads(row)[kind], digits=2) for kind in chosen)]
            for name, row in rows.items()
        ]
        lines.append(["blind guess", *(f"{scores[kind]['blind']:.2f}".lstrip("0") for kind in chosen)])
        parts.append(_table([f"about {title}", *chosen], lines))
    return "\n\n".join(parts)


def _carriers(rows: Rows) -> str:
    ways = list(dict.fromkeys(way for row in rows.values() for way in row["seeds"][0]["carriers"]))
    parts = []
    for group in ("images", "clips"):
        lines = [[f"`{name}`", *(_carried(row, way, group) for way in ways)] for name, row in rows.items()]
        parts.append(_table([f"right, {group}", *ways], lines))
    kinds = [kind for kind in CLIP_KINDS if kind in next(iter(rows.values()))["seeds"][0]["scores"]]
    for way in ("tokens zeroed", "tokens shuffled", "text raw"):
        having = {name: row for name, row in rows.items() if way in row["seeds"][0]["carriers"]}
        lines = [[f"`{name}`", *(_lost(row, way, kind) for kind in kinds)] for name, row in having.items()]
        if lines:
            parts.append(_table([f"lost with {way}", *kinds], lines))
    return "\n\n".join(parts)


def _carried(row: Mapping[str, Any], way: str, kind: str) -> str:
    """The mean over seeds of what is right in one way of asking; empty where it was not asked."""
    found = [one["carriers"][way]["right"].get(kind) for one in row["seeds"] if way in one["carriers"]]
    known = [one for one in found if one is not None]
    return f"{mean(known):.2f}".removeprefix("0") if known else ""


def _lost(row: Mapping[str, Any], way: str, kind: str) -> str:
    """How much less is right in one way of asking than with nothing changed, as a mean over seeds."""
    pairs = [
        (one["carriers"]["unchanged"]["right"].get(kind), one["carriers"][way]["right"].get(kind))
        for one in row["seeds"]
    ]
    lost = [before - after for before, after in pairs if before is not None and after is not None]
    return f"{mean(lost):+.2f}" if lost else ""


def _time(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores of rows about time, and what carries them."""
    ways = ("tokens zeroed", "tokens shuffled", "text raw")
    lines = []
    for row in rows:
        found, seeds = means_and_spreads(row), str(len(row["seeds"]))
        shares = [_share(found[kind]) for kind in (*TIME_KINDS, "clips")]
        lines.append(
            [f"`{row['row']}`", f"`{row['from']}`", seeds, *shares, *(_lost(row, way, "clips") for way in ways)]
        )
    blind = rows[0]["seeds"][0]["scores"]
    guesses = [f"{blind[kind]['blind']:.2f}".lstrip("0") for kind in (*TIME_KINDS, "clips")]
    lines.append(["blind guess", "", "", *guesses, *("" for _ in ways)])
    return _table(
        ["row", "goes on from", "seeds", *TIME_KINDS, "all", *(f"lost, {way}" for way in ways)], lines, words=2
    )


def _settling(rows: Rows) -> str:
    rows = trained(rows)
    if len(rows) < 2:
        return "There are fewer than two rows that were trained."
    found, last = orders(rows), curves(next(iter(rows.values())))[-1][0]
    names = list(rows)
    losses = [-curves(rows[name])[-1][1] for name in names]
    scores = [means_and_spreads(rows[name])["all"][0] for name in names]
    middle, settled = found[len(found) // 2], settled_at(rows)
    when = f"From step {settled:,} of {last:,} on" if settled < last else f"At no step before the last, {last:,},"
    return (
        f"{when} the order of {len(rows)} rows by their training loss, a loss on new scenes at every step, "
        f"{'stays' if settled < last else 'is'} close to the final one (Kendall's tau of "
        f"{SETTLED} and more); half way, at step {middle[0]:,}, tau is {middle[1]:.2f}. Between the final order by "
        f"loss and that by score tau is {kendall(losses, scores):.2f}. The rate falls to nearly nothing at the end, so "
        "the order of longer runs may still be another. The losses of M3 and MQT are those with the numbers of tokens "
        "that are drawn in training."
    )


def _explained(rows: Rows) -> str:
    return _table(["row", "what it is"], [[f"`{name}`", row["shows"]] for name, row in rows.items()], words=2)


def _share(found: tuple[float, float | None] | None, digits: int = 3) -> str:
    if found is None:
        return ""
    middle, spread = (None if one is None else f"{one:.{digits}f}".removeprefix("0") for one in found)
    return f"{middle} ± {spread}" if spread else str(middle)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Cells as Markdown; the first columns, which hold words, are aligned to the left."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def main() -> None:
    """Write the page and its pictures."""
    study = read_study()
    (DOCS / "study.md").write_text(page(study), encoding="utf-8")
    for name, draw in PICTURES.items():
        draw(study).savefig(FOLDER / f"{name}.png", format="png", dpi=110)


if __name__ == "__main__":
    main()
