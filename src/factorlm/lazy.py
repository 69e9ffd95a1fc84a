"""Names and hooks that wait until they are needed, so that importing a package stays cheap."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def lazy_exports(package: str, exports: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` (PEP 562) that serves ``exports`` of ``package``.

    ``exports`` maps a public name to the submodule that defines it, relative to ``package``.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 - it becomes a module's
        if name not in exports:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(f"{package}.{exports[name]}"), name)

    return __getattr__


def when_imported(module: str, callback: Callable[[], None]) -> None:
    """Run ``callback`` right after ``module`` is imported; now, if it already is."""
    if module in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _AfterImport(module, callback))


class _AfterImport:
    """A finder that finds nothing of its own: it makes one module's loader call back."""

    def __init__(self, module: str, callback: Callable[[], None]) -> None:
        self.module = module
        self.callback = callback

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec of the awaited module, with a loader that calls back; else None."""
        spec = PathFinder.find_spec(name, path) if name == self.module else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.callback()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
