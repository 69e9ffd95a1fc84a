"""Self-guided training as published, beside the control that spends the same FLOPs on tokens."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorlm.records import PublishedRecord
from factorlm.report.figures import COLORS, save_picture
from factorlm.report.tables import Table, format_count, format_power
from factorlm.scaling import published_records
from factorlm.scaling.published import SIZES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READING = 0.03
"""Of a perplexity in a figure, either way."""
UNGUIDED = "low_rank 32 %"
LABELS = {
    "dense": "dense",
    "unguided": "low_rank 32 %, equal tokens",
    "control": "low_rank 32 %, more tokens, equal FLOPs",
    "guided": "low_rank 32 %, self-guided, equal FLOPs",
}


@dataclass(frozen=True, kw_only=True)
class GuidedSize:
    """Perplexities of one size; all but the unguided model have the dense one's FLOPs."""

    size: str
    training_flops: float
    """Of the dense model."""
    dense: float
    unguided: float
    """At the dense model's tokens, so at fewer FLOPs."""
    control: float
    control_tokens: float
    guided: float
    guided_share: float
    """Of the steps that have a guide."""

    def gap(self, model: str) -> float:
        """Loss over the dense model's, in nats."""
        return math.log(getattr(self, model) / self.dense)

    @property
    def closed_beyond_control(self) -> float:
        """Share of the control's gap to dense that guidance closes, at equal FLOPs."""
        return 1 - self.gap("guided") / self.gap("control")

    @property
    def closed_beyond_unguided(self) -> float:
        """Share of the unguided model's gap to dense that guidance closes, at equal tokens."""
        return 1 - self.gap("guided") / self.gap("unguided")


def guided_sizes() -> list[GuidedSize]:
    """From the published records, s to xl."""
    main = _by_name("main")
    guided = _by_name("self-guided")
    return [
        GuidedSize(
            size=size,
            training_flops=main["dense", size].values["training_flops"],
            dense=guided["dense", size].values["perplexity"],
            unguided=main[UNGUIDED, size].values["perplexity"],
            control=guided["more tokens", size].values["perplexity"],
            control_tokens=guided["more tokens", size].values["num_tokens"],
            guided=guided["self-guided", size].values["perplexity"],
            guided_share=guided["self-guided", size].values["guided_share"],
        )
        for size in SIZES
    ]


def _by_name(table: str) -> dict[tuple[str, str | None], PublishedRecord]:
    return {(record.model, record.size): record for record in published_records(table)}


def guided_table() -> Table:
    """A row a size."""
    header = (
        "size",
        "dense",
        "unguided",
        "more tokens",
        "(tokens)",
        "self-guided",
        "(share)",
        "closed: equal FLOPs",
        "equal tokens",
    )
    rows = [
        (
            row.size,
            f"{row.dense:.2f}",
            f"{row.unguided:.2f}",
            f"{row.control:.2f}",
            format_count(row.control_tokens),
            f"{row.guided:.2f}",
            f"{row.guided_share:.2f}",
            f"{100 * row.closed_beyond_control:.0f} %",
            f"{100 * row.closed_beyond_unguided:.0f} %",
        )
        for row in guided_sizes()
    ]
    return Table(header=header, rows=tuple(rows))


def guided_json() -> list[dict[str, Any]]:
    """One object a size."""
    return [
        asdict(row)
        | {
            "closed_beyond_control": row.closed_beyond_control,
            "closed_beyond_unguided": row.closed_beyond_unguided,
        }
        for row in guided_sizes()
    ]


def plot_guided(path: str | os.PathLike[str]) -> Path:
    """Perplexity against FLOPs, and the loss gap to dense by size; errors as ``plot_losses``."""
    return save_picture(_draw, path)


def _draw() -> Figure:
    from matplotlib.figure import Figure

    rows = guided_sizes()
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    for color, (model, label) in zip(COLORS, LABELS.items(), strict=False):
        flops = [row.training_flops for row in rows]
        if model == "unguided":
            flops = [_by_name("main")[UNGUIDED, row.size].values["training_flops"] for row in rows]
        values = [getattr(row, model) for row in rows]
        left.errorbar(flops, values, READING, color=color, marker="o", ms=4, lw=1.4, label=label)
    _draw_gaps(right, rows)
    _finish(left, right, rows)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def _draw_gaps(axes: Axes, rows: list[GuidedSize]) -> None:
    models = list(LABELS)[1:]
    for index, model in enumerate(models):
        places = [place + (index - 1) * 0.26 for place in range(len(rows))]
        gaps = [row.gap(model) for row in rows]
        errors = [math.hypot(READING / getattr(row, model), READING / row.dense) for row in rows]
        axes.bar(places, gaps, 0.24, color=COLORS[index + 1], alpha=0.85)
        axes.errorbar(places, gaps, errors, ls="", color="#333333", lw=1, capsize=2)


def _finish(left: Axes, right: Axes, rows: list[GuidedSize]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("training FLOPs")
    left.set_ylabel("validation perplexity")
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
    left.yaxis.set_major_locator(FixedLocator([12, 14, 16, 18, 20, 24, 28]))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.set_xticks(range(len(rows)), [row.size for row in rows])
    right.set_xlabel("size of the dense model")
    right.set_ylabel("loss over dense (nats per token)")
    right.set_title("whiskers: what reading them off a figure may err", loc="left", fontsize=10)
    right.grid(axis="x", visible=False)
