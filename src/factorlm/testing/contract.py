"""The battery that every structure passes: inherit ``StructuredLinearContract`` in a pytest file.

    class TestLowRank(StructuredLinearContract):
        cases = [(LowRankConfig(rank=3), 8, 12), (LowRankConfig(rank=1), 5, 3)]

        def best_residual(self, config, weight):  # an independent truth, e.g. by NumPy
            return (numpy.linalg.svd(weight, compute_uv=False)[config.rank :] ** 2).sum()

Tests that take seconds carry the marker ``slow``: declare it, and leave them out by
``-m "not slow"``.

A structure that is consistent with itself, counts itself rightly and projects optimally passes.
That it is the matrix that you meant is for a test of your own to say.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("factorlm.testing.battery")

from factorlm.testing.battery.counts import CountTests  # noqa: E402
from factorlm.testing.battery.forward import ForwardTests  # noqa: E402
from factorlm.testing.battery.projection import ProjectionTests  # noqa: E402
from factorlm.testing.battery.state import StateTests  # noqa: E402


class StructuredLinearContract(ForwardTests, ProjectionTests, CountTests, StateTests):
    """Fill ``cases`` (the first one also runs the expensive tests) and ``best_residual``."""
