"""Losses of a run over tokens, FLOPs and time, thinned to points that are really there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from factorlm.records import EvalRecord
from factorlm.report.compare import RunSummary, seconds_of
from factorlm.report.figures import smooth, smoothing_width


@dataclass(frozen=True, kw_only=True, eq=False)
class LossCurve:
    """Points of one curve as float64 arrays, each (num_points,); NaN for what is not known."""

    step: np.ndarray
    num_tokens: np.ndarray
    training_flops: np.ndarray
    """By the papers' convention."""
    executed_flops: np.ndarray
    seconds: np.ndarray
    """Of training, evaluation and saving left out."""
    loss: np.ndarray
    """Nats per token, as recorded."""
    smoothed: np.ndarray
    """Of training, the mean over the last steps up to this one; of validation, ``loss``."""

    @property
    def columns(self) -> np.ndarray:
        """All arrays in the order of the fields, (7, num_points)."""
        return np.stack([getattr(self, name) for name in self.__dataclass_fields__])


def thin(values: np.ndarray, max_points: int) -> np.ndarray:
    """Indices of at most ``max_points`` (4 or more) of ``values``, in order.

    The first and the last stay; of each of equally long stretches between them, the lowest and
    the highest do, so no spike is lost. A value that is not finite counts as the highest.
    """
    if len(values) <= max_points:
        return np.arange(len(values))
    ranked = np.where(np.isfinite(values), values, np.inf)
    edges = np.linspace(1, len(values) - 1, max_points // 2, dtype=int)
    extremes = [
        start + find(ranked[start:stop])
        for start, stop in itertools.pairwise(edges)
        for find in (np.argmin, np.argmax)
    ]
    return np.unique([0, *extremes, len(values) - 1])


def loss_curves(run: RunSummary, max_points: int) -> tuple[LossCurve, LossCurve, np.ndarray]:
    """Training and validation, each of at most ``max_points``, and the steps that training kept,
    as indices. An evaluation at a step without a record lies in line with its neighbours."""
    axes = _axes(run)
    loss = np.array([step.loss for step in run.steps], dtype=float)
    smoothed = smooth(loss, smoothing_width(len(loss)))
    kept = thin(loss, max_points)
    points = {name: values[kept] for name, values in axes.items()}
    training = LossCurve(loss=loss[kept], smoothed=smoothed[kept], **points)
    return training, _validation_curve(run, axes, max_points), kept


def _validation_curve(run: RunSummary, axes: dict[str, np.ndarray], max_points: int) -> LossCurve:
    loss = np.array([record.loss for record in run.curve], dtype=float)
    kept = thin(loss, max_points)
    evals = [run.curve[index] for index in kept]
    tokens = np.array([record.num_tokens for record in evals], dtype=float)
    at = {name: _at(tokens, axes["num_tokens"], values) for name, values in axes.items()}
    at |= {"num_tokens": tokens, "step": _steps(evals)}
    return LossCurve(loss=loss[kept], smoothed=loss[kept], **at)


def _steps(evals: Sequence[EvalRecord]) -> np.ndarray:
    return np.array([record.step for record in evals], dtype=float)


def _at(tokens: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` over tokens, 0 at the start."""
    return np.interp(tokens, [0.0, *known], [0.0, *values])


def _axes(run: RunSummary) -> dict[str, np.ndarray]:
    """What is spent at the end of every step, by the names of ``LossCurve``."""
    tokens = np.array([step.num_tokens for step in run.steps], dtype=float)
    # None becomes NaN: records of before FLOPs were counted.
    model = np.array([step.model_flops for step in run.steps], dtype=float)
    return {
        "step": np.array([step.step for step in run.steps], dtype=float),
        "num_tokens": tokens,
        "training_flops": np.where(
            np.isnan(model), 3 * run.run.forward_flops_per_token * tokens, model
        ),
        "executed_flops": np.array([step.executed_flops for step in run.steps], dtype=float),
        "seconds": np.array(seconds_of(run.steps)),
    }
