"""The project's pages, and what is in their code blocks."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from factorlm.cli.main import full_names

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "reports").rglob("*.md")]
)


class Block(NamedTuple):
    """A fenced block of a page."""

    kind: str
    """The words after the fence: ``python``, ``sh``, ``yaml``, ``yaml ladder``, ..."""
    line: int
    text: str


def all_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(m[1].strip(), text[: m.start()].count("\n") + 1, m[2]) for m in found]


def blocks(page: Path, kind: str) -> list[Block]:
    return [block for block in all_blocks(page) if block.kind == kind]


def pages_with(kind: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, kind)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def command_lines(text: str) -> list[list[str]]:
    """The words of every line that runs ``factorlm``; one that ends in ``\\`` goes on."""
    lines = re.findall(
        r"^ *((?:factorlm|torchrun) .*)", text.replace("\\\n", " "), flags=re.MULTILINE
    )
    return [shlex.split(line, comments=True) for line in lines]


def page_lines(folder: str = "") -> list[tuple[str, list[str]]]:
    """Command lines of the pages whose name begins with ``folder``, each beside that name."""
    return [
        (name_of(page), words)
        for page in pages_with("sh")
        if name_of(page).startswith(folder)
        for block in blocks(page, "sh")
        for words in command_lines(block.text)
    ]


def other_lines() -> list[tuple[str, list[str]]]:
    """Command lines of the recipes' comments and of the commands' own examples."""
    found = []
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        comments = re.sub(r"^(# ?)?", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        found += [(path.name, words) for words in command_lines(comments)]
    for name in full_names():
        epilog = importlib.import_module(f"factorlm.cli.{name.replace(' ', '.')}").EPILOG
        found += [(f"{name} --help", words) for words in command_lines(epilog)]
    return found
