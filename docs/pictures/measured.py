"""Pictures of records and of counts: pre-merge, accounting, scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from style import COLORS, FAINT, INK, figure

from factorlm.records import BenchmarkRecord, RecordFile
from factorlm.report.published import BASE, DRAWN_ENTROPIES
from factorlm.report.tables import format_power
from factorlm.scaling import SlopeDifference, fit_line, published_families, slopes_over_entropy
from factorlm.train import load_recipe
from factorlm.train.describe import Description, describe

ROOT = Path(__file__).resolve().parents[2]
SHAPE = [512, 2048]
CASES = ("dense", "low_rank", "block_shuffle", "block_dense")


def premerge() -> Figure:
    """Latency of one tuned linear against tokens; rings where a structure took its merged copy."""
    records = [
        record
        for record in RecordFile(ROOT / "reports/speed/records/premerge_avx512.jsonl")
        if isinstance(record, BenchmarkRecord) and record.settings["shape"] == SHAPE
    ]
    drawn = figure(3.2)
    panels = drawn.subplots(1, 2, sharey=True)
    for axes, dtype in zip(panels, ("fp32", "bf16"), strict=True):
        _latencies(axes, [record for record in records if record.settings["dtype"] == dtype])
        axes.set(title=dtype, xlabel="tokens of a call", xscale="log", yscale="log")
        axes.xaxis.set_major_locator(FixedLocator([1, 4, 16, 64, 256, 1024, 8192]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("latency (ms)")
    ring = {"ls": "", "marker": "o", "ms": 10, "mfc": "none", "mec": INK}
    panels[0].plot([], [], label="its merged copy was faster", **ring)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=3)
    return drawn


def _latencies(axes: Axes, records: Sequence[BenchmarkRecord]) -> None:
    tokens = [record.settings["num_tokens"] for record in records]
    for case, color in zip(CASES, COLORS, strict=False):
        times = [record.cases[case]["median_ms"] for record in records]
        axes.plot(tokens, times, color=color, marker="o", ms=3.5, lw=1.5, label=case)
        for record, time in zip(records, times, strict=True):
            if record.settings["merged"].get(case):
                x = record.settings["num_tokens"]
                axes.plot(x, time, marker="o", ms=10, mfc="none", mec=color)


def accounting() -> Figure:
    """What a token costs by part, and what a run costs by each convention: the papers' m model."""
    names = {
        "dense": "m_dense",
        "low_rank 63 %": "m_low_rank_63",
        "low_rank 32 %": "m_low_rank_32",
        "32 %, guided": "m_low_rank_32_guided",
    }
    found = {
        label: describe(load_recipe(ROOT / "recipes" / "papers" / f"{name}.yaml"))
        for label, name in names.items()
    }
    drawn = figure(4.2)
    above, below = drawn.subplots(2, 1)
    _parts(above, {label: one for label, one in found.items() if one.plan.guide is None})
    _conventions(below, found)
    return drawn


def _parts(axes: Axes, found: Mapping[str, Description]) -> None:
    left = np.zeros(len(found))
    labels = {
        "ffn": "FFN",
        "attention_projections": "attention, projections",
        "attention_scores": "attention, scores",
        "head": "head",
    }
    for (part, label), color in zip(labels.items(), COLORS, strict=False):
        flops = np.array([getattr(one.forward, part) for one in found.values()]) / 1e6
        axes.barh(list(found), flops, left=left, color=color, alpha=0.6, height=0.65, label=label)
        left += flops
    axes.set(title="forward FLOPs of a token, in millions")
    _finish_bars(axes)


def _conventions(axes: Axes, found: Mapping[str, Description]) -> None:
    places = np.arange(len(found))
    for offset, kind, color in ((-0.17, "model_flops", INK), (0.17, "executed_flops", COLORS[4])):
        flops = [float(getattr(one.training, kind)) for one in found.values()]
        axes.barh(places + offset, flops, color=color, alpha=0.6, height=0.3, label=kind)
    axes.set_yticks(places, list(found))
    axes.set(title="training FLOPs of the run")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
    _finish_bars(axes)


def _finish_bars(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.title.set_ha("left")
    axes.title.set_x(0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def scaling() -> Figure:
    """The papers' points with straight lines, and who is steeper at which shared E."""
    families = published_families()
    over = slopes_over_entropy(families, BASE, DRAWN_ENTROPIES)
    drawn = figure(5.6)
    above, below = drawn.subplots(2, 1, gridspec_kw={"height_ratios": [1.5, 1]})
    for (name, (compute, loss)), color in zip(families.items(), COLORS, strict=False):
        line = fit_line(compute, loss)
        places = np.geomspace(compute.min() / 1.3, compute.max() * 1.3, 40)
        label = f"{name}: slope −{-line.slope:.4f} ± {line.slope_high - line.slope:.4f}"
        above.plot(places, line.predict(places), color=color, lw=1.4)
        above.fill_between(places, *line.band(places), color=color, alpha=0.12, lw=0)
        above.plot(compute, loss, color=color, ls="", marker="o", ms=4.5, label=label)
        if name in over:
            _differences(below, over[name], color, name)
    _finish_losses(above)
    below.axhline(0, color=FAINT, lw=1)
    below.set(xlabel="shared entropy E (nats)", ylabel=f"slope less {BASE}'s")
    below.set_title(f"below 0: steeper than {BASE}", loc="left")
    return drawn


def _finish_losses(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs")
    axes.set_ylabel("validation loss (nats per token)")
    axes.yaxis.set_major_locator(FixedLocator([2.4, 2.6, 2.8, 3.0, 3.2, 3.4]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1f}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
    axes.set_title("four points a family, one run each; bands: 95 %", loc="left")
    axes.legend()


def _differences(axes: Axes, slopes: Sequence[SlopeDifference], color: str, name: str) -> None:
    entropies = [found.E for found in slopes]
    low, high = [found.low for found in slopes], [found.high for found in slopes]
    axes.plot(entropies, [found.difference for found in slopes], color=color, label=name)
    axes.fill_between(entropies, low, high, color=color, alpha=0.12, lw=0)
    axes.plot([*entropies, np.nan, *entropies], [*low, np.nan, *high], color=color, lw=0.7, ls="--")
