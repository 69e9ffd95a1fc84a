"""What the pages show is executed: code runs, command lines parse, links lead somewhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tests.pages import (
    PAGES,
    ROOT,
    all_blocks,
    blocks,
    name_of,
    other_lines,
    page_lines,
    pages_with,
)

from factorlm.cli.main import command_names, full_names, main
from factorlm.data import PrepareConfig, prepare
from factorlm.hf import preset_config
from factorlm.layers import STRUCTURES
from factorlm.scaling.ladder import load_ladder
from factorlm.scaling.ladder.plan import Plan
from factorlm.train.assemble import build_model
from factorlm.train.config import TrainConfig
from factorlm.train.recipe import load_recipe

DEMO = ROOT / "recipes" / "demo_dense.yaml"
KINDS = {"python", "sh", "yaml", "yaml ladder", "json", ""}
"""Of code blocks; those of none are output and trees."""
RUNS = re.compile(
    r"^\s*(?:\$ *|>>> *)?(?:factorlm|torchrun|python|pip|make|import|from) ", re.MULTILINE
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_of_a_kind_that_tests_know(page: Path) -> None:
    """And none hides from them: indented, fenced otherwise, or without its kind."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found = all_blocks(page)
    assert {block.kind for block in found} <= KINDS
    assert sum(bool(re.match(r"\s*(?:>\s*)?(?:`{3,}|~{3,})", line)) for line in lines) == 2 * len(
        found
    )
    hidden = [block.line for block in found if block.kind == "" and RUNS.search(block.text)]
    assert not hidden, f"{name_of(page)}: lines {hidden} want a kind"


# Code ----------------------------------------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Structures that a page registers are gone afterwards."""
    monkeypatch.setattr(STRUCTURES, "_entries", dict(STRUCTURES._entries))


def save_files(page: Path, folder: Path) -> None:
    """Blocks whose first line is ``# name.py`` are files."""
    for block in blocks(page, "python"):
        match = re.match(r"# (\w+\.py)\n", block.text)
        if match:
            (folder / match[1]).write_text(block.text, encoding="utf-8")


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text where the demo has the standard library."""
    folder = tmp_path_factory.mktemp("text") / "data" / "python-stdlib"
    source = str(ROOT / "docs" / "concepts")
    prepare(PrepareConfig(sources=(source,), output=str(folder), tokenizer="bytes", workers=1))
    return folder


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_runs(
    page: Path, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a page in order, in one namespace, in a folder with the recipes and with a
    little text where the demo has its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACTORLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "data").symlink_to(demo_data.parent)
    monkeypatch.syspath_prepend(tmp_path)
    save_files(page, tmp_path)
    known = set(sys.modules)
    namespace: dict[str, object] = {"__name__": "page"}
    with torch.random.fork_rng():
        for block in blocks(page, "python"):
            if not block.text.startswith("# "):
                code = compile("\n" * block.line + block.text, str(page), "exec")
                exec(code, namespace)
    for path in tmp_path.glob("*.py"):
        assert path.stem in {*sys.modules} - known or path.stem.startswith("test_")
        sys.modules.pop(path.stem, None)


@pytest.mark.slow
def test_the_structure_of_the_page_passes_the_battery(tmp_path: Path) -> None:
    save_files(ROOT / "docs" / "how-to" / "add-a-structure.md", tmp_path)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers = slow: takes seconds\npythonpath = .\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "test_block_diagonal.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d{3} passed", done.stdout)


@pytest.mark.parametrize("page", pages_with("yaml"), ids=name_of)
def test_yaml_is_part_of_a_recipe(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block over the demo's recipe is a run that can be built; ``my_dense_model`` is one."""
    monkeypatch.chdir(tmp_path)
    preset_config("gpt_nano").save_pretrained("my_dense_model")
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block.text)
        values.pop("extends", None)
        config = TrainConfig.from_dict(yaml.safe_load(DEMO.read_text()) | {"name": "page"} | values)
        build_model(config)


@pytest.mark.parametrize("page", pages_with("yaml ladder"), ids=name_of)
def test_a_ladder_can_be_planned(page: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "ladder").mkdir()
    for block in blocks(page, "yaml ladder"):
        path = tmp_path / "ladder" / "ladder.yaml"
        path.write_text(block.text)
        plan = Plan(load_ladder(path))
        runs, _ = plan.known(lambda found: {run.name: abs(run.rate - 8e-3) for run in found})
        assert all(plan.describe(run).training.model_flops > 0 for run in runs)


# Commands ------------------------------------------------------------------------------------


def parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``words`` after ``factorlm``: the command gets as far as its work; its recipe is one."""
    name = next(name for name in full_names() if words[: len(name.split())] == name.split())
    command = importlib.import_module(f"factorlm.cli.{name.replace(' ', '.')}")
    calls = []
    monkeypatch.setattr(command, "run", lambda args, extra: calls.append((args, extra)) or 0)
    assert main(words) == 0, words
    ((args, extra),) = calls
    if hasattr(args, "recipe"):
        path = ROOT / args.recipe
        load_recipe(path if path.exists() or "my_" not in path.name else DEMO, extra)


LINES = [*page_lines(), *other_lines()]


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{p}: {' '.join(w)}" for p, w in LINES])
def test_command_line_parses(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "torchrun":
        start = words.index("-m")
        assert words[start + 1] == "factorlm"
        words = words[start + 1 :]
    parses(words[1:], monkeypatch)


def test_readme_explains_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `factorlm (\w+)` \|", text, flags=re.MULTILINE)) == {
        *command_names()
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_exist(page: Path) -> None:
    named = re.findall(r"`factorlm (\w+)", page.read_text(encoding="utf-8"))
    assert set(named) <= set(command_names())


# Links ---------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its code blocks and comments."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)}: {target}"
        assert found.is_relative_to(ROOT), f"{name_of(page)}: {target}"
        assert not anchor or anchor in anchors(found), f"{name_of(page)}: {target}"
