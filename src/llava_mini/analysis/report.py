"""The page: one HTML file that needs nothing else, with its pictures and tables as files beside it.

Everything is written into a folder of another name, which takes the place of the right one when it is complete.
"""

import base64
import html
import io
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from llava_mini.analysis.charts import new_figure
from llava_mini.analysis.findings import AnalysisSettings, Findings
from llava_mini.analysis.sections import Section, sections
from llava_mini.analysis.subject import Subject
from llava_mini.analysis.tables import claims, csv_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, ABOUT = "index.html", "about.json"
"""The page, and the facts of the analysis, with the names of its files: by them it is known again."""

_DOTS_PER_INCH = 100


def check_output(folder: Path) -> None:
    """See that an analysis can be written, before the work for it is done.

    Raises:
        ValueError: matplotlib is missing, or the folder is a file or holds files that no analysis wrote.
    """
    new_figure(1, 1)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file. Give the name of a folder for the page and its pictures.")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    if others := sorted(present - _files_of(folder)):
        raise ValueError(
            f"The folder {str(folder)!r} holds {others[0]!r}, which no analysis wrote. Give a new folder, or that of "
            "an earlier analysis, which is replaced."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)


def write_report(
    folder: Path, subject: Subject, found: Findings, settings: AnalysisSettings, facts: Mapping[str, object]
) -> Path:
    """Write the page with its pictures and tables, and return its path.

    Args:
        folder: Checked by ``check_output``; an earlier analysis in it is replaced when this one is complete.
        subject: Who was analysed.
        found: What was found.
        settings: What was asked for.
        facts: What else there is to know: the data, and what it ran on.
    """
    folder = folder.resolve()
    draft, old = (folder.with_name(f".{folder.name}.{ending}") for ending in ("draft", "old"))
    for left in (draft, old):
        shutil.rmtree(left, ignore_errors=True)
    parts = sections(found)
    pictures = {f"{name}.png": _png(figure) for part in parts for name, figure in part.figures.items()}
    files = csv_files(found)
    about = {
        "model": subject.name,
        "family": subject.family,
        **subject.details,
        "answers": settings.answers,
        "questions": found.questions,
        **facts,
        "claims": claims(found),
        "files": sorted([PAGE, ABOUT, *pictures, *files]),
    }
    page = _page(_opening(subject, found, settings), found, facts, parts, pictures)
    draft.mkdir()
    for name, data in pictures.items():
        (draft / name).write_bytes(data)
    for name, text in {**files, PAGE: page, ABOUT: json.dumps(about, indent=2) + "\n"}.items():
        (draft / name).write_text(text, encoding="utf-8")
    check_output(folder)  # it may have changed while the work was done
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder / PAGE


def _opening(subject: Subject, found: Findings, settings: AnalysisSettings) -> tuple[str, str]:
    """The heading and the first words."""
    whose = "its own greedy answer" if settings.answers == "model" else "the right answer"
    details = "".join(f", {name} {value}" for name, value in subject.details.items())
    words = (
        f"{subject.family}, {len(subject.attentions)} layers in the language model{details}. {found.questions} "
        f"questions, {mean(found.right):.1%} answered rightly; on average {mean(found.vision_tokens):.0f} vision "
        f"tokens and {mean(found.response_tokens):.1f} response tokens. The response is {whose}, without the token "
        "that ends it."
    )
    return f"{subject.name}: what it looks at", words


def _page(
    opening: tuple[str, str],
    found: Findings,
    facts: Mapping[str, object],
    parts: Sequence[Section],
    pictures: Mapping[str, bytes],
) -> str:
    title, words = map(html.escape, opening)
    rows = "".join(
        f"<tr><td>{html.escape(claim)}</td><td>{html.escape(here)}</td></tr>\n" for claim, here in claims(found)
    )
    known = html.escape("; ".join(f"{name}: {value}" for name, value in facts.items() if value != ""))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{words}</p>
<table>
<tr><th>The paper, of LLaVA-1.5 and LLaVA-NeXT</th><th>Here</th></tr>
{rows}</table>
{"".join(_html(part, pictures) for part in parts)}
<p class="small">{known}</p>
</body>
</html>
"""


_STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; color: #222; background: #fff; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ccc; }
.small { font-size: .85rem; color: #555; }
img + .small { margin: -.6rem 0 1.8rem; }
"""


def _html(part: Section, pictures: Mapping[str, bytes]) -> str:
    title = html.escape(part.title)
    lines = [f"<h2>{title}</h2>", f"<p>{html.escape(part.text)}</p>"]
    for name in part.figures:
        data = base64.b64encode(pictures[f"{name}.png"]).decode()
        lines.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
        lines += [f'<p class="small">{html.escape(part.captions[name])}</p>'] if name in part.captions else []
    files = ", ".join([*(f"{name}.png" for name in part.figures), part.data])
    return "\n".join([*lines, f'<p class="small">{files}</p>', ""])


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the page has in words what the font cannot draw
        figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def _files_of(folder: Path) -> set[str]:
    """Names of the files that an earlier analysis wrote there."""
    try:
        return set(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
