"""The documentation site: its strict build, its reference, its pictures."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import factorlm

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="no mkdocs: pip install '.[docs]'"
)


def public_names() -> list[tuple[str, str]]:
    """(package, name) of everything that a package at any depth under ``factorlm`` or itself
    exports."""
    files = sorted((ROOT / "src").glob("factorlm/*/**/__init__.py"))
    names = [".".join(path.parent.relative_to(ROOT / "src").parts) for path in files]
    assert "factorlm.scaling.ladder.executors" in names
    names.remove("factorlm.testing.battery")  # exports nothing; pytest rewrites it when first used
    modules = [importlib.import_module(name) for name in names]
    named = [(one.__name__, name) for one in modules for name in getattr(one, "__all__", ())]
    return named + [(f"factorlm.{home}", name) for name, home in factorlm._EXPORTS.items()]


def build(folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


@pytest.mark.slow
@needs_mkdocs
def test_reference_has_every_public_name(site: Path) -> None:
    """Under its package, or where it is defined."""
    found = {
        name
        for page in (site / "reference" / "api").glob("*.html")
        for name in re.findall(r'id="([\w.]+)"', page.read_text(encoding="utf-8"))
    }
    missing = []
    for package, name in public_names():
        served = getattr(importlib.import_module(package), name)
        if not found & {f"{package}.{name}", f"{getattr(served, '__module__', '')}.{name}"}:
            missing.append(f"{package}.{name}")
    assert not missing


def test_index_of_the_reference_has_the_top_level_names() -> None:
    text = (ROOT / "docs/reference/api/index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \| .* \| \[(\w+)\]", text, flags=re.MULTILINE)
    named = {name: home for names, home in rows for name in re.findall(r"`(\w+)`", names)}
    assert named == {name: home.split(".")[0] for name, home in factorlm._EXPORTS.items()}


@pytest.mark.slow
@needs_mkdocs
def test_links_out_of_docs_are_pages_or_text(site: Path) -> None:
    text = (site / "concepts" / "pre-merge.html").read_text(encoding="utf-8")
    assert 'href="../reports/speed/index.html"' in text
    text = (site / "how-to" / "use-in-your-own-loop.html").read_text(encoding="utf-8")
    assert "<code>examples/hf_trainer.py</code>" in text
    assert (site / "reports" / "speed" / "premerge_3_avx512.png").exists()


@pytest.mark.slow
@needs_mkdocs
def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?://[^"]+)"')
    found = {
        (page.name, url)
        for page in pages(site)
        for url in fetched.findall(page.read_text(encoding="utf-8"))
    }
    assert len(pages(site)) > 40
    assert not found


@pytest.mark.slow
@needs_mkdocs
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[there](nowhere.md)", "nowhere.md"),
        ("[there](../reports/nowhere/)", "nowhere"),
        ("[there](concepts/structures.md#nowhere)", "#nowhere"),
    ],
)
def test_strict_build_refuses_a_broken_link(text: str, said: str, tmp_path: Path) -> None:
    for name in ("docs", "reports", "src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / "index.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0
    assert said in done.stderr


# Pictures ------------------------------------------------------------------------------------


def drawn(path: Path) -> tuple[list[str], list[float]]:
    """A picture as its text and its numbers."""
    text = path.read_text(encoding="utf-8")
    return NUMBER.split(text), [float(number) for number in NUMBER.findall(text)]


@pytest.mark.slow
def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "docs" / "pictures"), str(tmp_path)]
    subprocess.run(script, check=True, cwd=ROOT, capture_output=True)
    committed = {path.name for path in IMAGES.glob("*.svg")}
    assert committed == {path.name for path in tmp_path.iterdir()}
    for name in sorted(committed):
        (text, numbers), (new_text, new_numbers) = drawn(IMAGES / name), drawn(tmp_path / name)
        assert text == new_text, f"{name}: python docs/pictures draws it anew"
        np.testing.assert_allclose(numbers, new_numbers, atol=0.01, err_msg=name)


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.svg")), ids=lambda path: str(path.name))
def test_picture_is_on_a_page_and_follows_its_colours(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "@media(prefers-color-scheme:dark)" in text
    assert not re.findall(r"(?:fill|stroke): #(?:000000|ffffff|333333)", text)
    alts = [
        alt
        for page in (ROOT / "docs").rglob("*.md")
        for alt in re.findall(rf"!\[([^\]]*)\]\([./]*images/{path.name}\)", page.read_text("utf-8"))
    ]
    assert alts
    assert all(len(alt) > 20 for alt in alts), "what it shows, for those who do not see it"
