"""Benchmarks of factorlm's own parts: cases that take turns, each beside what is promised of it."""

from factorlm.bench.cases import Bar, BenchmarkCase, Timings, measure_cases
from factorlm.bench.options import BenchOptions

__all__ = ["Bar", "BenchOptions", "BenchmarkCase", "Timings", "measure_cases"]
