"""What mkdocs.yml cannot say: pages that lie outside docs/, and links written for readers of the repository."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "STYLE.md": "style.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages beside docs/, with what the site calls them."""
IN_REPOSITORY = {name: path for path, name in OUTSIDE.items()}

CODE = r"```.*?```|`[^`]*`"
LINK = r"(?P<before>!?\[(?P<text>[^\]]*)\])\((?![a-z]+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
CODE_OR_LINK = re.compile(f"{CODE}|{LINK}", re.DOTALL)
FROM_THE_NETWORK = re.compile(r"""<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//[^"]*""")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of ``OUTSIDE``."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead each relative link to where its file is on the site; of a link to what is not on it, leave the text.

    Raises:
        PluginError: the repository has no such file.
    """
    name = page.file.src_uri
    folder = posixpath.dirname(IN_REPOSITORY.get(name, f"docs/{name}"))

    def led(found: re.Match[str]) -> str:
        if found["path"] is None:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, found["path"]))
        if not (ROOT / path).exists():
            raise PluginError(f"{name} links to {path}, which is not in the repository.")
        target = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if files.get_file_from_path(target):
            from_here = posixpath.relpath(target, posixpath.dirname(name) or ".")
            return f"{found['before']}({from_here}{found['anchor'] or ''})"
        return found["text"] if path.endswith(found["text"]) else f"{found['text']} (`{path}`)"

    return CODE_OR_LINK.sub(led, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Hold the site to what mkdocs.yml promises.

    Raises:
        PluginError: the page would load something from the network.
    """
    if found := FROM_THE_NETWORK.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from the network: {found[0]}")
    return output
