"""The code blocks of README.md and docs/ run as they are printed.

Blocks of a page run in their order, in a folder of their own that holds ``examples/``. Python blocks of
a page share their names; a bash block holds ``llava-mini`` commands. A block that cannot run here is
marked on the line above it: ``<!-- not run: hub -->`` (or gpu, machines, make).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

import llava_mini
from llava_mini.model.reducers import REDUCERS
from llava_mini.reducer_settings import REDUCER_SETTINGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = ("hub", "gpu", "machines", "make")
LANGUAGES = ("python", "bash", "text")

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: (\w+) -->\n$")

NOT_RUN = {"make": 1, "hub": 4, "gpu": 1, "machines": 1}
"""How many blocks carry which mark. A new one is a decision: change it here."""
FEWEST_RUN = {"python": 6, "bash": 3}
"""Blocks that run, at least."""


on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    reason: str
    """Why it is not run. Empty: it is."""


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        mark = MARK.search(text[: fence.start()])
        found.append(Block(fence["language"], fence["code"], mark[1] if mark else ""))
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), (
        f"{page.name} has a fence that is not closed."
    )
    return found


@on_every_page
def test_every_block_has_a_language_and_a_known_mark(page):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page.name}: say what this is, one of {LANGUAGES}:\n{block.code}"
        assert block.reason in ("", *REASONS), f"{page.name}: unknown mark {block.reason!r}"


def test_as_many_blocks_are_marked_and_run_as_should_be():
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language != "text"]
    assert Counter(block.reason for block in blocks if block.reason) == NOT_RUN
    run = Counter(block.language for block in blocks if not block.reason)
    assert all(run[language] >= least for language, least in FEWEST_RUN.items()), run


def test_index_links_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [path for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".png") and path.name != "README.md"]
    assert len(pages) >= 3
    assert not [page.name for page in pages if f"]({page.name})" not in index]


@on_every_page
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_tests_named_on_a_page_exist():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(named) >= 10
    assert named <= {name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def test_the_reference_has_every_public_name():
    shown = re.findall(
        r"^::: llava_mini\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(shown) == sorted(llava_mini.__all__)


@on_every_page
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    names = {"__name__": "__docs__"}
    with patch.dict(REDUCERS), patch.dict(REDUCER_SETTINGS):  # a page adds to them
        for block in blocks_of(page):
            if block.reason or block.language == "text":
                continue
            if block.language == "python":
                exec(compile(block.code, f"{page.name}:block", "exec"), names)
            else:
                run_commands(block.code)


def run_commands(code: str) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "llava-mini", f"Only llava-mini commands run here: mark the block, or change {line!r}"
        done = subprocess.run(
            [sys.executable, "-m", "llava_mini_cli", *words[1:]],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
