"""The repository says the truth about itself: its layout, its packages, its recipes, its size."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import factorlm
import factorlm.testing.contract  # before the battery, whose asserts it has pytest rewrite
from factorlm.train.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "factorlm"
FOLDERS = ("src", "tests", "docs", "examples", "benchmarks", "recipes", "reports", ".ci")
MAX_LINES = 400
"""A file this long has eaten its neighbours; half of it is usual."""
MAX_TEST_LINES = 500
"""Tests of one file stay in one file."""
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:work|home|root|Users|mnt|scratch)/[\w.]|[A-Z]:\\\\[A-Za-z]")


def text_files() -> list[Path]:
    """Everything that a person wrote; pictures and build products left out."""
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", ".sh", ".json", ".jsonl", ""}
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    hidden = {"__pycache__", ".pytest_cache"}
    return sorted(
        path
        for path in found
        if path.suffix in kinds
        and not hidden & set(path.parts)
        and not any(part.endswith(".egg-info") for part in path.parts)
    )


def packages() -> list[str]:
    folders = sorted(path.parent.relative_to(ROOT / "src") for path in PACKAGE.rglob("__init__.py"))
    return [".".join(folder.parts) for folder in folders]


def test_no_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ABSOLUTE.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_search_for_paths_finds_one() -> None:
    assert ABSOLUTE.search("folder = " + "/home" + "/somebody/data")
    assert not ABSOLUTE.search("https://example.org" + "/home" + "/page")


def test_no_file_has_eaten_its_neighbours() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in text_files()
        if path.suffix in (".py", ".md")
    }
    limits = {
        path: MAX_TEST_LINES if ROOT / "tests" in path.parents else MAX_LINES for path in lengths
    }
    too_long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > limits[p]}
    assert not too_long


def marked(page: str, name: str) -> str:
    """What stands between ``<!-- name -->`` and ``<!-- end -->`` on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"<!-- {name} -->(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert len(found) == 1, f"{page}: {name}"
    return str(found[0])


def tree_of_readme() -> list[str]:
    """Folders that the README's tree names, relative to the repository."""
    found, parents = [], [""]
    for line in marked("README.md", "tree").splitlines():
        match = re.match(r"^([│ ]*)[├└]── (\S+)/(?:\s|$)", line)
        if match:
            depth = len(match[1]) // 4
            parents = [*parents[: depth + 1], f"{parents[depth]}{match[2]}/"]
            found.append(parents[-1])
    return found


def test_layout_of_readme_is_true_and_complete() -> None:
    named = tree_of_readme()
    missing = [folder for folder in named if not (ROOT / folder).is_dir()]
    assert not missing, "named in the README, not there"
    ours = {f"src/factorlm/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    top = {f"{name}/" for name in FOLDERS if not name.startswith(".")} - {"src/"}
    assert ours | top | {"recipes/ladders/", "recipes/papers/", "src/factorlm/"} == set(named)


def test_no_folder_is_there_that_nobody_knows_of() -> None:
    """As the pictures that a command left in its default folder, which ``git add`` took along."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git tree: what belongs to it is not known")
    folders = {line.partition("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert folders == set(FOLDERS)


def test_layers_of_contributing_are_those_of_the_lint() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = config["tool"]["importlinter"]["contracts"]
    optional = re.compile(r"\(\w+\)")
    expected = [layer for layer in contract["layers"] if not optional.fullmatch(layer)]
    page = marked("CONTRIBUTING.md", "layers").replace("```", "").split("\n")
    assert [line for line in page if line] == expected


@pytest.mark.parametrize("name", packages())
def test_package_exports_what_it_says(name: str) -> None:
    """``__all__`` is complete, every name in it can be had, and a docstring says what it is for."""
    package = importlib.import_module(name)
    assert package.__doc__
    assert package.__file__ is not None
    served = public_names(ast.parse(Path(package.__file__).read_text(encoding="utf-8")))
    exported = set(getattr(package, "__all__", ()))
    assert exported - {"__version__"} == served
    for attribute in sorted(exported):
        assert getattr(package, attribute) is not None


def public_names(tree: ast.Module) -> set[str]:
    """Names that an ``__init__`` imports from our own modules, or serves lazily."""
    guarded = [part for node in tree.body if isinstance(node, ast.If) for part in node.body]
    names = {
        alias.asname or alias.name
        for node in [*tree.body, *guarded]
        if isinstance(node, ast.ImportFrom) and node.module != "factorlm.lazy"
        for alias in node.names
        if (node.module or "").startswith("factorlm.")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_exports":
            names |= lazy_names(tree, node.args[1])
    return names


def lazy_names(tree: ast.Module, table: ast.expr) -> set[str]:
    """Keys of the table given to ``lazy_exports``: a dict, a name of one, or dict.fromkeys."""
    if isinstance(table, ast.Name):
        assigned = (n for n in tree.body if isinstance(n, ast.Assign))
        table = next(n.value for n in assigned if ast.unparse(n.targets[0]) == table.id)
    if isinstance(table, ast.Dict):
        return {ast.literal_eval(key) for key in table.keys if key is not None}
    return set()  # dict.fromkeys(__all__, ...): the typed imports say the names


RECIPES = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "ladders"]


@pytest.mark.parametrize("path", sorted(RECIPES), ids=lambda path: str(path.stem))
def test_recipe_loads(path: Path) -> None:
    """A base, whose name begins with an underscore, becomes a run with a preset and steps."""
    rest = ["--model.preset", "gpt_nano", "--batch.num_steps", "1"] if path.stem[0] == "_" else []
    assert load_recipe(path, rest).num_steps >= 1


def test_version_is_the_same_everywhere() -> None:
    version = factorlm.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"Version {version}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_make_targets_of_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make (\w+)", text, flags=re.MULTILINE))
        assert named
        assert named <= targets
