"""Write docs/benchmarks/results.md and its pictures from the lines of JSON beside it.

Run:  llava-mini bench latency --size middle ... --output docs/benchmarks/latency-middle.json
      python docs/draw_benchmarks.py
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llava_mini.benchmarks.film_ways import WAYS
from llava_mini.benchmarks.report import Report
from llava_mini.benchmarks.run import read_report
from llava_mini.benchmarks.timing import PARTS
from llava_mini.benchmarks.train_ways import ORDERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parent / "benchmarks"
COLOURS = dict(zip(PARTS, ("#4477aa", "#66ccee", "#228833", "#ccbb44"), strict=True))

_AGAIN = {"no": "", "yes": ", layers computed again"}
OPENING = """\
# Results of the benchmarks

Every table and picture here is made by [draw_benchmarks.py](../draw_benchmarks.py) from the lines of JSON in this
folder, which `llava-mini bench` wrote with all single times; [Benchmarks](../benchmarks.md) says what is measured and
how to repeat it. Weights are random: how long a model takes does not depend on their values. **No GPU was at hand**:
nothing at 7B or 8B has been run, only counted.
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page says of one result."""

    name: str
    """Of the file, without ``.json``."""
    title: str
    says: Callable[[Report], str]
    """The conclusion, its figures taken from the result."""
    draw: Callable[[Report, "Axes"], None] | None = None
    size: tuple[float, float] = (8, 3.6)
    """Inches of the picture."""


def before_language_model(parts: Mapping[str, Sequence[float]]) -> float:
    """Median of all that comes before the language model."""
    named = [parts[part] for part in PARTS if part != "prefill" and part in parts]
    return median([sum(times) for times in zip(*named, strict=True)])


def page(reports: Mapping[str, Report]) -> str:
    """The page, from results by name.

    Raises:
        ValueError: a result has no section, or a section no result.
    """
    names = [section.name for section in SECTIONS]
    if sorted(names) != sorted(reports):
        raise ValueError(f"The sections are {sorted(names)}, but the results {sorted(reports)}. They go together.")
    texts = [OPENING]
    for section in SECTIONS:
        report = reports[section.name]
        tables = "\n\n".join(f"{table.title}\n\n{table.markdown()}" for table in report.tables)
        picture = f"![{section.title}]({section.name}.png)\n\n" if section.draw is not None else ""
        origin = _origin(section.name, report)
        texts.append(f"## {section.title}\n\n{section.says(report)}\n\n{picture}{tables}\n\n{origin}\n")
    return "\n".join(texts)


def read_reports(folder: Path = FOLDER) -> dict[str, Report]:
    """All results, by name."""
    return {path.stem: read_report(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def draw(section: Section, report: Report, path: Path) -> None:
    """Draw the picture of a section."""
    from matplotlib.figure import Figure

    assert section.draw is not None
    figure = Figure(figsize=section.size, layout="constrained")
    section.draw(report, figure.subplots())
    figure.savefig(path, format="png", dpi=110)


def _origin(name: str, report: Report) -> str:
    """Where it was measured, with which command."""
    of = report.environment
    libraries = ", ".join(f"{library} {of[library]}" for library in ("torch", "transformers", "av") if library in of)
    where = f"{of['device']}, {of['threads']} threads, Python {of['python']}, {libraries}, commit {of['commit']}"
    flags = [flag for key, value in report.settings.items() for flag in _flags(key, value)]
    return f"[{name}.json]({name}.json): {where}; `llava-mini bench {report.bench} {' '.join(flags)}`."


def _flags(key: str, value: object) -> list[str]:
    """A setting on the command line; one that is off or left open is not there."""
    if value is None or value is False:
        return []
    values = value if isinstance(value, list | tuple) else [] if value is True else [value]
    return [f"--{key.replace('_', '-')}", *map(str, values)]


def _stacked(axes: "Axes", rows: Mapping[str, Mapping[str, Sequence[float]]], factor: float = 1.0) -> None:
    """Bars of medians by part, the first row on top."""
    names = [*rows][::-1]
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [factor * median(rows[name][part]) if part in rows[name] else 0.0 for name in names]
        axes.barh(names, widths, left=left, label=part, color=COLOURS[part])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.legend(fontsize="x-small")
    axes.tick_params(labelsize="small")


def _draw_latency(report: Report, axes: "Axes") -> None:
    rows: dict[str, Mapping[str, Sequence[float]]] = {}
    for name, one in report.results["contestants"].items():
        rows[f"{name}: first"] = one["first_parts_ms"]
        rows[f"{name}: later"] = one["later_parts_ms"]
    _stacked(axes, rows, 1e-3)
    axes.set_xlabel("seconds to the first token")


def way(report: Report, name: str, dtype: str, frames: int) -> Mapping[str, Any]:
    """One row of the video benchmark."""
    return next(
        one for one in report.results["ways"] if (one["way"], one["dtype"], one["frames"]) == (name, dtype, frames)
    )


def _draw_video(report: Report, axes: "Axes") -> None:
    rows = {
        f"{WAYS[one['way']]}, {one['dtype']}, {one['frames']} frames": {
            part: [seconds / one["frames"] for seconds in times] for part, times in one["parts_s"].items()
        }
        for one in sorted(report.results["ways"], key=lambda one: (one["dtype"], one["frames"]))
    }
    _stacked(axes, rows)
    axes.set_xlabel("seconds a frame, to the first token of a first question")


def _draw_train(report: Report, axes: "Axes") -> None:
    ways = report.results["ways"][::-1]
    names = [f"stage {one['stage']}{_AGAIN[one['recompute']]}, {one['order']}" for one in ways]
    axes.barh(names, [median(one["seconds"]) for one in ways], color=COLOURS["vision"])
    axes.set_xlabel("seconds a step, there and back")
    axes.tick_params(labelsize="small")


def _draw_growth(report: Report, axes: "Axes") -> None:
    for name, words in WAYS.items():
        points = sorted(
            (one["frames"], one["peak"]["host"] / 1e6) for one in report.results["ways"] if one["way"] == name
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=words)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("frames")
    axes.set_ylabel("MB above the weights")
    axes.legend(fontsize="small")


def _draw_kept(report: Report, axes: "Axes") -> None:
    kinds = {"language_model": "language model", "prefusion": "pre-fusion", "features": "vision features"}
    names = [*report.results["ways"]]
    for number, (kind, words) in enumerate(kinds.items()):
        places = [index + (number - 1) * 0.25 for index in range(len(names))]
        axes.bar(places, [report.results["ways"][name]["kept"][kind] / 1e6 for name in names], 0.25, label=words)
    axes.set_xticks(range(len(names)), names, fontsize="small")
    axes.set_yscale("log")
    axes.set_ylabel("MB a frame")
    axes.legend(fontsize="small")


def _draw_flops(report: Report, axes: "Axes") -> None:
    rows = report.results["paper"][::-1]
    ways = (
        ("paper's count", "computed", 0.27),
        ("our first question", "first", 0.0),
        ("later question", "later", -0.27),
    )
    for (label, key, shift), colour in zip(ways, COLOURS.values(), strict=False):
        places = [number + shift for number in range(len(rows))]
        axes.barh(places, [row[key] / 1e12 for row in rows], 0.26, label=label, color=colour)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.tick_params(labelsize="small")
    axes.set_xscale("log")
    axes.set_xlabel("TFLOP up to the first token of the answer")
    axes.legend(fontsize="x-small")


def _draw_decode(report: Report, axes: "Axes") -> None:
    ways = report.results["ways"]
    _medians(axes, {name: [one["frames"] / seconds for seconds in one["seconds"]] for name, one in ways.items()})
    axes.set_xlabel("frames per second")


def _draw_load(report: Report, axes: "Axes") -> None:
    _medians(axes, report.results["seconds"])
    axes.set_xscale("log")
    axes.set_xlabel("seconds")


def _medians(axes: "Axes", rows: Mapping[str, Sequence[float]]) -> None:
    """Bars of medians with the range of all repeats, the first row on top."""
    names = [*rows][::-1]
    middles = [median(rows[name]) for name in names]
    below = [middle - min(rows[name]) for name, middle in zip(names, middles, strict=True)]
    above = [max(rows[name]) - middle for name, middle in zip(names, middles, strict=True)]
    axes.barh(names, middles, xerr=[below, above], color=COLOURS["vision"], ecolor="black", capsize=2)
    axes.tick_params(labelsize="small")


def _says_flops(report: Report) -> str:
    methods = report.results["methods"]
    mini, plain = methods["LLaVA-Mini, 1 token"], methods["query, no pre-fusion, 1 token"]
    llava = methods["LLaVA-v1.5, 576 tokens"]
    first, frame = mini["first"]["total"] / plain["first"]["total"], mini["next_frame"] / plain["next_frame"]
    return (
        "What is counted at 7B. On a first question LLaVA-Mini is not the cheapest: "
        f"{_tera(mini['first']['total'])} T against {_tera(plain['first']['total'])} T of the same model without "
        f"pre-fusion, {first:.1f} times as much, and each further frame costs {frame:.1f} times as much "
        f"({_tera(mini['next_frame'])} T against {_tera(plain['next_frame'])} T), because all patches pass through "
        "pre-fusion. It wins against all tokens in the language model "
        f"({_tera(llava['first']['total'])} T, {_tera(llava['next_frame'])} T a frame), and on later questions, for "
        f"which pre-fusion runs the words alone: {_tera(mini['later']['0']['prefusion'])} T before the language model."
    )


def _says_latency(report: Report) -> str:
    rows = report.results["contestants"]
    ours = {name: one for name, one in rows.items() if name.startswith("LLaVA-Mini")}
    released = next(one for name, one in ours.items() if "released" in name)
    name, here = next((name, one) for name, one in ours.items() if "released" not in name)
    times = before_language_model(here["first_parts_ms"]) / before_language_model(here["later_parts_ms"])
    said = [
        f"{name}: a first question takes {_seconds(here['first_ms'])}, in the released order "
        f"{_seconds(released['first_ms'])}, {_ratio(released['first_ms'], here['first_ms'])} times as long. A later "
        f"question about the image takes {_seconds(here['later_ms'])}; what comes before the language model takes "
        f"{times:.0f} times less time than for the first one (goal: 15)."
    ]
    others = [f"{name} {_seconds(one['first_ms'])}" for name, one in rows.items() if name not in ours]
    said.append(f"First questions of the others: {', '.join(others)}.")
    if report.settings["hd"]:
        said.append("Of these only LLaVA-NeXT sees pictures of 672 px, too.")
    return " ".join(said)


def _says_video(report: Report) -> str:
    frames = max(one["frames"] for one in report.results["ways"] if one["way"] == "released")
    here, released = (
        {dtype: way(report, name, dtype, frames)["first_s"] for dtype in ("float32", "bfloat16")}
        for name in ("here", "released")
    )
    return (
        f"{frames} frames: {_ratio(released['float32'], here['bfloat16'])} times as fast in bfloat16 here as in the "
        "released order in float32 (goal: 4). Of equal formats the order of work alone gives "
        f"{_ratio(released['float32'], here['float32'])} times (float32) and "
        f"{_ratio(released['bfloat16'], here['bfloat16'])} times (bfloat16). What bounds it: matrix products in "
        "bfloat16 run near this CPU's rate, which is three times that of float32, but torch's attention on a CPU "
        "computes at the rate of float32 in either format. A later question runs the words alone: "
        f"{_words(median(way(report, 'here', 'bfloat16', frames)['later_s']))} against "
        f"{_words(median(way(report, 'released', 'bfloat16', frames)['later_s']))} in bfloat16. The chunks of "
        "16 frames that make the order here fast also make its peak the larger one."
    )


def _says_train(report: Report) -> str:
    rows = {(one["stage"], one["recompute"], one["order"]): one for one in report.results["ways"]}
    said = []
    for stage, again in {(stage, again): None for stage, again, _ in rows}:
        released, here, kept = (rows[stage, again, order]["seconds"] for order in ORDERS)
        said.append(
            f"Stage {stage}{_AGAIN[again]}: {_words(median(released))} in the released order, {_words(median(here))} "
            f"here ({_less(here, released)}), {_words(median(kept))} from kept features ({_less(kept, released)})"
        )
    peaks = {key: one["peak"]["host"] for key, one in rows.items()}
    of_stage_1 = [
        f"{_bytes(peaks[1, again, 'released'])} against {_bytes(peaks[1, again, 'here'])}{_AGAIN[again]}"
        for again in ("no", "yes")
    ]
    return (
        f"A step with {report.settings['samples']} images. {'. '.join(said)}. Two passes, shorter rows and logits of "
        "learned positions alone save little, because the language model's own work is most of it and the same in "
        "all orders, and with layers computed again those of pre-fusion are too, which the released code keeps; kept "
        "features save the vision tower. In stage 2 the order hardly counts for memory: gradients and the activations "
        f"of the language model are most of it. In stage 1 it does ({' and '.join(of_stage_1)}), for the logits of "
        "all positions."
    )


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _less(of: Sequence[float], to: Sequence[float]) -> str:
    return f"{1 - median(of) / median(to):.0%} less"


def _says_growth(report: Report) -> str:
    ways = [one for one in report.results["ways"] if one["way"] == "here"]
    least, most = min(ways, key=lambda one: one["frames"]), max(ways, key=lambda one: one["frames"])
    first, later = median(most["first_s"]), median(most["later_s"])
    said = (
        f"{most['frames']} frames, {report.settings['size']}: {_words(first)} to the first token of a first question, "
        f"{most['frames'] / first:.1f} frames a second, and {_words(later)} to that of a later one."
    )
    if most is least:
        return f"{said} It takes {most['peak']['host'] / 1e9:.2f} GB above the weights at most."
    growth = (most["peak"]["host"] - least["peak"]["host"]) / (most["frames"] - least["frames"])
    return f"{said} The peak grows by {growth / 1e3:.1f} kB a frame from {least['frames']} frames on."


def _says_memory(report: Report) -> str:
    ways = report.results["ways"]
    one, patches = ways["LLaVA-Mini, 1 token"]["kept"], ways["LLaVA-v1.5"]["kept"]
    mega = {name: f"{size / 1e6:.3g} MB" for name, size in one.items()}
    return (
        f"A frame keeps {mega['language_model']} in the language model as one token, and "
        f"{patches['language_model'] / 1e6:.3g} MB as all its patches. A later question needs {mega['prefusion']} of "
        f"it in pre-fusion, or {mega['features']} of vision features to compute these again."
    )


def _says_decode(report: Report) -> str:
    rows = report.results["ways"]
    decoded, ready = (rows[f"{name}, every frame"]["frames_per_second"] for name in ("frames_of", "processor.stream"))
    return (
        "Reading a film without any model. At one frame a second decoding is most of it; where every frame is seen, "
        f"making it ready is: {ready:.0f} frames a second against {decoded:.0f}."
    )


def _says_load(report: Report) -> str:
    seconds = {name: median(times) for name, times in report.results["seconds"].items()}
    said = [
        f"New processes of the embedded model: {_words(seconds['help'])} to the help, "
        f"{_words(seconds['whole process'])} for one that answers a few times, nearly all of it imports; its first "
        f"answer takes {_words(seconds['first answer'])}, the same answer for the third time "
        f"{_words(seconds['third answer'])}."
    ]
    if "another picture" in seconds:
        said.append(f"Once warm, a picture not seen before takes {_words(seconds['another picture'])} (goal: 30 ms).")
    if "repeated answer" in seconds:
        said.append(f"Asked about again and again, {_words(seconds['repeated answer'])} (goal: 15 ms).")
    return " ".join(said)


def _tera(operations: float) -> str:
    return f"{operations / 1e12:.2f}" if operations >= 1e11 else f"{operations / 1e12:.3f}"


def _seconds(milliseconds: Sequence[float]) -> str:
    return _words(median(milliseconds) / 1e3)


def _words(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


def _ratio(of: Sequence[float], to: Sequence[float]) -> str:
    return f"{median(of) / median(to):.2f}"


SECTIONS = (
    Section(name="flops", title="Operations at 7B, counted", says=_says_flops, draw=_draw_flops, size=(8, 9)),
    Section(
        name="latency-middle",
        title="One image, middle size",
        says=_says_latency,
        draw=_draw_latency,
        size=(8, 6),
    ),
    Section(
        name="latency-hd-middle",
        title="One image at 672 px, middle size",
        says=_says_latency,
        draw=_draw_latency,
        size=(8, 5),
    ),
    Section(
        name="video-middle", title="Frames of a film, middle size", says=_says_video, draw=_draw_video, size=(8, 4.5)
    ),
    Section(name="video-tiny-10000", title="10,000 frames, embedded size", says=_says_growth, draw=_draw_growth),
    Section(name="video-middle-256", title="256 frames, middle size", says=_says_growth),
    Section(name="memory-middle", title="Memory, middle size", says=_says_memory, draw=_draw_kept),
    Section(name="train-middle", title="A step of training, middle size", says=_says_train, draw=_draw_train),
    Section(name="decode", title="Decoding alone", says=_says_decode, draw=_draw_decode, size=(8, 2.6)),
    Section(name="load", title="The embedded model from nothing", says=_says_load, draw=_draw_load),
)
"""In the order of the page."""


def main() -> None:
    """Write the page and the pictures."""
    reports = read_reports()
    (FOLDER / "results.md").write_text(page(reports), encoding="utf-8")
    for section in SECTIONS:
        if section.draw is not None:
            draw(section, reports[section.name], FOLDER / f"{section.name}.png")


if __name__ == "__main__":
    main()
