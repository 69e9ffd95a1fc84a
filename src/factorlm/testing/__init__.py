"""Test tools for users: the battery that proves a structure, and multi-process runs."""

from factorlm.lazy import lazy_exports

__all__ = ["StructuredLinearContract", "run_distributed"]

__getattr__ = lazy_exports(
    __name__, {"StructuredLinearContract": "contract", "run_distributed": "distributed"}
)
