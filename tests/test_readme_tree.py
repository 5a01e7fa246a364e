"""The tree in README.md is the one on the disk."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "src/llava_mini"


def tree_of_readme() -> set[str]:
    """Paths in the block below the heading 'The tree'; two blanks of indent are one folder."""
    block = re.search(r"## The tree\n.*?```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README.md has no tree."
    folders: list[str] = []
    paths = set()
    for line in block[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], name.rstrip("/")]
        paths.add("/".join(folders))
        assert name.endswith("/") == (ROOT / "/".join(folders)).is_dir(), (
            f"{name}: folders end with a slash, files do not"
        )
    return paths


def names_in(folder: Path) -> set[str]:
    """Names on the disk that belong to the project: none that git ignores, none that are hidden."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    return {path.name for path in folder.iterdir() if path.name not in ignored and not path.name.startswith(".")}


def test_tree_names_what_exists():
    paths = tree_of_readme()
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_tree_is_complete_at_the_top_and_in_the_package():
    paths = tree_of_readme()
    listed = {path for path in paths if "/" not in path and not path.startswith(".")}
    assert listed == names_in(ROOT)
    in_package = {path.removeprefix(f"{PACKAGE}/") for path in paths if path.startswith(f"{PACKAGE}/")}
    assert {path.partition("/")[0] for path in in_package} == names_in(ROOT / PACKAGE)
