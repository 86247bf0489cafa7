"""A hook of mkdocs: what pages link to outside docs/ (figures, results, the changelog) becomes part of the site.

A link such as ``../benchmarks/results/demo.png`` leads somewhere in a checkout; in the site the file stands at
``repository/benchmarks/results/demo.png``, and the link is rewritten to it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()[^)\s#]+")
PREFIX = "repository/"
# Pages of the navigation that stand outside docs/.
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def path_of(uri: str) -> str:
    """A file's place in the repository, by its place in the site."""
    return uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"


def uri_of(path: str) -> str:
    """The inverse of `path_of`."""
    return path.removeprefix("docs/") if path.startswith("docs/") else PREFIX + path


def target_of(page: str, link: str) -> str | None:
    """The file of the repository that a link of a page leads to; None where it leads elsewhere."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(path_of(page)), link))
    return None if path.startswith("..") or not (ROOT / path).is_file() else path


def on_files(files: Any, config: Any) -> Any:
    """Adds the files that pages lead to, and those that these lead to."""
    pages = [file for file in files if file.is_documentation_page()]

    def add(path: str) -> None:
        if files.get_file_from_path(uri_of(path)) is None:
            source = str(ROOT / path)
            made = File.generated(config, uri_of(path), abs_src_path=source, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(made)
            pages.extend([made] if made.is_documentation_page() else [])

    for path in OUTSIDE:
        add(path)
    for page in pages:  # which grows meanwhile
        for path in targets(page):
            add(path)
    return files


def targets(page: Any) -> Iterator[str]:
    """The files of the repository that a page links to."""
    text = (ROOT / path_of(page.src_uri)).read_text(encoding="utf-8")
    yield from filter(None, (target_of(page.src_uri, link) for link in LINK.findall(text)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site."""

    def rewritten(link: re.Match[str]) -> str:
        path = target_of(page.file.src_uri, link[0])
        return link[0] if path is None else posixpath.relpath(uri_of(path), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings have a few of Sphinx's marks, which Markdown shows as they are."""
    return re.sub(r":(?:class|func|meth):(?=<code>)", "", html).replace("::</p>", ":</p>")
