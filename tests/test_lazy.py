"""Names and hooks that wait."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from factorlm.lazy import lazy_exports, when_imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a submodule that nobody has imported."""
    package = tmp_path / "awaited"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("value = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "awaited.inner"
    for name in ("awaited", "awaited.inner"):
        sys.modules.pop(name, None)


def test_callback_runs_once_after_the_module(module: str) -> None:
    seen: list[int] = []
    when_imported(module, lambda: seen.append(sys.modules[module].value))
    import awaited  # type: ignore[import-not-found]

    assert seen == []
    import awaited.inner  # type: ignore[import-not-found]

    assert seen == [3]
    assert awaited.inner.__spec__.name == module
    assert awaited.inner.__file__.endswith("inner.py")


def test_callback_runs_now_if_the_module_is_there() -> None:
    seen: list[str] = []
    when_imported("sys", lambda: seen.append("sys"))
    assert seen == ["sys"]


def test_a_module_that_does_not_exist_is_still_not_found(module: str) -> None:
    when_imported("awaited.nothing", lambda: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError, match=r"awaited\.nothing"):
        import awaited.nothing  # type: ignore[import-not-found] # noqa: F401


def test_an_error_of_the_module_is_its_own(module: str, tmp_path: Path) -> None:
    (tmp_path / "awaited" / "inner.py").write_text("1 / 0")
    when_imported(module, lambda: pytest.fail("called"))
    with pytest.raises(ZeroDivisionError):
        import awaited.inner  # noqa: F401


def test_lazy_exports_serve_and_refuse() -> None:
    serve = lazy_exports("factorlm", {"ConfigError": "errors"})
    from factorlm.errors import ConfigError

    assert serve("ConfigError") is ConfigError
    with pytest.raises(AttributeError, match="'factorlm' has no attribute 'nothing'"):
        serve("nothing")
