"""What the site shows of the repository outside ``docs/``, and links to it.

A page links to any file of the repository by its relative path, as a reader of it would. Reports
and the pages for contributors are pages of the site too. A link to anything else, which no site can
follow, becomes its text and the path. A broken link is left for the strict build to refuse.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("CONTRIBUTING.md", "CHANGELOG.md", "reports/**/*.md", "reports/**/*.png")
"""Of the repository outside ``docs/``."""
FENCE = re.compile(r"^(```+).*?^\1\n", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside ``docs/`` that are shown."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links as the site has them, and fences without words for the tests."""
    source = Path(str(page.file.abs_src_path)).relative_to(ROOT)
    if source.name == "results.md":  # tables of a thousand numbers hide what is searched for
        page.meta["search"] = {"exclude": True}
    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [_links(markdown[end : fence.start()], source, page.file, files)]
        pieces += [re.sub(r"\A(```\w+) .*", r"\1", fence[0])]
        end = fence.end()
    return "".join([*pieces, _links(markdown[end:], source, page.file, files)])


def _links(text: str, source: Path, file: File, files: Files) -> str:
    return LINK.sub(lambda link: _link(link, source, file, files), text)


def _link(link: re.Match[str], source: Path, file: File, files: Files) -> str:
    path, hash_sign, anchor = link[2].partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link[0]
    target = Path(os.path.normpath(source.parent / path))
    name = _page(target).as_posix().removeprefix("docs/")
    if files.get_file_from_path(name):
        relative = os.path.relpath(name, os.path.dirname(file.src_uri))
        return f"[{link[1]}]({relative}{hash_sign}{anchor})"
    if (ROOT / target).exists() and target.parts[0] != "docs":
        shown = target.as_posix()
        says_it = link[1].strip("`/").lower() in shown.lower()
        return f"`{shown}`" if says_it else f"{link[1]} (`{shown}`)"
    return link[0]


def _page(target: Path) -> Path:
    """A folder is shown by its ``README.md``."""
    return target / "README.md" if (ROOT / target).is_dir() else target
