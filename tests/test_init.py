"""The top-level package: lean, complete, and the same for type checkers as at run time."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import factorlm

ROOT = Path(__file__).parent.parent


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_lean() -> None:
    """Only the standard library and a few small modules of our own."""
    script = (
        "import sys; before = set(sys.modules); import factorlm; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before})); "
        "print(*sorted(name for name in sys.modules if name.startswith('factorlm.')))"
    )
    packages, ours = run_python(script).splitlines()
    assert set(packages.split()) - set(sys.stdlib_module_names) == {"factorlm"}
    assert ours.split() == ["factorlm.lazy"]


def test_it_imports_where_torch_cannot_be() -> None:
    script = "import sys; sys.modules['torch'] = None; import factorlm; print(factorlm.__version__)"
    assert run_python(script).strip() == factorlm.__version__


@pytest.mark.parametrize("name", factorlm.__all__)
def test_every_name_is_served(name: str) -> None:
    assert getattr(factorlm, name) is not None


def test_all_is_sorted_and_complete() -> None:
    assert factorlm.__all__ == sorted(factorlm.__all__)
    assert set(factorlm.__all__) == {*factorlm._EXPORTS, "__version__"}


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(factorlm.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(guarded.test) == "TYPE_CHECKING"
    imported = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {name: f"factorlm.{where}" for name, where in factorlm._EXPORTS.items()}


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'factorlm' has no attribute 'factorise_'"):
        factorlm.factorise_  # noqa: B018


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert factorlm.__version__ == project["version"]
