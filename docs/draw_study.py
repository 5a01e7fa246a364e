"""Write docs/study.md and its pictures from docs/study/study.json.

Run:  llava-mini train study --output runs/study
      cp runs/study/study.json docs/study/ && python docs/draw_study.py
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from llava_mini.data.synthetic.world import CLIP_KINDS
from llava_mini.recipes.study_results import GROUPS, Study, means_and_spreads
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

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """What the paper says of two rows, or what it leaves open."""

    says: str
    more: str
    less: str
    """The row that has less of it."""


CLAIMS = (
    Claim("Without pre-fusion one token loses much (Table 6)", "all-tokens", "query-prefusion-0"),
    Claim("Pre-fusion wins it back (Table 6)", "query-prefusion-3", "query-prefusion-0"),
    Claim("One layer of pre-fusion helps (Table 6)", "query-prefusion-1", "query-prefusion-0"),
    Claim("A second layer helps (Table 6)", "query-prefusion-2", "query-prefusion-1"),
    Claim("A third layer helps (Table 6)", "query-prefusion-3", "query-prefusion-2"),
    Claim("A fourth layer helps (Table 6)", "query-prefusion-4", "query-prefusion-3"),
    Claim(
        "Layers of pre-fusion are worth more than tokens (section 6.1)",
        "query-prefusion-3",
        "query-16-tokens-prefusion-0",
    ),
    Claim("LLaVA-Mini keeps up with all tokens (Table 1)", "query-prefusion-3", "all-tokens"),
    Claim("It does so with the paper's four layers (Table 1)", "query-prefusion-4", "all-tokens"),
    Claim("It does so against a model as deep (not in the paper)", "query-prefusion-3", "all-tokens-deep"),
    *(
        Claim(f"LLaVA-Mini is ahead of {name} ({where})", "query-prefusion-3", row)
        for name, where, row in (
            ("MQT-LLaVA", "Table 1", "mqt-2-tokens"),
            ("TokenPacker", "Table 1", "token-packer-9-tokens"),
            ("LLaMA-VID", "Table 1", "llama-vid-2-tokens"),
            ("VoCo-LLaMA", "Table 1", "voco-2-tokens"),
            ("PruMerge", "Table 1", "prumerge"),
            ("QueCC", "not in the paper", "quecc-1-token"),
            ("M3", "not in the paper", "m3-1-token"),
            ("compression inside the language model", "Table 12", "query-inside-deep"),
        )
    ),
    Claim("One token of queries alone is ahead of two of MQT-LLaVA (Table 10)", "query-prefusion-0", "mqt-2-tokens"),
    Claim("Sixteen of queries are ahead of PruMerge (Table 10)", "query-16-tokens-prefusion-0", "prumerge"),
    Claim(
        "A token that tells its patches is ahead (not in the paper)", "query-prefusion-3-patches", "query-prefusion-3"
    ),
    Claim(
        "A token that passes through pre-fusion is ahead (released code, not the paper's text)",
        "query-prefusion-3",
        "query-prefusion-3-token-before",
    ),
    Claim(
        "Codes of the patches' own grid are ahead (section 4.1, not the released weights)",
        "query-prefusion-3",
        "query-prefusion-3-released-codes",
    ),
    Claim(
        "Pre-fusion had better start as the language model's first layers (not in the paper)",
        "query-prefusion-3",
        "query-prefusion-3-random-start",
    ),
    Claim("All patches make a good teacher (not in the paper)", "query-prefusion-3-distilled", "query-prefusion-3"),
    Claim(
        "They make one without pre-fusion, too (not in the paper)", "query-prefusion-0-distilled", "query-prefusion-0"
    ),
    Claim("Four tokens beat one (Table 7)", "query-4-tokens-prefusion-3", "query-prefusion-3"),
    Claim("Sixteen tokens beat one (Table 7)", "query-16-tokens-prefusion-3", "query-prefusion-3"),
    Claim(
        "Twice the resolution helps, sixteen tokens (Table 7)",
        "query-hd-16-tokens-prefusion-3",
        "query-16-tokens-prefusion-3",
    ),
    Claim(
        "Twice the resolution helps, one token (not in the paper)", "query-hd-1-token-prefusion-3", "query-prefusion-3"
    ),
    Claim("Queries beat pooling, one token (Table 8)", "query-prefusion-3", "average-pool-prefusion-3"),
    Claim(
        "Queries beat pooling, four tokens (Table 8)", "query-4-tokens-prefusion-3", "average-pool-4-tokens-prefusion-3"
    ),
    Claim("Pre-fusion helps all tokens, too (Table 11)", "all-tokens-prefusion-3", "all-tokens"),
    Claim(
        "One token beats none beside pre-fusion (not in the paper)", "query-prefusion-3", "no-vision-token-prefusion-3"
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
standard deviation over seeds. A seed changes the data and what starts at random. The questions are the same for all
rows and seeds, so a deviation does not hold what other questions would change.
"""

PAIRS = """\
What the paper says of its models at full size, and a few things that it leaves open, beside the difference between the
two rows that stand for it here: its mean and standard deviation over the seeds that both rows have, which see the same
data in both. A row is ahead or behind where all seeds agree and the mean is more than the deviation. That is a hint and
no proof: by chance alone it happens to 39 of 100 pairs of equal rows with two seeds, and to 21 with three.
"""

COSTS = """\
Beside the scores: tokens of a frame that the language model reads here, and at full size in brackets; operations up to
the first token of the answer to the first question about a picture and to a later one, as the code runs them; the same
with CLIP ViT-L/14 at 336 px and Vicuna-7B, the first question as the paper counts it, all with the paper's 43 tokens of
text; parameters here; and the time of a training step, which also holds drawing and, where no row before has kept what
it says, the vision encoder. It says little where other work ran on the machine meanwhile, as it did here.

The data of a seed can be better or worse for all rows: rows with other seeds are compared pair by pair above.
"""

TIME = """\
These rows go on from a trained row above and learn nothing but three kinds of questions about clips: which way a thing
moves, which event comes first, and how many things move, appear, disappear or change their colour. Beside what is
right: what of it is lost when the tokens are zeroed or stand in another order, and when the fused text is what it was
before pre-fusion, all three as means over the kinds.
"""

CARRIERS = """\
Half of the questions are asked again with something spoiled between vision and language model: vision tokens set to
zero, put into another order of a clip's frames, or taken from another picture or clip; fused text taken from another
picture or clip, or set back to what it was before pre-fusion. Where nothing is lost, nothing was needed for these
questions. With one seed a difference of .04 in a kind about clips is one question of 25.
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
    explained = [[f"`{name}`", row["shows"]] for name, row in rows.items()]
    return "\n".join([*parts, "## What the rows are\n", _table(["row", "what it is"], explained, words=2), ""])


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
    agree = all(one > 0 for one in found) or all(one < 0 for one in found)
    if not agree or abs(mean(found)) <= stdev(found):
        return "within the spread"
    return "ahead" if mean(found) > 0 else "behind"


def curves(row: Mapping[str, Any], seeds: Collection[int] | None = None) -> list[tuple[int, float]]:
    """Steps, and the answer loss of the steps up to each since the one before, as a mean over these seeds, or all."""
    by_step = zip(*(one["curve"] for one in row["seeds"] if seeds is None or one["seed"] in seeds), strict=True)
    return [(points[0]["step"], mean(point["answer"] for point in points)) for points in by_step]


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation of two lists, Kendall's tau-b: 1 for the same order, also with ties, and without any pair."""
    one, other = ([(a > b) - (a < b) for a, b in combinations(values, 2)] for values in (first, second))
    untied = sqrt(sum(map(abs, one)) * sum(map(abs, other)))
    return sum(a * b for a, b in zip(one, other, strict=True)) / untied if untied else 1.0


def trained(rows: Rows) -> Rows:
    """The rows that have learned something, and not taken the weights of another one."""
    return {name: row for name, row in rows.items() if curves(row)}


def common_seeds(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """The seeds that all of some rows have: losses of other seeds are of other data."""
    seeds = [{one["seed"] for one in row["seeds"]} for row in rows]
    return sorted(set.intersection(*seeds)) if seeds else []


def orders(rows: Rows) -> list[tuple[int, float]]:
    """Steps, and the rank correlation of the losses of trained rows there with those at the end, on common seeds."""
    rows = trained(rows)
    seeds = common_seeds(rows.values())
    losses = [curves(row, seeds) for row in rows.values()]
    return [
        (points[0][0], kendall([loss for _, loss in points], [curve[-1][1] for curve in losses]))
        for points in zip(*losses, strict=True)
    ]


def settled_at(rows: Rows) -> int:
    """The step from which on the rank correlation with the final order stays high."""
    found = orders(rows)
    last = max((number for number, (_, share) in enumerate(found) if share < SETTLED), default=-1)
    return found[last + 1][0]


def draw_curves(study: Study) -> "Figure":
    """The loss over steps, a panel for each table."""
    from matplotlib.figure import Figure

    tables = tables_of(rows_by_name(study))
    figure = Figure(figsize=(9, 3.2 * max(len(tables), 1)), layout="constrained")
    panels = figure.subplots(max(len(tables), 1), 1, squeeze=False)[:, 0]
    for axes, (title, shown) in zip(panels, tables.items(), strict=False):
        learning = [row for row in shown if curves(row)]
        seeds = common_seeds(learning)
        for number, row in enumerate(learning):
            steps, losses = zip(*curves(row, seeds), strict=True)
            style, colour = STYLES[number // len(COLOURS)], COLOURS[number % len(COLOURS)]
            axes.plot(steps, losses, style, color=colour, label=row["row"])
        axes.set_title(f"{title}, seed(s) {', '.join(map(str, seeds))}", fontsize="medium")
        axes.set_xlabel("steps")
        axes.set_ylabel("answer loss")
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_scores(study: Study) -> "Figure":
    """Scores of images and clips of all rows, with their spread, beside those of a blind guess."""
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
        blind = rows[names[0]]["seeds"][0]["scores"][group]["blind"]
        axes.axvline(blind, color=colour, linestyle="--", label=f"{group}, blind guess")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of questions answered rightly")
    axes.legend(fontsize="small", loc="lower right")
    return figure


def draw_order(study: Study) -> "Figure":
    """How much the order of the rows over steps is the final one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    found = orders(rows_by_name(study))
    axes.plot([step for step, _ in found], [share for _, share in found], "o-", color=COLOURS[0])
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
        f"answer loss. {of['questions']} questions of each kind about images and half as many about clips. The last "
        f"row ran on {ran['device']}, {ran['threads']} thread(s), torch {ran['torch']}, commit {ran['commit']}; the "
        "`run.json` of each row says where and when that one did.\n"
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
                str(len(row["seeds"])),
                f"{facts['tokens_per_frame']} ({full['tokens_per_frame']})",
                *(_share(found.get(group)) for group in GROUPS),
                f"{facts['toy']['flops_first'] / 1e6:,.0f}",
                f"{facts['toy']['flops_later'] / 1e6:,.0f}",
                f"{full['flops_paper'] / 1e12:.2f}",
                f"{full['flops_later'] / 1e12:.2f}",
                f"{facts['parameters'] / 1e6:.2f}",
                f"{mean(one['seconds_per_step'] for one in row['seeds']):.2f}" if curves(row) else "",
            ]
        )
    names = [
        "row",
        "seeds",
        "tokens",
        *GROUPS,
        "first, MFLOP",
        "later, MFLOP",
        "first, TFLOP at 7B",
        "later, TFLOP at 7B",
    ]
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
    """How much less is right in one way of asking than with nothing changed, as a mean over seeds that were asked."""
    pairs = [
        (one["carriers"]["unchanged"]["right"].get(kind), one["carriers"][way]["right"].get(kind))
        for one in row["seeds"]
        if way in one["carriers"]
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
    seeds = common_seeds(rows.values())
    if len(rows) < 2 or not seeds:
        return "There are no two rows that were trained with the same seed."
    found = orders(rows)
    losses = [-curves(row, seeds)[-1][1] for row in rows.values()]
    scores = [
        mean(one["scores"]["all"]["exact"] for one in row["seeds"] if one["seed"] in seeds) for row in rows.values()
    ]
    middle, settled, last = found[(len(found) - 1) // 2], settled_at(rows), found[-1][0]
    when = f"From step {settled:,} of {last:,} on" if settled < last else f"At no step before the last, {last:,},"
    return (
        f"{when} the order of {len(rows)} rows by their training loss with the seed(s) that all of them have, "
        f"{', '.join(map(str, seeds))}, a loss on new scenes at every step, "
        f"{'stays' if settled < last else 'is'} close to the final one (Kendall's tau of "
        f"{SETTLED} and more); half way, at step {middle[0]:,}, tau is {middle[1]:.2f}. Between the final order by "
        f"loss and that by score tau is {kendall(losses, scores):.2f}. The rate falls to nearly nothing at the end, so "
        "the order of longer runs may still be another. The losses of M3 and MQT are those with the numbers of tokens "
        "that are drawn in training."
    )


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
