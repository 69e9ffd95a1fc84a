"""Test tools for users: the battery that proves a structure, and multi-process runs."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.testing.contract import StructuredLinearContract
    from factorlm.testing.distributed import run_distributed

__all__ = ["StructuredLinearContract", "run_distributed"]

__getattr__ = lazy_exports(
    __name__, {"StructuredLinearContract": "contract", "run_distributed": "distributed"}
)
