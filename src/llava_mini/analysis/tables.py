"""The numbers behind the pictures, as rows of CSV files, and beside what the paper says."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from llava_mini.analysis.attention_stats import PARTS, Spread
from llava_mini.analysis.drop_layers import Dropped, by_medium
from llava_mini.analysis.findings import Averages, Example, Findings
from llava_mini.analysis.fusion import SOURCES, TEXTS
from llava_mini.analysis.pointing import LINES
from llava_mini.analysis.words import MOST_WORD_LAYERS, chosen_layers

Row = tuple[str | int | float, ...]


def csv_files(found: Findings) -> dict[str, str]:
    """Return the text of each CSV file by its name."""
    tables: dict[str, tuple[Row, Iterable[Row]]] = {}
    head = ("layer", "from", "to", "share", "share_deviation", "entropy_nats", "entropy_share", "prompts")
    if found.attention is not None:
        tables["attention.csv"] = head, _pairs(found.attention, PARTS, PARTS)
    if found.fusion is not None:
        tables["prefusion.csv"] = head, _pairs(found.fusion, TEXTS, SOURCES)
    if found.dropped:
        head_of_dropped = ("about", "series", "layers", "right", "low", "high", "blind_guess", "questions")
        tables["dropped.csv"] = head_of_dropped, _dropped(found.dropped)
    if found.pointing:
        tables["pointing.csv"] = ("where", "layer", *LINES, "names"), _pointing(found.pointing)
    place = ("row", "column", "share")
    tables["frames.csv"] = ("question", "layer", "frame", "share"), _frames(found.examples)
    tables["maps.csv"] = ("question", "picture", "layer", *place), _maps(found.examples)
    tables["words.csv"] = ("where", "question", "word", "frame", "layer", "in_all", *place), _words(found.examples)
    tables["queries.csv"] = ("question", "frame", "query", *place), _queries(found.examples)
    texts = {name: _text(head, rows) for name, (head, rows) in tables.items()}
    return {name: text for name, text in texts.items() if text.count("\n") > 1}


EARLY = "Attention from {} to vision is high in early layers and low in late ones."
INSTRUCTION = "In late layers over 80 % of attention goes to instruction tokens."
ENTROPY = "The entropy of attention to vision tokens is higher in early layers."
DROPPED = "Answers are lost without vision tokens in early layers, and hardly touched without them in late ones."


def claims(found: Findings) -> list[tuple[str, str]]:
    """Return what the paper says of LLaVA-1.5 and LLaVA-NeXT, each with what was found here.

    Early and late are the first and the last quarter of the layers, or the first and the last range of those in which
    vision tokens were dropped.
    """
    rows: list[tuple[str, str]] = []
    if found.attention is not None:
        share, entropy = found.attention.share.mean, found.attention.entropy.mean
        for source in ("instruction", "response"):
            early, late = _ends(share, source, "vision")
            rows.append((EARLY.format(source), f"{early:.1%} early, {late:.1%} late"))
        late, first = (_ends(share, "response", target)[1] for target in ("instruction", "first token"))
        rows.append((INSTRUCTION, f"{late:.1%} of that from the response; {first:.1%} to the first token alone"))
        early, late = _ends(entropy, "response", "vision")
        if min(found.vision_tokens) > 1:
            rows.append((ENTROPY, f"{early:.2f} nats early, {late:.2f} late, from the response"))
    if found.dropped:
        nowhere = next(way for way in found.dropped if way.series == "nowhere")
        first, *_, last = [way for way in found.dropped if way.series == "in a range"] * 2
        without = (f"{way.right:.1%} without them in {way.in_words}" for way in (first, last))
        rows.append((DROPPED, f"{nowhere.right:.1%} right with all, {', '.join(without)}"))
    return [(claim, here) for claim, here in rows if "nan" not in here]


def _ends(table: Tensor, source: str, target: str) -> tuple[float, float]:
    """Means over the first and the last quarter of the layers."""
    line = table[:, PARTS.index(source), PARTS.index(target)]
    size = max(len(line) // 4, 1)
    return float(line[:size].mean()), float(line[-size:].mean())


def _pairs(averages: Averages, rows: Sequence[str], columns: Sequence[str]) -> Iterable[Row]:
    for layer in range(len(averages.share.mean)):
        for a, source in enumerate(rows):
            for b, target in enumerate(columns):
                at = (layer, a, b)
                yield (
                    layer + 1,
                    source,
                    target,
                    *(float(table[at]) for table in (averages.share.mean, averages.share.deviation)),
                    float(averages.entropy.mean[at]),
                    float(averages.evenness.mean[at]),
                    int(averages.share.count[at]),
                )


def _dropped(ways: Sequence[Dropped]) -> Iterable[Row]:
    for about, group in {"all": ways, **by_medium(ways)}.items():
        for way in group:
            guess = math.nan if way.guess is None else way.guess
            yield about, way.series, way.layers, way.right, *way.interval, guess, len(way.marks)


def _pointing(spreads: Mapping[str, Spread]) -> Iterable[Row]:
    for where, spread in spreads.items():
        for layer, values in enumerate(spread.mean[:, 0].tolist(), 1):
            yield where, layer, *values, int(spread.count.max())


def _frames(examples: Sequence[Example]) -> Iterable[Row]:
    for number, example in enumerate(examples, 1):
        if example.by_frame.shape[1] > 1:
            yield from ((number, *cell) for cell in _cells(example.by_frame))


def _maps(examples: Sequence[Example]) -> Iterable[Row]:
    for number, example in enumerate(examples, 1):
        for canvas in example.canvases:
            for layer, values in enumerate(example.reading if canvas.paint is not None else (), 1):
                assert canvas.paint is not None
                yield from ((number, canvas.title, layer, *cell) for cell in _cells(canvas.paint(values)))


def _words(examples: Sequence[Example]) -> Iterable[Row]:
    for number, example in enumerate(examples, 1):
        for where, word in ((where, word) for where, words in example.words.items() for word in words):
            for frame, maps in enumerate(word.maps):
                for layer in chosen_layers(len(maps), MOST_WORD_LAYERS):
                    facts = (where, number, word.word, frame + 1, layer + 1, float(word.share[frame, layer]))
                    yield from ((*facts, *cell) for cell in _cells(maps[layer]))


def _queries(examples: Sequence[Example]) -> Iterable[Row]:
    for number, example in enumerate(examples, 1):
        for frame, look in enumerate(example.looks, 1):
            for query, values in enumerate(look.maps, 1):
                yield from ((number, frame, query, *cell) for cell in _cells(values))


def _cells(values: Tensor) -> Iterable[tuple[int, int, float]]:
    for row, line in enumerate(values.tolist(), 1):
        for column, value in enumerate(line, 1):
            yield row, column, value


def _text(head: Row, rows: Iterable[Row]) -> str:
    """A table as CSV; what there is not is left empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_shown(value) for value in row] for row in rows)
    return buffer.getvalue()


def _shown(value: str | int | float) -> str | int:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
